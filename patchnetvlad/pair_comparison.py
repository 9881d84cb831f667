"""Two compared pictures as figures and programs take them: in pixels of the pictures as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.reranking import PairScore


@dataclass(frozen=True)
class MatchedPair:
    """What a figure shows: both pictures, as files' own pixels, and how their patches match.

    grids: one for each patch size, in pixels of the resized pictures; size: (height, width) they were resized to, or
    None when they kept their own; names: what to call them in the figure; meaning: of a score, in a few words.
    """

    query: Image.Image
    reference: Image.Image
    query_grids: Sequence[PatchGrid]
    reference_grids: Sequence[PatchGrid]
    pair: PairScore
    size: tuple[int, int] | None = None
    names: tuple[str, str] = ("query", "reference")
    meaning: str = ""

    def points(self, scale: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres of the matched patches of one patch size, M×2 (x, y) in pixels of each picture as it is."""
        matches = self.pair.matches[scale]
        ends = (
            (self.query_grids[scale].centers()[matches.query.cpu()], self.query),
            (self.reference_grids[scale].centers()[matches.reference.cpu()], self.reference),
        )
        query, reference = ((points.double().numpy() + 0.5) * self._factor(picture) - 0.5 for points, picture in ends)
        return query, reference

    def homography(self, scale: int) -> NDArray[np.float64] | None:
        """3×3 from pixels of the reference to pixels of the query, each as it is; None where the matcher has none."""
        between_resized = self.pair.scores[scale].homography
        if between_resized is None:
            return None
        to_query, to_reference = (self._from_resized(picture) for picture in (self.query, self.reference))
        homography = to_query @ between_resized.double().numpy() @ np.linalg.inv(to_reference)
        return homography / homography[2, 2] if homography[2, 2] else homography

    def patch_sides(self, scale: int, picture: Image.Image) -> NDArray[np.float64]:
        """Width and height of a patch of one size in pixels of a picture as it is."""
        return self.query_grids[scale].patch_pixels * self._factor(picture)

    def _factor(self, picture: Image.Image) -> NDArray[np.float64]:
        """Pixels of the picture as it is for one of the resized picture, along x and y."""
        height, width = self.size or (picture.height, picture.width)
        return np.array([picture.width / width, picture.height / height])

    def _from_resized(self, picture: Image.Image) -> NDArray[np.float64]:
        x, y = self._factor(picture)  # pixel centres: ½ is added before scaling and taken away after
        return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])


def distinct_names(first: Path, second: Path) -> tuple[str, str]:
    """The names of two files, with as many of their folders as it takes to tell them apart."""
    segments = first.absolute().parts, second.absolute().parts
    for count in range(1, max(map(len, segments))):
        names = [Path(*path[-count:]).as_posix() for path in segments]
        if names[0] != names[1]:
            return names[0], names[1]
    return first.name, second.name
