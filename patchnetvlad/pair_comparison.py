"""Two pictures compared and made ready for a figure or a program."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchnetvlad.figures import MatchedPair
from patchnetvlad.images import read_image
from patchnetvlad.recognizer import Comparison, Description, PlaceRecognizer


def compare_files(recognizer: PlaceRecognizer, query: Path, reference: Path) -> tuple[MatchedPair, Comparison]:
    """Describe and compare two picture files. Raises UserError for one that cannot be read."""
    upright = recognizer.config.feature_extract.exif_rotation
    first, second = read_image(query, upright), read_image(reference, upright)
    first_description, second_description = recognizer.describe([first, second])
    comparison = recognizer.compare(first_description, second_description)
    names = (query.name, reference.name)
    matched = matched_pair(recognizer, first, second, first_description, second_description, comparison, names)
    return matched, comparison


def matched_pair(
    recognizer: PlaceRecognizer,
    query: NDArray[np.uint8] | Image.Image,
    reference: NDArray[np.uint8] | Image.Image,
    query_description: Description,
    reference_description: Description,
    comparison: Comparison,
    names: tuple[str, str] = ("query", "reference"),
) -> MatchedPair:
    """What a figure of a compared pair needs."""
    size = recognizer.config.feature_extract
    resized = min(size.imageresizeh, size.imageresizew) > 0
    first, second = (
        picture if isinstance(picture, Image.Image) else Image.fromarray(picture) for picture in (query, reference)
    )
    return MatchedPair(
        first,
        second,
        query_description.patches.grids,
        reference_description.patches.grids,
        comparison.pair,
        (size.imageresizeh, size.imageresizew) if resized else None,
        names,
    )


def comparison_record(recognizer: PlaceRecognizer, matched: MatchedPair, comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain values for JSON; all coordinates are pixels of the pictures as they are.

    matches: [query x, query y, reference x, reference y, inlier] of each; homography: rows of the 3×3 from the
    reference to the query, null where the matcher has none.
    """
    scales = []
    for scale, (result, weight) in enumerate(
        zip(comparison.pair.scores, recognizer.config.feature_match.patchweights2use, strict=True)
    ):
        homography = matched.homography(scale)
        query, reference = (points.round(2).tolist() for points in matched.points(scale))
        inliers = result.inliers.tolist()
        scales.append(
            {
                "patch_size": matched.query_grids[scale].patch_size,
                "stride": matched.query_grids[scale].stride,
                "weight": weight,
                "score": result.value,
                "query_patches": len(matched.query_grids[scale]),
                "num_matches": len(inliers),
                "num_inliers": sum(inliers),
                "homography": None if homography is None else homography.tolist(),
                "matches": [
                    [*first, *second, inlier] for first, second, inlier in zip(query, reference, inliers, strict=True)
                ],
            }
        )
    return {
        "query": matched.names[0],
        "reference": matched.names[1],
        "score": comparison.score,
        "matcher": recognizer.config.feature_match.matcher,
        "scales": scales,
    }
