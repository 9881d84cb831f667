"""Small pictures to embed in a page, whose bytes stay within a budget."""

import io
from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from patchnetvlad.errors import UserError
from patchnetvlad.images import read_image

SIDES = (320, 240, 176, 128, 96, 64)  # longest side in pixels, the largest that fits is taken
_QUALITY = 72
_SAMPLE = 24  # pictures that the size of all is estimated from


def thumbnails(
    paths: Sequence[Path], budget: int, exif_rotation: bool = False, progress: bool = False
) -> tuple[list[str | None], list[float]]:
    """WebP pictures in base64, and the pictures' own width / height; None and 1 for one that cannot be read.

    budget: characters of all together, kept by the choice of their size (the smallest has 64 pixels).
    """

    def make(path_and_side: tuple[Path, int]) -> tuple[str | None, float]:
        return _thumbnail(*path_and_side, exif_rotation)

    with ThreadPoolExecutor(4) as pool:
        chosen = np.unique(np.linspace(0, len(paths) - 1, min(_SAMPLE, len(paths))).round().astype(int))
        side = SIDES[-1]
        for candidate in SIDES:
            sample = list(pool.map(make, [(paths[index], candidate) for index in chosen]))
            expected = sum(len(webp or "") for webp, _ in sample) / max(1, len(sample)) * len(paths)
            if expected <= budget:
                side = candidate
                break
        distinct = list(dict.fromkeys(paths))
        all_made = pool.map(make, [(path, side) for path in distinct])
        bar = tqdm(all_made, "Thumbnails", len(distinct), unit="img", disable=not progress)
        made = dict(zip(distinct, bar, strict=True))
    return [made[path][0] for path in paths], [round(made[path][1], 4) for path in paths]


def _thumbnail(path: Path, side: int, exif_rotation: bool) -> tuple[str | None, float]:
    try:
        picture = read_image(path, exif_rotation)
    except UserError:
        return None, 1.0
    aspect = picture.width / picture.height
    picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=_QUALITY, method=4)
    return b64encode(file.getvalue()).decode("ascii"), aspect
