"""Scores without sampling: how much the displacements of all matches agree (paper section 3.4), and how alike matched
patches are."""

import torch
from torch import Tensor

from patchnetvlad.matching import Matcher, Matches, Score
from patchnetvlad.patch_grid import PatchGrid

TOLERANCE = 1.5  # patch pitches from the mean displacement; only marks inliers, the scores do not use it
UNLIKE = 0.01  # share of the query's patches that count as matched to nothing like them


def rapid_spatial_score(matches: Matches, query_grid: PatchGrid, reference_grid: PatchGrid) -> Score:
    """Sum over matches of (xmax − |dx − mean dx|)² + (ymax − |dy − mean dy|)², divided by all query patches.

    d is a match's displacement, reference minus query grid index; xmax and ymax are the largest grid indices of the
    query. Perfect agreement of all patches scores xmax² + ymax²; no matches score 0. Inliers, for figures, are the
    matches whose displacement lies within 1.5 patch pitches of the mean, the distance RANSAC tolerates.
    """
    if len(matches) == 0:
        return _nothing()
    deviation = _deviation(matches, query_grid, reference_grid)
    extent = torch.tensor(query_grid.max_index, dtype=torch.float64)
    value = float((extent - deviation).square().sum()) / len(query_grid)
    return Score(value, _agreeing(deviation, query_grid))


def mean_similarity_score(matches: Matches, query_grid: PatchGrid, reference_grid: PatchGrid) -> Score:
    """Mean similarity of matched patches, where UNLIKE of the query's patches count as further matches of similarity 0.

    These keep a few matches of almost empty pictures, however alike, from being worth as much as many. Places that
    are built alike give as many matches as the true one, in as good an order, but less alike ones. 1 is all but
    reached by identical pictures; no matches score 0. Inliers, for figures, are those of `rapid_spatial_score`.
    """
    if len(matches) == 0:
        return _nothing()
    assert matches.similarity is not None
    total = float(matches.similarity.clamp(min=0).sum())
    deviation = _deviation(matches, query_grid, reference_grid)
    return Score(total / (len(matches) + UNLIKE * len(query_grid)), _agreeing(deviation, query_grid))


def _nothing() -> Score:
    return Score(0.0, torch.zeros(0, dtype=torch.bool))


def _deviation(matches: Matches, query_grid: PatchGrid, reference_grid: PatchGrid) -> Tensor:
    """How far each match's displacement is from the mean of all, M×2; whole numbers, so only the mean is rounded."""
    displacement = (reference_grid.indices()[matches.reference] - query_grid.indices()[matches.query]).double()
    return (displacement - displacement.mean(dim=0)).abs()


def _agreeing(deviation: Tensor, query_grid: PatchGrid) -> Tensor:
    return deviation.square().sum(dim=1).sqrt() <= TOLERANCE * query_grid.stride


RAPID_SPATIAL = Matcher(rapid_spatial_score, meaning="likeness of all matches' shifts, inliers or not")
MEAN_SIMILARITY = Matcher(mean_similarity_score, meaning="mean likeness of matched patches", weighs_likeness=True)
