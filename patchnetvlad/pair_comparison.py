"""Two pictures compared and made ready for a figure."""

from pathlib import Path

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
    matched = matched_pair(recognizer, first, second, first_description, second_description, comparison)
    return matched, comparison


def matched_pair(
    recognizer: PlaceRecognizer,
    query: NDArray[np.uint8] | Image.Image,
    reference: NDArray[np.uint8] | Image.Image,
    query_description: Description,
    reference_description: Description,
    comparison: Comparison,
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
    )
