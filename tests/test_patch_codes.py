"""Product-quantised descriptors: exact where they can be, as good as k-means allows, the same every time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad.config_values import code_bytes
from patchnetvlad.patch_codes import NEIGHBOUR_SHARE, PatchCodec, _balanced_groups, blended, train_codec
from patchnetvlad.patch_grid import PatchGrid


def unit_rows(count: int, dims: int, seed: int = 0, decay: float = 0.0) -> torch.Tensor:
    """Random unit rows; decay: how fast the dimensions' variances fall, as WPCA without full whitening leaves them."""
    rows = torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows * torch.arange(1, dims + 1).float() ** -decay, dim=1)


def plain_decode(codec: PatchCodec, codes: np.ndarray) -> torch.Tensor:
    """By definition: the centroids of all groups put side by side, at length 1."""
    rows = np.zeros((len(codes), codec.num_dims), dtype=np.float32)
    for group, dims in enumerate(codec.groups):
        real = dims >= 0
        rows[:, dims[real]] = codec.centroids[group][codes[:, group]][:, real]
    return F.normalize(torch.from_numpy(rows), dim=1)


def distances(codec: PatchCodec, rows: torch.Tensor, group: int) -> np.ndarray:
    """Squared distances P×256 of the rows to a group's centroids, in its dimensions."""
    real = codec.groups[group] >= 0
    own = rows.numpy()[:, None, codec.groups[group][real]].astype(np.float64)
    return ((own - codec.centroids[group][None][:, :, real]) ** 2).sum(-1)


def test_up_to_256_descriptors_are_kept_exactly():
    rows = unit_rows(200, 24)
    codec = train_codec(rows, 5)
    torch.testing.assert_close(codec.decode(codec.encode(rows)), rows, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.data())
def test_codes_are_of_the_nearest_centroids(dims, data):
    num_bytes = data.draw(st.integers(1, dims))
    codec = train_codec(unit_rows(300, dims, 1, 0.5), num_bytes)
    rows = unit_rows(data.draw(st.integers(0, 60)), dims, 2, 0.5)
    codes = codec.encode(rows)
    assert (codes.shape, codes.dtype) == ((len(rows), num_bytes), np.uint8)
    for group in range(num_bytes):
        all_distances = distances(codec, rows, group)
        chosen = np.take_along_axis(all_distances, codes[:, group, None].astype(np.int64), axis=1)[:, 0]
        np.testing.assert_allclose(chosen, all_distances.min(axis=1), atol=1e-6)
    decoded = codec.decode(codes)
    assert (decoded.shape, decoded.dtype) == (rows.shape, torch.float32)
    torch.testing.assert_close(decoded, plain_decode(codec, codes), atol=1e-6, rtol=0)
    assert (codec.num_dims, codec.num_bytes) == (dims, num_bytes)


def test_more_bytes_are_more_exact():
    sample, rows = unit_rows(1500, 32, 0, 0.5), unit_rows(500, 32, 1, 0.5)
    likeness = []
    for num_bytes in (1, 4, 16, 32):
        codec = train_codec(sample, num_bytes)
        likeness.append(float((codec.decode(codec.encode(rows)) * rows).sum(1).mean()))
    assert likeness == sorted(likeness)
    assert likeness[-1] > 0.999


def test_balanced_groups_lose_less_than_neighbouring_dimensions():
    sample, rows = unit_rows(1500, 64, 0, 1.0), unit_rows(500, 64, 1, 1.0)
    balanced = train_codec(sample, 8)
    order = torch.from_numpy(balanced.groups.reshape(-1))
    neighbours = torch.empty_like(order)
    neighbours[order] = torch.arange(64)  # training on these undoes the dealing
    plain = PatchCodec(np.arange(64).reshape(8, 8), _plain_centroids(sample, 8))
    errors = [float((codec.decode(codec.encode(rows)) - rows).square().sum(1).mean()) for codec in (balanced, plain)]
    assert errors[0] < 0.9 * errors[1]


def _plain_centroids(sample: torch.Tensor, groups: int) -> np.ndarray:
    """Centroids of groups of neighbouring dimensions: each group is a codec of one byte."""
    return np.concatenate([train_codec(part.contiguous(), 1).centroids for part in sample.chunk(groups, dim=1)])


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60), st.data())
def test_every_dimension_is_in_one_group(variances, data):
    count = data.draw(st.integers(1, len(variances)))
    groups = _balanced_groups(np.array(variances), count)
    assert groups.shape == (count, -(-len(variances) // count))
    assert sorted(groups[groups >= 0].tolist()) == list(range(len(variances)))
    assert (groups >= 0).any(axis=1).all()


def test_training_repeats_itself_and_the_hash_tells_codecs_apart():
    sample = unit_rows(3000, 16)
    first, again, other = train_codec(sample, 4), train_codec(sample.clone(), 4), train_codec(sample[1:], 4)
    np.testing.assert_array_equal(first.centroids, again.centroids)
    assert first.sha256 == again.sha256 != other.sha256
    assert len({first.sha256, other.sha256, train_codec(sample, 8).sha256}) == 3


@pytest.mark.parametrize("num_bytes", [0, 17])
def test_impossible_numbers_of_bytes(num_bytes):
    with pytest.raises(ValueError, match="expected 1 to 16"):
        train_codec(unit_rows(300, 16), num_bytes)


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="learn from"):
        train_codec(torch.empty(0, 16), 4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_blending_is_a_weighted_mean_of_neighbours(height, width, patch_size, stride):
    grid = PatchGrid(height, width, patch_size, stride)
    rows = unit_rows(len(grid), 5, height * 10 + width)
    share = NEIGHBOUR_SHARE * max(0, patch_size - stride) / patch_size
    places = [divmod(index, max(1, grid.columns)) for index in range(len(grid))]
    expected = torch.zeros_like(rows)
    for index, (row, column) in enumerate(places):
        for other, (other_row, other_column) in enumerate(places):
            away = max(abs(row - other_row), abs(column - other_column))
            if away <= 1:
                expected[index] += share ** (abs(row - other_row) + abs(column - other_column)) * rows[other]
    torch.testing.assert_close(blended(rows, grid), F.normalize(expected, dim=1), atol=1e-5, rtol=0)


def test_patches_that_do_not_overlap_are_left_alone():
    rows = unit_rows(4, 5)
    assert torch.equal(blended(rows, PatchGrid(4, 4, 2, 2)), rows)


def test_blending_brings_overlapping_patches_nearer_to_what_was_coded():
    """Window means of a random field, as patch descriptors are."""
    field = torch.randn(1, 32, 23, 23, generator=torch.Generator().manual_seed(0))
    grid = PatchGrid(23, 23, 4)
    rows = F.normalize(F.avg_pool2d(field, 4, 1)[0].flatten(1).T, dim=1)
    codec = train_codec(unit_rows(1500, 32, 1), 3)
    decoded = codec.decode(codec.encode(rows))
    before, after = (float((some * rows).sum(1).mean()) for some in (decoded, blended(decoded, grid)))
    assert after > before + 0.05


def test_names_of_storage_types():
    assert [code_bytes(name) for name in ("pq1", "pq32", "pq160")] == [1, 32, 160]
    assert [code_bytes(name) for name in ("pq", "pq0", "pq08", "pq-1", "pq8x", "int8", "PQ8")] == [None] * 7
