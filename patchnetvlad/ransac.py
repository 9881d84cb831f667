"""Spatial score by a homography between matched patches (paper section 3.4)."""

import cv2
import torch

from patchnetvlad.matching import Matches
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.scores import Score

TOLERANCE = 1.5  # reprojection threshold in patch pitches
_FEWEST = 4  # matches that determine a homography


def ransac_score(matches: Matches, query_grid: PatchGrid, reference_grid: PatchGrid) -> Score:
    """Inliers of the best homography from reference to query patch centres, divided by all query patches: 0..1.

    An inlier is reprojected within 1.5 patch pitches (1.5·16·s pixels for VGG16 at stride s) of its query centre.
    Fewer than four matches, or matches that no homography fits, score 0 without inliers. The result depends on the
    matches alone: OpenCV's RANSAC starts from a seed of its own on every call.
    """
    nothing = Score(0.0, torch.zeros(len(matches), dtype=torch.bool))
    if len(matches) < _FEWEST:
        return nothing
    homography, mask = cv2.findHomography(
        reference_grid.centers()[matches.reference].numpy(),
        query_grid.centers()[matches.query].numpy(),
        cv2.RANSAC,
        TOLERANCE * query_grid.pitch_pixels,
    )
    if homography is None:
        return nothing
    inliers = torch.from_numpy(mask[:, 0].astype(bool))
    return Score(int(inliers.sum()) / len(query_grid), inliers, torch.from_numpy(homography))
