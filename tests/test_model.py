"""The whole model against the published values, and its behaviour at odd sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, published_state
from PIL import Image

from patchnetvlad.errors import UserError
from patchnetvlad.images import prepare_image, read_image
from patchnetvlad.model import PlaceModel


@pytest.fixture(scope="module")
def published_model():
    model = PlaceModel("vgg16", "patchnetvlad", 16, 128, (2, 5, 8), (1, 1, 1))
    model.load_state_dict(published_state())
    return model.eval()


def check_picture(model: PlaceModel, path: Path, reference, index: int, map_step: int, patch_step: int) -> None:
    picture = prepare_image(read_image(path), 480, 640)[None]
    with torch.inference_mode():
        feature_map = model.encoder(picture)[0].flatten(1).numpy()
    expected = reference[f"image{index}_conv5_every{map_step}"]
    assert np.linalg.norm(feature_map[:, ::map_step] - expected) <= 1e-4 * np.linalg.norm(expected)
    described = model.describe(picture)
    assert described.global_[0].numpy() @ reference[f"image{index}_global_wpca"] >= 0.999999
    with torch.inference_mode():
        vlad = model.pool(model.encoder(picture))[0].numpy()
    assert vlad @ reference[f"image{index}_global_vlad"] >= 0.999999
    for size, patches in zip((2, 5, 8), described.patches, strict=True):
        expected = reference[f"image{index}_patch_psize{size}_every{patch_step}"]
        cosines = (patches[0].numpy().T[:, ::patch_step] * expected).sum(0)
        assert cosines.min() >= 0.99999


def test_features_equal_the_published_values(published_model, reference):
    check_picture(published_model, DATA / "synthetic/scene_a.png", reference, 0, 61, 17)


@pytest.mark.slow
def test_photos_equal_the_published_values(published_model, real_data):
    reference = np.load(real_data / "parity/reference_photos.npz")
    for index, path in enumerate(sorted((real_data / "parity/photos").glob("*.jpg"))):
        check_picture(published_model, path, reference, index, 7, 3)


def test_near_hard_assignments_equal_the_published_values(reference):
    model = PlaceModel("vgg16", "patchnetvlad", 16, 128, (2, 5, 8), (1, 1, 1))
    model.load_state_dict(published_state(alpha=1000.0))
    described = model.eval().describe(prepare_image(read_image(DATA / "synthetic/scene_a.png"), 480, 640)[None])
    for size, patches in zip((2, 5, 8), described.patches, strict=True):
        expected = reference[f"sharp_image0_patch_psize{size}_every31"]
        assert (patches[0].numpy().T[:, ::31] * expected).sum(0).min() >= 0.9999


def test_grids_equal_the_published_keypoints(published_model, reference):
    for size, grid in zip((2, 5, 8), published_model.grids(30, 40), strict=True):
        np.testing.assert_array_equal(grid.indices().T.numpy(), reference[f"indices_psize{size}"])
        np.testing.assert_array_equal(np.trunc(grid.centers().T.numpy()), reference[f"keypoints_psize{size}"])


@pytest.mark.parametrize("pooling", ["netvlad", "max", "avg"])
def test_global_models_have_no_patches(pooling):
    model = PlaceModel("rootsift", pooling, 4, 0, (2, 5), (1, 1)).eval()
    described = model.describe(torch.rand(2, 3, 64, 80))
    assert described.patches == () and described.grids == ()
    assert described.global_.shape == (2, model.output_dims)
    torch.testing.assert_close(described.global_.norm(dim=1), torch.ones(2))
    assert any(key.startswith("pool.") for key in model.state_dict()) == (pooling == "netvlad")


def test_batches_equal_single_pictures_at_odd_sizes():
    torch.manual_seed(0)
    model = PlaceModel("rootsift", "patchnetvlad", 4, 8, (1, 3), (1, 2)).eval()
    pictures = torch.rand(3, 3, 75, 101)
    together = model.describe(pictures)
    for index in range(3):
        alone = model.describe(pictures[index : index + 1])
        torch.testing.assert_close(together.global_[index], alone.global_[0], atol=1e-5, rtol=1e-4)
        for some, grid, size in zip(together.picture(index).descriptors, together.grids, (1, 3), strict=True):
            assert some.shape == (len(grid), 8) and grid.patch_size == size


def test_grey_pictures_are_described(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 80), dtype=np.uint8)).save(tmp_path / "grey.png")
    model = PlaceModel("rootsift", "netvlad", 2).eval()
    described = model.describe(prepare_image(read_image(tmp_path / "grey.png"), 60, 80)[None])
    assert torch.isfinite(described.global_).all()


def test_bfloat16_is_close_and_says_so_by_its_rounding(published_model):
    picture = prepare_image(read_image(DATA / "synthetic/scene_a.png"), 240, 320)[None]
    exact = published_model.describe(picture)
    published_model.precision = "bfloat16"
    try:
        rough = published_model.describe(picture)
    finally:
        published_model.precision = "float32"
    assert rough.global_.dtype == torch.float32
    for first, second in zip((exact.global_, *exact.patches), (rough.global_, *rough.patches), strict=True):
        cosines = (first * second).sum(dim=-1)
        assert cosines.min() > 0.98
        assert not torch.equal(first, second)


def test_a_patch_larger_than_the_map_is_refused():
    model = PlaceModel("rootsift", "patchnetvlad", 4, 0, (2, 5), (1, 1)).eval()
    assert [len(grid) for grid in model.describe(torch.rand(1, 3, 80, 96)).grids] == [20, 2]
    with pytest.raises(UserError, match="patch of size 5 is larger than the feature map, which has 4×6 positions"):
        model.describe(torch.rand(1, 3, 64, 96))
