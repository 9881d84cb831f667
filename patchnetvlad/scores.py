"""What a matcher says of one pair of pictures at one patch size."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Spatial agreement of two pictures' matches; larger is better, 0 when nothing agrees.

    inliers: bool, one for each match; homography: 3×3 from reference to query pixels, or None where the matcher
    has none.
    """

    value: float
    inliers: Tensor
    homography: Tensor | None = None
