"""What the tests share: reference values, a checkpoint of known weights, and the folder of real pictures."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from patchnetvlad import images
from patchnetvlad.commands.models import fit_model
from patchnetvlad.examples.rendered_msls import RenderedCity, write_msls

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent

# Frozen weights that need no download: NumPy's legacy generator gives every machine the same bytes.
VGG16_CONVOLUTIONS = [
    (0, 3, 64),
    (2, 64, 64),
    (5, 64, 128),
    (7, 128, 128),
    (10, 128, 256),
    (12, 256, 256),
    (14, 256, 256),
    (17, 256, 512),
    (19, 512, 512),
    (21, 512, 512),
    (24, 512, 512),
    (26, 512, 512),
    (28, 512, 512),
]


def published_state(
    num_pcs: int = 128, num_clusters: int = 16, seed: int = 7, alpha: float = 100.0
) -> dict[str, torch.Tensor]:
    """A state dict with the published keys, the one that the reference values were made with."""
    rng = np.random.RandomState(seed)
    state = {}
    for layer, inputs, outputs in VGG16_CONVOLUTIONS:
        deviation = np.sqrt(2.0 / (inputs * 9))
        state[f"encoder.{layer}.weight"] = rng.standard_normal((outputs, inputs, 3, 3)) * deviation
        state[f"encoder.{layer}.bias"] = np.zeros(outputs)
    centroids = np.abs(rng.standard_normal((num_clusters, 512))).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    state["pool.centroids"] = centroids
    state["pool.conv.weight"] = (centroids * alpha)[:, :, None, None]
    if num_pcs:
        weight = rng.standard_normal((num_pcs, num_clusters * 512)) / np.sqrt(num_clusters * 512)
        state["WPCA.0.weight"] = weight[:, :, None, None]
        state["WPCA.0.bias"] = rng.standard_normal(num_pcs) * 0.001
    return {key: torch.from_numpy(np.ascontiguousarray(value, np.float32)) for key, value in state.items()}


@pytest.fixture(scope="session")
def reference():
    """Values of the published implementation in float64, for the synthetic pictures."""
    return np.load(DATA / "reference_synthetic.npz")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures; tests that need it skip where it is absent."""
    folder = os.environ.get("PATCHNETVLAD_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PATCHNETVLAD_TEST_DATA names no folder of real pictures")
    return Path(folder)


@pytest.fixture(scope="session")
def published_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file of 128 dimensions in the published format."""
    path = tmp_path_factory.mktemp("pretrained_models") / "mapillary_WPCA128.pth.tar"
    torch.save({"epoch": 0, "state_dict": published_state()}, path)
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that make a script use a model fitted on a few example pictures at 160×120, in the builtin layout."""
    folder = tmp_path_factory.mktemp("small_model")
    options = [
        *("--config_path", str(ROOT / "configs/rootsift.ini"), "--nocuda", "-q"),
        *("--set", "feature_extract.imageresizew=160", "--set", "feature_extract.imageresizeh=120"),
        *("--set", "feature_match.imageresizew=160", "--set", "feature_match.imageresizeh=120"),
        *("--set", "global_params.num_pcs=32", "--set", "global_params.patch_sizes=2,3"),
        *("--set", "global_params.strides=1,1", "--set", "feature_match.patchweights2use=0.5,0.5"),
        *("--set", f"global_params.resumepath={folder / 'small_WPCA'}", "--set", "train.num_clusters=8"),
        *("--set", "train.whitening=1", "--set", "feature_match.rerank_top=10"),
        *("--set", "feature_match.n_values_all=1,5,10"),
    ]
    listed = folder / "pictures.txt"
    listed.write_text("".join(f"database/place{place:02}_0.jpg\n" for place in range(12)))
    fitting = ["--dataset_root_dir", str(ROOT / "example_images"), "--dataset_file_path", str(listed)]
    assert fit_model([*options, *fitting, "--output_path", str(folder / "small_WPCA32.pth.tar")]) == 0
    return options


@pytest.fixture(scope="session", autouse=True)
def checked_pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which pictures were found whole is remembered here, not in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "user_cache", lambda: folder)
        yield


@pytest.fixture(scope="session")
def msls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small tree in the layout of MSLS; copy it before changing a file."""
    root = tmp_path_factory.mktemp("msls")
    names = {"trondheim": 6, "london": 5, "cph": 4, "sf": 3, "miami": 3}
    cities = [RenderedCity(name, places, 20 + seed) for seed, (name, places) in enumerate(names.items())]
    write_msls(root, cities, size=(96, 72))
    return root
