"""Fusion of patch sizes and the ranking it makes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from patchnetvlad.config import MATCHERS
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.matching import Matcher
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.rapid_spatial import rapid_spatial_score
from patchnetvlad.reranking import collect_scores, fuse, reorder, rerank, score_pair, weighted_sum

RANSAC, RAPID = MATCHERS["RANSAC"], MATCHERS["spatialApproximator"]
WEIGHTS = (0.45, 0.15, 0.4)


def rerank_these(query, candidates, *options, **named):
    return rerank(query, range(len(candidates)), candidates.__getitem__, *options, **named)


def picture(seed: int, height: int = 7, width: int = 9, noise_seed: int | None = None) -> PatchFeatures:
    """Random unit descriptors at two patch sizes; with noise_seed a disturbed copy of the picture of that seed."""
    grids = (PatchGrid(height, width, 2), PatchGrid(height, width, 4))
    generator = torch.Generator().manual_seed(seed)
    descriptors = [torch.randn(len(grid), 12, generator=generator) for grid in grids]
    if noise_seed is not None:
        noise = torch.Generator().manual_seed(noise_seed)
        descriptors = [d + 0.8 * torch.randn(d.shape, generator=noise) for d in descriptors]
    return PatchFeatures(tuple(F.normalize(d, dim=1) for d in descriptors), grids)


@pytest.mark.parametrize("matcher", ["ransac", "spatial"])
def test_fusion_of_the_published_scores(reference, matcher):
    fused = fuse(-reference[f"{matcher}_scores"][0], WEIGHTS)
    np.testing.assert_allclose(fused, -reference[f"fused_{matcher}_row0"], rtol=0, atol=1e-6)


def test_fusion_on_paper():
    # z of (1, 2, 3) is (−√1.5, 0, √1.5)
    fused = fuse(np.array([[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]]), (2.0, 5.0))
    np.testing.assert_allclose(fused, [-2 * 1.5**0.5, 0, 2 * 1.5**0.5])


def test_equal_candidates_and_a_single_one_contribute_nothing():
    assert fuse(np.full((4, 3), 0.1), WEIGHTS).tolist() == [0, 0, 0, 0]
    assert fuse(np.array([[0.1 + 0.2], [0.3]]), [1]).tolist() == [0, 0]  # equal but for rounding
    assert fuse(np.array([[3.0, 1.0, 2.0]]), WEIGHTS).tolist() == [0]
    assert fuse(np.empty((0, 3)), WEIGHTS).shape == (0,)


@settings(deadline=None)
@given(
    arrays(
        "float64",
        array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=True),
    )
)
def test_fusion_is_finite_and_keeps_ties(scores):
    weights = [1.0] * scores.shape[1]
    fused = fuse(scores, weights)
    assert np.isfinite(fused).all()
    assert abs(fused.sum()) < 1e-6
    twice = fuse(np.repeat(scores, 2, axis=0), weights)
    assert (twice[::2] == twice[1::2]).all()


@settings(deadline=None)
@given(
    arrays("float64", (5, 2), elements=st.integers(-50, 50)),
    st.sampled_from([0.5, 2.0, 1024.0]),
    st.integers(-9, 9),
)
def test_fusion_does_not_depend_on_units(scores, scale, offset):
    np.testing.assert_allclose(fuse(scores * scale + offset, (0.7, 0.3)), fuse(scores, (0.7, 0.3)), atol=1e-12)


@pytest.mark.parametrize("matcher", list(MATCHERS.values()))
@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_the_same_place_comes_first(matcher, batch_size):
    query = picture(1)
    candidates = [picture(2), picture(3, 6, 11), picture(1, noise_seed=7), picture(4)]
    result = rerank_these(query, candidates, (0.6, 0.4), matcher, batch_size)
    assert result.order[0] == 2
    assert result.order.dtype == np.int64
    assert sorted(result.order) == [0, 1, 2, 3]
    assert (np.diff(result.fused[result.order]) <= 0).all()
    for row, candidate in enumerate(candidates):
        pair = score_pair(query, candidate, matcher)
        assert [score.value for score in pair.scores] == pytest.approx(result.per_scale[row])
        assert [len(score.inliers) for score in pair.scores] == [len(matches) for matches in pair.matches]
    np.testing.assert_array_equal(result.fused, fuse(result.per_scale, (0.6, 0.4)))


@pytest.mark.parametrize("matcher", [RANSAC, MATCHERS["spatialSimilarity"]])
def test_candidates_scored_together_score_as_alone(matcher):
    query, candidates = picture(1), [picture(seed, 8 + seed, 10) for seed in range(6)]
    alone = rerank_these(query, candidates, (0.6, 0.4), matcher)
    together = rerank_these(query, candidates, (0.6, 0.4), matcher, batch_size=4)
    np.testing.assert_array_equal(alone.per_scale, together.per_scale)
    assert (alone.per_scale > 0).any()


def test_ties_keep_the_retrieval_order():
    same = picture(5)
    result = rerank_these(picture(1), [same, picture(1), same, same], (0.6, 0.4), RAPID)
    assert result.order.tolist() == [1, 0, 2, 3]


def test_few_candidates_and_empty_pictures():
    query = picture(1)
    assert rerank_these(query, [], (0.6, 0.4), RANSAC).order.tolist() == []
    assert rerank_these(query, [], (0.6, 0.4), RANSAC).per_scale.shape == (0, 2)
    single = rerank_these(query, [query], (0.6, 0.4), RANSAC)
    assert (single.order.tolist(), single.fused.tolist()) == ([0], [0.0])
    tiny = picture(2, 3, 3)  # too small for patches of size 4
    assert len(tiny.grids[1]) == 0
    for batch_size in (1, 3):
        result = rerank_these(query, [tiny, query, tiny], (0.6, 0.4), RAPID, batch_size)
        assert result.order.tolist() == [1, 0, 2]
        assert np.isfinite(result.fused).all()


def test_candidates_are_held_a_batch_at_a_time():
    requested = []

    def load(seed):
        requested.append(seed)
        return picture(seed)

    seen_at_score = []

    def matcher(matches, query_grid, reference_grid):
        seen_at_score.append(len(requested))
        return rapid_spatial_score(matches, query_grid, reference_grid)

    rerank(picture(1), range(5), load, (0.6, 0.4), Matcher(matcher), batch_size=2)
    assert seen_at_score == [2, 2, 2, 2, 4, 4, 4, 4, 5, 5]


def test_weighted_sum_of_two_pictures():
    query = picture(1)
    xmax, ymax = query.grids[0].max_index
    larger, smaller = xmax**2 + ymax**2, (xmax - 2) ** 2 + (ymax - 2) ** 2
    pair = score_pair(query, query, RAPID)
    assert weighted_sum(pair.scores, (0.6, 0.4)) == pytest.approx(0.6 * larger + 0.4 * smaller)


def test_pictures_with_other_patch_sizes_are_refused():
    query = picture(1)
    fewer = PatchFeatures(query.descriptors[:1], query.grids[:1])
    for batch_size in (1, 2):
        with pytest.raises((ValueError, IndexError)):
            rerank_these(query, [fewer, fewer], (0.6, 0.4), RANSAC, batch_size)


def test_the_rest_stays_behind_in_retrieval_order():
    assert reorder(np.array([40, 30, 20, 10, -1]), np.array([2, 0, 1])).tolist() == [20, 40, 30, 10, -1]


def test_scores_of_all_queries_are_in_final_order():
    query = picture(1)
    first = rerank_these(query, [picture(2), query], (0.6, 0.4), RAPID)
    second = rerank_these(query, [query], (0.6, 0.4), RAPID)
    scores = collect_scores(np.array([[8, 9, 3], [7, -1, -1]]), [first, second], (2, 4), "spatialApproximator")
    assert scores.indices.tolist() == [[9, 8], [7, -1]]
    np.testing.assert_array_equal(scores.fused, [first.fused[::-1], [0, 0]])
    np.testing.assert_array_equal(scores.per_scale[0], first.per_scale[::-1])
    np.testing.assert_array_equal(scores.per_scale[1], [second.per_scale[0], [0, 0]])


@given(st.integers(0, 120), st.integers(1, 5), st.integers(1, 8))
def test_threads_that_share_candidates_end_together(count, batch_size, threads):
    """Whoever is free takes the next batch, as threads do: all are busy until little more than a pair is left."""
    batches = []

    def run(score, indices):
        batches.extend(map(list, indices))
        return [[[0.0]] * len(batch) for batch in batches]

    query = PatchFeatures((torch.ones(1, 2),), (PatchGrid(1, 1, 1),))
    rerank(query, range(count), None, (1.0,), RAPID, batch_size, run, threads)
    assert [index for batch in batches for index in batch] == list(range(count))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    if threads == 1:
        assert len(batches) == -(-count // batch_size)
    done = [0] * threads
    for batch in batches:
        done[done.index(min(done))] += len(batch)
    assert threads == 1 or max(done) - min(done) <= 1
