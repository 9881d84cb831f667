"""The training-free encoder: pictures whose gradients are known, and a plain NumPy RootSIFT."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from patchnetvlad.encoders.rootsift import DenseRootSIFT

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def normalised(grey: Tensor) -> Tensor:
    """A grey picture H×W in 0..1 as the ImageNet-normalised batch 1×3×H×W the encoder gets."""
    return (grey.expand(1, 3, *grey.shape) - MEAN) / STD


def random_grey(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(height, width, generator=torch.Generator().manual_seed(seed))


def numpy_rootsift(grey: np.ndarray, x: float, y: float, cell: int, sigma: float) -> np.ndarray:
    """RootSIFT around (x, y) pixel by pixel, by the text-book: entry (4·row + column)·8 + orientation."""
    radius = math.ceil(3 * sigma)
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    wide = np.pad(grey.astype(np.float64), radius + 1, mode="edge")
    wide = np.apply_along_axis(np.convolve, 0, wide, taps, mode="valid")
    wide = np.apply_along_axis(np.convolve, 1, wide, taps, mode="valid")
    histogram = np.zeros((4, 4, 8))
    for row in range(grey.shape[0]):
        for column in range(grey.shape[1]):
            gx = (wide[row + 1, column + 2] - wide[row + 1, column]) / 2
            gy = (wide[row + 2, column + 1] - wide[row, column + 1]) / 2
            angle = (math.atan2(gy, gx) % (2 * math.pi)) / (math.pi / 4)
            lower = math.floor(angle)
            for i in range(4):
                for j in range(4):
                    wy = 1 - abs(row - (y + (i - 1.5) * cell)) / cell
                    wx = 1 - abs(column - (x + (j - 1.5) * cell)) / cell
                    if wx > 0 and wy > 0:
                        weight = math.hypot(gx, gy) * wx * wy
                        histogram[i, j, lower % 8] += weight * (1 - (angle - lower))
                        histogram[i, j, (lower + 1) % 8] += weight * (angle - lower)
    vector = histogram.reshape(-1)
    vector = np.minimum(vector / np.linalg.norm(vector), 0.2)
    return np.sqrt(vector / vector.sum())


@pytest.mark.parametrize(
    ("row", "column", "cell", "sigma"), [(3, 4, 8, 1.0), (0, 0, 16, 0.8), (5, 6, 12, 1.6), (2, 3, 10, 1.0)]
)
def test_one_position_agrees_with_a_plain_numpy_rootsift(row: int, column: int, cell: int, sigma: float) -> None:
    grey = random_grey(99, 117)
    encoder = DenseRootSIFT(cell_size=cell, smoothing=sigma)
    found = encoder(normalised(grey))[0, :, row, column].numpy()
    first = encoder.geometry.first_center
    expected = numpy_rootsift(grey.numpy(), 16 * column + first, 16 * row + first, cell, sigma)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("cell", [4, 6, 8, 16, 20])
def test_geometry_is_that_of_the_windows(cell: int) -> None:
    geometry = DenseRootSIFT(cell_size=cell).geometry
    assert geometry.stride == 16
    assert geometry.first_center == 7.5
    assert geometry.receptive_field == 5 * cell + 2 + 2 * 3


def test_only_the_receptive_field_is_seen() -> None:
    encoder = DenseRootSIFT(cell_size=8)
    base = random_grey(160, 160)
    row = column = 5
    first = 16 * column + encoder.geometry.first_center - (encoder.geometry.receptive_field - 1) / 2
    assert first == 16 * column - encoder.geometry.padding
    inside, outside = base.clone(), base.clone()
    start, stop = int(first), int(first) + encoder.geometry.receptive_field
    inside[start:stop, start:stop] = 0
    outside[:start], outside[stop:], outside[:, :start], outside[:, stop:] = 0, 0, 0, 0
    reference, same, other = (encoder(normalised(g))[0, :, row, column] for g in (base, outside, inside))
    torch.testing.assert_close(same, reference)
    assert (other - reference).abs().max() > 0.01


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(480, 640, 30, 40), (99, 117, 6, 7)])
def test_map_has_a_position_every_16_pixels(height: int, width: int, rows: int, columns: int) -> None:
    found = DenseRootSIFT()(normalised(random_grey(height, width)))
    assert found.shape == (1, DenseRootSIFT.channels, rows, columns)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("orientation", range(8))
def test_a_ramp_fills_one_orientation(orientation: int) -> None:
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    angle = orientation * math.pi / 4
    grey = 0.5 + 0.003 * ((x - 64) * math.cos(angle) + (y - 64) * math.sin(angle))
    found = DenseRootSIFT(cell_size=8)(normalised(grey))[0, :, 4, 4].view(16, 8)
    assert found[:, orientation].min() > 0.2
    others = [b for b in range(8) if b != orientation]
    assert found[:, others].max() < 0.02


def test_a_shift_of_16_pixels_moves_the_map_by_one() -> None:
    encoder = DenseRootSIFT(cell_size=8)
    scene = random_grey(208, 208)
    still, moved = encoder(normalised(scene[:192, :192])), encoder(normalised(scene[16:, 16:]))
    torch.testing.assert_close(moved[..., 2:-3, 2:-3], still[..., 3:-2, 3:-2], atol=1e-5, rtol=1e-4)


def test_gain_and_offset_of_brightness_do_not_matter() -> None:
    encoder = DenseRootSIFT()
    scene = random_grey(96, 128)
    torch.testing.assert_close(
        encoder(normalised(0.25 * scene + 0.6)), encoder(normalised(scene)), atol=1e-4, rtol=1e-3
    )


def test_every_descriptor_is_a_non_negative_unit_vector() -> None:
    scene = random_grey(128, 128)
    scene[:, :64] = 0.4
    found = DenseRootSIFT(cell_size=8)(normalised(scene))
    assert found.min() >= 0
    torch.testing.assert_close(found.norm(dim=1), torch.ones(1, 8, 8))


def test_flat_areas_share_one_descriptor_and_noise_is_not_amplified() -> None:
    encoder = DenseRootSIFT(cell_size=8)
    flat = encoder(normalised(torch.full((96, 96), 0.4)))
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / math.sqrt(128)), atol=1e-3, rtol=0)
    noisy = encoder(normalised(0.4 + 0.0005 * random_grey(96, 96)))
    assert (flat * noisy).sum(dim=1).min() > 0.95


def test_grey_is_the_luma_of_rgb() -> None:
    encoder = DenseRootSIFT()
    colour = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    luma = (colour * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1)[0]
    torch.testing.assert_close(encoder((colour - MEAN) / STD), encoder(normalised(luma)), atol=1e-4, rtol=1e-3)


def test_a_batch_is_its_pictures_one_by_one() -> None:
    encoder = DenseRootSIFT()
    pictures = torch.cat([normalised(random_grey(80, 96, seed)) for seed in range(3)])
    one_by_one = torch.cat([encoder(picture[None]) for picture in pictures])
    torch.testing.assert_close(encoder(pictures), one_by_one, atol=1e-5, rtol=1e-4)


def test_precision_is_never_below_float32() -> None:
    encoder = DenseRootSIFT()
    pictures = normalised(random_grey(80, 96))
    reference = encoder(pictures)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(encoder(pictures), reference)
    double = encoder(pictures.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), reference, atol=1e-4, rtol=1e-3)
    half = encoder(pictures.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, reference, atol=0.02, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_answer_is_the_same_on_an_accelerator() -> None:
    encoder = DenseRootSIFT()
    pictures = normalised(random_grey(160, 160))
    reference = encoder(pictures)
    torch.testing.assert_close(encoder.cuda()(pictures.cuda()).cpu(), reference, atol=1e-3, rtol=0)


def test_nothing_is_fitted_and_nothing_is_stored() -> None:
    encoder = DenseRootSIFT()
    assert not encoder.state_dict()
    assert not list(encoder.parameters())


@pytest.mark.parametrize("settings", [{"cell_size": 5}, {"cell_size": 2}, {"smoothing": 0.0}, {"contrast_floor": 0.0}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        DenseRootSIFT(**settings)  # type: ignore[arg-type]
