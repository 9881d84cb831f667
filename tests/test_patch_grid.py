"""Patch positions: reference values, derivation from the encoder, and grids of any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad.encoders.vgg16 import VGG16
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid


@pytest.mark.parametrize(("size", "patches"), [(2, 1131), (5, 936), (8, 759)])
def test_positions_of_the_published_implementation(reference, size, patches):
    grid = PatchGrid(30, 40, size)
    assert len(grid) == patches
    assert torch.equal(grid.indices(), torch.from_numpy(reference[f"indices_psize{size}"].T))
    # the reference truncates 7.5 to 7
    assert torch.equal(grid.centers(), torch.from_numpy(reference[f"keypoints_psize{size}"].T).float() + 0.5)


@settings(deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    size=st.integers(1, 13),
    stride=st.integers(1, 4),
)
def test_centers_are_means_of_the_positions_a_patch_covers(height, width, size, stride):
    geometry = EncoderGeometry(stride=8, receptive_field=31, padding=12)
    positions = [(31 - 1) / 2 - 12 + 8 * j for j in range(max(height, width))]
    expected = [
        [sum(positions[x : x + size]) / size, sum(positions[y : y + size]) / size]
        for y in range(0, height - size + 1, stride)
        for x in range(0, width - size + 1, stride)
    ]
    grid = PatchGrid(height, width, size, stride, geometry)
    torch.testing.assert_close(grid.centers(), torch.tensor(expected).reshape(-1, 2))
    assert len(grid) == len(expected)
    if expected:
        assert list(grid.max_index) == grid.indices().max(dim=0).values.tolist()


def test_a_position_for_each_whole_stride():
    encoder = VGG16()
    assert encoder.geometry.map_size(480, 640) == (30, 40) and encoder.geometry.map_size(15, 16) == (0, 1)
    with torch.inference_mode():
        assert encoder(torch.zeros(1, 3, 33, 47)).shape[2:] == encoder.geometry.map_size(33, 47) == (2, 2)


def test_pixels_of_patch_and_pitch():
    grid = PatchGrid(30, 40, patch_size=5, stride=3)
    assert (grid.patch_pixels, grid.pitch_pixels) == (80, 48)
    assert grid.centers()[1, 0] - grid.centers()[0, 0] == 48
