"""From pictures to scores through the scripts themselves, against the published implementation's values."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, ROOT

from patchnetvlad.config import MATCHERS
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.reranking import fuse, score_pair
from patchnetvlad.store.reading.feature_store import FeatureStore

WEIGHTS = (0.45, 0.15, 0.4)
PATCHES = (1131, 936, 759)  # of a picture at the three patch sizes


@pytest.fixture(scope="module")
def extracted(published_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """The synthetic pictures' features, made by feature_extract.py with performance.ini at 128 dimensions."""
    folder = tmp_path_factory.mktemp("features")
    listed = folder / "pictures.txt"
    listed.write_text("scene_a.png\n./scene_a_shifted.png\n\nscene_b.png\n")
    command = [sys.executable, ROOT / "feature_extract.py", "--config_path", ROOT / "configs/performance.ini"]
    command += ["--dataset_file_path", listed, "--dataset_root_dir", DATA / "synthetic"]
    command += ["--output_features_dir", folder / "features", "--nocuda", "--set", "global_params.num_pcs=128"]
    command += ["--set", f"global_params.resumepath={str(published_checkpoint).removesuffix('128.pth.tar')}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    pictures = read_image_list(listed, DATA / "synthetic")
    store = FeatureStore.open(folder / "features", pictures)
    assert (folder / "features/extract.log").exists()
    return store


def test_files_hold_the_published_descriptors(extracted, reference):
    rows = np.load(extracted.folder / "globalfeats.npy")
    for index, name in enumerate(("scene_a", "scene_a_shifted", "scene_b")):
        assert rows[index] @ reference[f"image{index}_global_wpca"] >= 0.999999
        for size, count in zip((2, 5, 8), PATCHES, strict=True):
            patches = np.load(extracted.folder / f"patchfeats_psize{size}_{name}.npy")
            assert patches.shape == (128, count) and patches.dtype == np.float32
            expected = reference[f"image{index}_patch_psize{size}_every17"]
            assert (patches[:, ::17] * expected).sum(0).min() >= 0.99999


@pytest.mark.parametrize(("matcher", "name"), [("RANSAC", "ransac"), ("spatialApproximator", "spatial")])
def test_scores_equal_the_published_ones(extracted, reference, matcher, name):
    expected = -reference[f"{name}_scores"]  # published scores are negated
    found = np.zeros_like(expected)
    for query in range(3):
        for other in range(3):
            pair = score_pair(extracted.patches(query), extracted.patches(other), MATCHERS[matcher])
            found[query, other] = [score.value for score in pair.scores]
    if name == "ransac":
        assert np.all(np.abs(found - expected) * PATCHES <= 5 + 1e-9)
    else:
        np.testing.assert_allclose(found, expected, rtol=0.05)
    np.testing.assert_allclose(fuse(found[0], WEIGHTS), -reference[f"fused_{name}_row0"], atol=1e-2)
    np.testing.assert_allclose(fuse(expected[0], WEIGHTS), -reference[f"fused_{name}_row0"], atol=1e-6)
