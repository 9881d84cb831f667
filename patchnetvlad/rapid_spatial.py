"""Scores without sampling: how much the displacements of all matches agree (paper section 3.4), and how alike the
matched patches are beside."""

import torch

from patchnetvlad.matching import Matcher, Matches, Score
from patchnetvlad.patch_grid import PatchGrid

TOLERANCE = 1.5  # patch pitches from the mean displacement; only marks inliers, the scores do not use it
SHARPNESS = 8  # power of the mean similarity: it differs by a few hundredths where agreement differs by half


def rapid_spatial_score(matches: Matches, query_grid: PatchGrid, reference_grid: PatchGrid) -> Score:
    """Sum over matches of (xmax − |dx − mean dx|)² + (ymax − |dy − mean dy|)², divided by all query patches.

    d is a match's displacement, reference minus query grid index; xmax and ymax are the largest grid indices of the
    query. Perfect agreement of all patches scores xmax² + ymax²; no matches score 0. Inliers, for figures, are the
    matches whose displacement lies within 1.5 patch pitches of the mean, the distance RANSAC tolerates.
    """
    if len(matches) == 0:
        return Score(0.0, torch.zeros(0, dtype=torch.bool))
    # float64: grid indices are whole numbers, so only the mean is rounded
    displacement = (reference_grid.indices()[matches.reference] - query_grid.indices()[matches.query]).double()  # M×2
    deviation = (displacement - displacement.mean(dim=0)).abs()
    extent = torch.tensor(query_grid.max_index, dtype=torch.float64)
    value = float((extent - deviation).square().sum()) / len(query_grid)
    inliers = deviation.square().sum(dim=1).sqrt() <= TOLERANCE * query_grid.stride
    return Score(value, inliers)


def spatial_similarity_score(matches: Matches, query_grid: PatchGrid, reference_grid: PatchGrid) -> Score:
    """The rapid spatial score times the mean similarity of the matched patches to the power of SHARPNESS.

    Places that are built alike give about as many matches as the true one, in as good an order, but less alike ones.
    Similarities below 0 count as 0. Identical pictures score as by `rapid_spatial_score`, others less.
    """
    spatial = rapid_spatial_score(matches, query_grid, reference_grid)
    if len(matches) == 0:
        return spatial
    assert matches.similarity is not None
    likeness = float(matches.similarity.clamp(min=0).mean())
    return Score(spatial.value * likeness**SHARPNESS, spatial.inliers)


RAPID_SPATIAL = Matcher(rapid_spatial_score, meaning="likeness of all matches' shifts, inliers or not")
SPATIAL_SIMILARITY = Matcher(
    spatial_similarity_score, meaning="likeness of all matches' shifts and patches", weighs_likeness=True
)
