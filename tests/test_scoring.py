"""RANSAC and rapid spatial scores of matches whose answer is known on paper."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad.matching import Matches, Score
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.ransac import BLOCKS, SAMPLE, TOLERANCE, consensus, ransac_score, ransac_scores, samples_of
from patchnetvlad.rapid_spatial import rapid_spatial_score

SCORES = [ransac_score, rapid_spatial_score]


def identity(grid: PatchGrid) -> Matches:
    return Matches(torch.arange(len(grid)), torch.arange(len(grid)))


def shifted(grid: PatchGrid, columns: int, rows: int) -> Matches:
    """Each query patch matches the reference patch that many grid places further, where there is one."""
    place = torch.arange(len(grid)).reshape(grid.rows, grid.columns)
    query = place[max(0, -rows) : grid.rows - max(0, rows), max(0, -columns) : grid.columns - max(0, columns)]
    return Matches(query.flatten(), query.flatten() + rows * grid.columns + columns)


def none_of(count: int) -> Matches:
    return Matches(torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64))


@pytest.mark.parametrize("score", SCORES)
def test_no_matches_score_nothing(score):
    grid = PatchGrid(6, 8, 2)
    empty = PatchGrid(2, 2, 5)
    for query, reference in ((grid, grid), (empty, grid), (grid, empty), (empty, empty)):
        result = score(none_of(0), query, reference)
        assert result.value == 0.0
        assert result.inliers.shape == (0,) and result.inliers.dtype == torch.bool


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [2, 5])
def test_identical_pictures_score_as_the_published_implementation(size, stride, reference):
    grid = PatchGrid(30, 40, size, stride)
    rapid = rapid_spatial_score(identity(grid), grid, grid)
    ransac = ransac_score(identity(grid), grid, grid)
    xmax, ymax = grid.max_index
    assert rapid.value == xmax**2 + ymax**2
    assert ransac.value == 1.0
    assert rapid.inliers.all() and ransac.inliers.all()
    if stride == 1:
        scale = (2, 5, 8).index(size)
        assert rapid.value == -reference["spatial_scores"][0, 0, scale]
        assert ransac.value == -reference["ransac_scores"][0, 0, scale]


@settings(deadline=None)
@given(columns=st.integers(-5, 5), rows=st.integers(-4, 4), stride=st.integers(1, 3))
def test_a_shifted_view_keeps_full_agreement_of_what_is_left(columns, rows, stride):
    grid = PatchGrid(8 * stride, 10 * stride, 1, stride)
    matches = shifted(grid, columns, rows)
    left = (10 - abs(columns)) * (8 - abs(rows)) / 80
    xmax, ymax = grid.max_index
    assert rapid_spatial_score(matches, grid, grid).value == pytest.approx(left * (xmax**2 + ymax**2))
    ransac = ransac_score(matches, grid, grid)
    assert ransac.value == pytest.approx(left)
    shift = torch.tensor([-16.0 * stride * columns, -16.0 * stride * rows], dtype=torch.float64)
    torch.testing.assert_close(ransac.homography[:2, 2] / ransac.homography[2, 2], shift, atol=1e-3, rtol=1e-3)


def test_rapid_spatial_score_on_paper():
    grid = PatchGrid(3, 4, 1)  # xmax 3, ymax 2
    # displacements (1, 0), (1, 0), (−2, 1), (0, −1): mean (0, 0)
    matches = Matches(torch.tensor([0, 4, 2, 7]), torch.tensor([1, 5, 4, 3]))
    expected = (2 * ((3 - 1) ** 2 + 2**2) + ((3 - 2) ** 2 + (2 - 1) ** 2) + (3**2 + (2 - 1) ** 2)) / 12
    result = rapid_spatial_score(matches, grid, grid)
    assert result.value == pytest.approx(expected)
    assert result.inliers.tolist() == [True, True, False, True]  # (−2, 1) is √5 from the mean, more than 1.5
    assert result.homography is None


def test_rapid_spatial_score_of_grids_that_differ():
    query, reference = PatchGrid(3, 4, 1), PatchGrid(5, 6, 1)
    # patch 5 is (1, 1) of 4 columns, patch 8 is (2, 1) of 6 columns
    result = rapid_spatial_score(Matches(torch.tensor([5]), torch.tensor([8])), query, reference)
    assert result.value == pytest.approx((3**2 + 2**2) / 12)


def test_ransac_finds_the_homography_that_made_the_matches():
    geometry = EncoderGeometry()
    query, reference = PatchGrid(30, 40, 2, geometry=geometry), PatchGrid(26, 34, 2, geometry=geometry)
    truth = np.array([[0.9, 0.08, 25.0], [-0.06, 1.1, -12.0], [5e-5, -3e-5, 1.0]])
    mapped = cv2.perspectiveTransform(reference.centers().numpy()[None].astype(np.float64), truth)[0]
    place = np.rint((mapped - 15.5) / 16)  # of patch size 2, the centre of patch (0, 0) is 15.5
    inside = ((place >= 0) & (place < [query.columns, query.rows])).all(axis=1)
    columns, rows = place[inside].astype(int).T
    good_reference, good_query = np.flatnonzero(inside), rows * query.columns + columns
    rng = np.random.default_rng(0)
    wrong = 200
    matches = Matches(
        torch.from_numpy(np.concatenate([good_query, rng.integers(len(query), size=wrong)])),
        torch.from_numpy(np.concatenate([good_reference, rng.integers(len(reference), size=wrong)])),
    )
    result = ransac_score(matches, query, reference)
    assert result.inliers[: len(good_query)].all()
    assert result.value == int(result.inliers.sum()) / len(query)
    assert int(result.inliers[len(good_query) :].sum()) < 10
    found = cv2.perspectiveTransform(np.array([[[100.0, 100.0], [400.0, 300.0]]]), result.homography.numpy())
    expected = cv2.perspectiveTransform(np.array([[[100.0, 100.0], [400.0, 300.0]]]), truth)
    np.testing.assert_allclose(found, expected, atol=4)


def test_ransac_tolerance_follows_the_pitch_of_the_patches():
    matches = shifted(PatchGrid(20, 20, 1), 0, 0)
    moved = Matches(matches.query, matches.reference.clone())
    moved.reference[210] += 1  # one match of 400 is off by one patch: within 1.5 of them
    assert ransac_score(moved, PatchGrid(20, 20, 1), PatchGrid(20, 20, 1)).value == 1.0
    moved.reference[210] += 1  # by two: beyond
    assert ransac_score(moved, PatchGrid(20, 20, 1), PatchGrid(20, 20, 1)).value == 399 / 400
    strided = PatchGrid(60, 60, 1, 3)
    assert ransac_score(moved, strided, strided).value == 399 / 400


def test_ransac_needs_four_matches_that_span_a_plane():
    grid = PatchGrid(6, 8, 1)
    three = Matches(torch.arange(3), torch.arange(3))
    in_line = Matches(torch.arange(8), torch.arange(8))
    one_place = none_of(5)
    one_place.query.fill_(0)
    one_place.reference.fill_(0)
    for matches in (three, in_line, one_place):
        result = ransac_score(matches, grid, grid)
        assert (result.value, result.homography) == (0.0, None)
        assert result.inliers.tolist() == [False] * len(matches)


def test_ransac_depends_on_its_matches_alone():
    grid = PatchGrid(20, 20, 1)
    generator = torch.Generator().manual_seed(0)
    matches = Matches(torch.arange(150), torch.randint(0, 400, (150,), generator=generator))

    def run(seed: int) -> Score:
        cv2.setRNGSeed(seed)
        return ransac_score(matches, grid, grid)

    first = run(1)
    assert 0 < first.value < 1
    for seed in (1, 2, 3):
        again = run(seed)
        assert again.value == first.value
        assert torch.equal(again.inliers, first.inliers)
        assert torch.equal(again.homography, first.homography)


@settings(deadline=None)
@given(st.data())
def test_scores_are_finite_and_not_negative(data):
    grid, other = PatchGrid(4, 5, 2), PatchGrid(5, 4, 1)
    count = data.draw(st.integers(0, 12))
    query = data.draw(st.permutations(range(len(grid))))[:count]
    reference = data.draw(st.permutations(range(len(other))))[:count]
    matches = Matches(torch.tensor(query, dtype=torch.int64), torch.tensor(reference, dtype=torch.int64))
    for score in SCORES:
        result = score(matches, grid, other)
        assert 0 <= result.value < np.inf
        assert len(result.inliers) == count
    assert ransac_score(matches, grid, other).value <= 1


def partly_right(grid: PatchGrid, right: int, wrong: int, seed: int) -> Matches:
    """Matches of which some follow a mild homography, and the others nothing."""
    generator = torch.Generator().manual_seed(seed)
    place = grid.centers().double()
    truth = torch.tensor([[0.9, 0.05, 20.0], [-0.04, 1.05, -8.0], [3e-5, -2e-5, 1.0]], dtype=torch.float64)
    mapped = torch.cat([place, torch.ones(len(place), 1)], dim=1) @ truth.T
    nearest = torch.cdist(mapped[:, :2] / mapped[:, 2:], place).argmin(dim=1)
    reference = torch.randperm(len(grid), generator=generator)[: right + wrong]
    query = nearest[reference]
    query[right:] = torch.randint(len(grid), (wrong,), generator=generator)
    return Matches(query, reference)


def opencv_inliers(matches: Matches, grid: PatchGrid) -> int:
    points = (grid.centers()[side].numpy() for side in (matches.reference, matches.query))
    _, mask = cv2.findHomography(*points, cv2.RANSAC, TOLERANCE * grid.pitch_pixels)
    return int(mask.sum())


@pytest.mark.parametrize("right,wrong", [(100, 20), (60, 100), (30, 200), (0, 150), (4, 0), (12, 30)])
def test_ransac_finds_as_many_inliers_as_opencv(right, wrong):
    grid = PatchGrid(30, 40, 5)
    differences = []
    for seed in range(5):
        matches = partly_right(grid, right, wrong, seed)
        differences.append(int(ransac_score(matches, grid, grid).inliers.sum()) - opencv_inliers(matches, grid))
    # OpenCV may lose inliers when it refines its homography; no more than two are lost here.
    assert min(differences) >= -2
    assert np.median(np.abs(differences)) <= 2


def test_pairs_scored_together_score_as_alone():
    grids = [PatchGrid(30, 40, 5), PatchGrid(20, 25, 2), PatchGrid(30, 40, 3), PatchGrid(6, 8, 2)]
    matches = [partly_right(grids[0], 50, 60, 0), partly_right(grids[1], 30, 9, 1), partly_right(grids[2], 0, 90, 2)]
    matches.append(none_of(3))
    together = ransac_scores(matches, grids, grids, torch.device("cpu"))
    for found, grid, score in zip(matches, grids, together, strict=True):
        alone = ransac_score(found, grid, grid)
        assert torch.equal(score.inliers, alone.inliers) and score.value == alone.value
        if alone.homography is not None:
            torch.testing.assert_close(score.homography, alone.homography)
    assert ransac_scores([], [], [], torch.device("cpu")) == []


def test_a_consensus_is_what_its_homography_explains():
    grid = PatchGrid(30, 40, 5)
    matches = partly_right(grid, 80, 40, 3)
    source, target = (grid.centers()[side][None] / 16 for side in (matches.reference, matches.query))
    inliers, homography = consensus(source, target, torch.tensor([len(matches)]), TOLERANCE)
    mapped = torch.cat([source, torch.ones(1, len(matches), 1)], dim=2).double() @ homography.transpose(1, 2)
    distance = (mapped[..., :2] / mapped[..., 2:] - target).norm(dim=2)
    clear = (distance - TOLERANCE).abs() > 1e-3
    assert torch.equal(inliers[clear], (distance < TOLERANCE)[clear])
    assert int(inliers.sum()) >= 80 > SAMPLE


@pytest.mark.parametrize("count", [4, 5, 11, 64, 317, 1131, 5000])
def test_samples_are_the_first_four_different_draws_one_after_the_other(count):
    state, samples, sample = (1 << 64) - 1, [], []
    while len(samples) < sum(BLOCKS):
        state = (state & 0xFFFFFFFF) * 4164903690 + (state >> 32)  # OpenCV's generator
        match = (state & 0xFFFFFFFF) % count
        if match not in sample:
            sample.append(match)
        if len(sample) == SAMPLE:
            samples.append(sample)
            sample = []
    blocks = [samples_of(count, block)[0] for block in range(len(BLOCKS))]
    assert [block.shape[1] for block in blocks] == list(BLOCKS)
    assert torch.cat(blocks, dim=1).T.tolist() == samples
