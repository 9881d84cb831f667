"""Product-quantised descriptors: exact where they can be, as good as k-means allows, the same every time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad.patch_codes import (
    PatchCodec,
    _balanced_groups,
    coded_for,
    coded_grids,
    estimated,
    rows_to_code,
    train_codec,
)
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
    plain = PatchCodec(np.arange(64).reshape(8, 8), _plain_centroids(sample, 8), 0.0)
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


def window_means(height: int, width: int, sizes: tuple[int, ...], dims: int = 48) -> list[torch.Tensor]:
    """Unit rows of window means of a random field, as patch descriptors are, for each size."""
    field = torch.randn(1, dims, height, width, generator=torch.Generator().manual_seed(0))
    return [F.normalize(F.avg_pool2d(field, size, 1)[0].flatten(1).T, dim=1) for size in sizes]


def likeness(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean cosine of unit rows."""
    return float((first * second).sum(dim=1).mean())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([(4, 5, 6), (2, 5, 8), (3,), (9, 4)]), st.floats(0, 0.9))
def test_estimates_are_those_of_kriging(height, width, sizes, error):
    """By definition: (correlation among the coded patches + noise) · weights = their correlation with the others."""
    grids = [PatchGrid(height, width, size) for size in sizes]
    coded = coded_grids(grids)
    assert bool(coded) == any(len(grid) for grid in grids)
    descriptors = [unit_rows(len(grid), 5, place) for place, grid in enumerate(grids)]
    rows = dict(zip(coded, rows_to_code(descriptors, grids), strict=True))
    for grid in filter(len, grids):
        other = coded_for(grid, coded)
        known, wanted = ([(r, c) for r in range(g.rows) for c in range(g.columns)] for g in (other, grid))

        def shared(first, one, second, two):
            sides = (
                max(
                    0,
                    min(one.stride * a + one.patch_size, two.stride * b + two.patch_size)
                    - max(one.stride * a, two.stride * b),
                )
                for a, b in zip(first, second, strict=True)
            )
            return np.prod(list(sides)) / (one.patch_size * two.patch_size)

        among = np.array([[shared(a, other, b, other) for b in known] for a in known])
        across = np.array([[shared(a, grid, b, other) for b in known] for a in wanted])
        noise = error / (1 - error) + 0.02
        weights = np.linalg.solve(among + noise * np.eye(len(known)), across.T).T
        expected = F.normalize(torch.from_numpy(weights).float() @ rows[other], dim=1)
        torch.testing.assert_close(estimated(rows[other], other, grid, error), expected, atol=2e-4, rtol=0)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True), st.integers(1, 14), st.integers(1, 3))
def test_every_patch_has_a_coded_grid_of_about_its_size(sizes, side, stride):
    grids = [PatchGrid(side, side + 1, size, stride) for size in sizes]
    coded = coded_grids(grids)
    for grid in filter(len, grids):
        other = coded_for(grid, coded)
        assert 1 / 1.5 <= other.patch_size / grid.patch_size <= 1.5
        assert other.stride % stride == 0 and 0 < len(other) <= len(
            next(g for g in grids if g.patch_size == other.patch_size)
        )
    descriptors = [unit_rows(len(grid), 3, place) for place, grid in enumerate(grids)]
    for rows, other in zip(rows_to_code(descriptors, grids), coded, strict=True):
        whole = descriptors[sizes.index(other.patch_size)]
        columns = grids[sizes.index(other.patch_size)].columns
        places = [
            r * other.stride // stride * columns + c * other.stride // stride
            for r in range(other.rows)
            for c in range(other.columns)
        ]
        assert torch.equal(rows, whole[places])


def test_which_patches_are_coded():
    """The figures of docs/scale.md."""
    bundled = coded_grids([PatchGrid(30, 40, size) for size in (4, 5, 6)])
    assert [(grid.patch_size, grid.stride, len(grid)) for grid in bundled] == [(5, 2, 234)]
    paper = coded_grids([PatchGrid(30, 40, size) for size in (2, 5, 8)])
    assert [(grid.patch_size, grid.stride, len(grid)) for grid in paper] == [(2, 1, 1131), (5, 2, 234), (8, 3, 88)]


def test_patches_that_do_not_overlap_are_left_alone():
    rows, grid = unit_rows(4, 5), PatchGrid(4, 4, 2, 2)
    torch.testing.assert_close(estimated(rows, grid, grid, 0.5), rows)


def test_coding_few_patches_well_is_better_than_all_badly():
    """At equal bytes, with windows of a random field, all of three sizes estimated from every fourth of one."""
    grids = [PatchGrid(24, 24, size) for size in (4, 5, 6)]
    given_ = window_means(24, 24, (4, 5, 6))
    sample = torch.cat(window_means(40, 40, (4, 5, 6)))
    few, all_ = train_codec(sample, 24), train_codec(sample, 2)
    decoded = [few.decode(few.encode(rows)) for rows in rows_to_code(given_, grids)]
    assert sum(map(len, decoded)) * few.num_bytes <= sum(map(len, given_)) * all_.num_bytes
    estimates = few.estimate(decoded, coded_grids(grids), grids)
    for rows, own in zip(given_, estimates, strict=True):
        assert likeness(own, rows) > likeness(all_.decode(all_.encode(rows)), rows) + 0.1


def test_a_codec_knows_its_error():
    sample, rows = unit_rows(20000, 32, 0, 0.5), unit_rows(500, 32, 1, 0.5)
    for num_bytes in (2, 8):
        codec = train_codec(sample, num_bytes)
        assert codec.error == pytest.approx(1 - likeness(codec.decode(codec.encode(rows)), rows) ** 2, abs=0.05)
