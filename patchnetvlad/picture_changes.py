"""What may change between two pictures of one place, each by an amount: for training, and to measure robustness."""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""H×W×3, RGB."""

Change = Callable[[Picture, float, np.random.Generator], Picture]
"""A picture, an amount from 0 (nothing changes) to 1, random numbers → a picture of the same size."""

FIELD_OF_VIEW = 64.0  # degrees across the picture's width, assumed of a camera that turns
_TURN = 30.0  # degrees, about the vertical axis
_ROLL = 30.0  # degrees, about the optical axis
_ZOOM = 2.0  # factor
_DARKEST = 0.1  # share of the light that is left
_BLUR = 4.0  # pixels of a picture 640 wide: standard deviation of the Gaussian
_NOISE = 40.0  # grey levels of 255: standard deviation
_COVERED = 0.5  # share of the picture
_CHANCE = 0.35  # that a change happens to a picture in training
_QUALITY = (95, 3)  # of JPEG, at amounts 0 and 1


def turn_homography(degrees: float, width: int, height: int) -> NDArray[np.float64]:
    """3×3, from the pixels of a picture to those of the same camera turned to the right about its vertical axis."""
    focal = width / 2 / math.tan(math.radians(FIELD_OF_VIEW) / 2)
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])
    angle = math.radians(degrees)
    rotation = np.array([[math.cos(angle), 0, -math.sin(angle)], [0, 1, 0], [math.sin(angle), 0, math.cos(angle)]])
    return intrinsics @ rotation @ np.linalg.inv(intrinsics)


def roll_homography(degrees: float, factor: float, width: int, height: int) -> NDArray[np.float64]:
    """3×3 that turns a picture clockwise about its middle, and enlarges it by a factor."""
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, factor)
    return np.vstack([matrix, (0.0, 0.0, 1.0)])


def turn(picture: Picture, amount: float, rng: np.random.Generator) -> Picture:
    """The camera turns to the left or right by up to 30°: part of the view goes, what comes in is mirrored."""
    return _warped(picture, _turned(amount, rng, picture.shape[1], picture.shape[0]))


def roll(picture: Picture, amount: float, rng: np.random.Generator) -> Picture:
    """The camera is held askew by up to 30° to either side."""
    return _warped(picture, _rolled(amount, rng, picture.shape[1], picture.shape[0]))


def zoom(picture: Picture, amount: float, rng: np.random.Generator) -> Picture:
    """The middle of the picture, enlarged by up to 2."""
    return _warped(picture, _zoomed(amount, rng, picture.shape[1], picture.shape[0]))


def darkness(picture: Picture, amount: float, rng: np.random.Generator) -> Picture:
    """Dusk: little, bluish light, shadows that drown, a lamp somewhere, and the noise of a long exposure."""
    height, width = picture.shape[:2]
    light = (picture.astype(np.float32) / 255) ** (1 + 0.8 * amount)
    tint = 1 - amount * np.array([0.25, 0.15, 0.0], dtype=np.float32)
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    lamp = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * (0.3 * width) ** 2))
    level = _DARKEST**amount * (1 + amount * 2 * lamp)
    dark = light * tint * level[..., None] * 255
    return _clipped(dark + amount * 2.0 * rng.standard_normal(picture.shape, dtype=np.float32))


def blur(picture: Picture, amount: float, rng: np.random.Generator) -> Picture:
    """Out of focus: a Gaussian of up to 4 pixels for a picture 640 wide."""
    sigma = amount * _BLUR * picture.shape[1] / 640
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma), dtype=np.uint8) if sigma > 0 else picture


def noise(picture: Picture, amount: float, rng: np.random.Generator) -> Picture:
    """Gaussian noise of up to 40 grey levels, of every channel."""
    return _clipped(picture + amount * _NOISE * rng.standard_normal(picture.shape, dtype=np.float32))


def occlusion(picture: Picture, amount: float, rng: np.random.Generator) -> Picture:
    """Boxes of one colour each stand before up to half of the picture."""
    height, width = picture.shape[:2]
    covered, wanted = np.zeros((height, width), dtype=bool), amount * _COVERED * height * width
    changed = picture.copy()
    while (missing := wanted - covered.sum()) >= 1:
        area = min(missing, rng.uniform(0.02, 0.15) * height * width)
        box_height = int(np.clip(round(math.sqrt(area * rng.uniform(0.4, 2.5))), 1, height))
        box_width = int(np.clip(round(area / box_height), 1, width))
        top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
        box = np.s_[top : top + box_height, left : left + box_width]
        changed[box] = rng.integers(256, size=3)
        covered[box] = True
    return changed


def jpeg(picture: Picture, amount: float, rng: np.random.Generator) -> Picture:
    """Compressed to JPEG, down to quality 3."""
    if amount <= 0:
        return picture
    quality = round(_QUALITY[0] + amount * (_QUALITY[1] - _QUALITY[0]))
    _, encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert decoded is not None  # it was encoded here
    return np.ascontiguousarray(decoded[..., ::-1], dtype=np.uint8)


def changed(picture: Picture, changes: Sequence[Change], rng: np.random.Generator) -> Picture:
    """A picture changed for training: each change in turn with a chance of 0.35, by any amount.

    What moves pixels happens first and at once, so that the picture is resampled only once.
    """
    height, width = picture.shape[:2]
    homography = changed_view(changes, rng, width, height)
    if not np.array_equal(homography, np.eye(3)):
        picture = _warped(picture, homography)
    for change in changes:
        if change not in _MOVES and rng.random() < _CHANCE:
            picture = change(picture, rng.uniform(0, 1), rng)
    return picture


def changed_view(changes: Sequence[Change], rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    """How `changed` moves the pixels of a picture, given the same random numbers: a homography, 3×3."""
    homography = np.eye(3)
    for change in changes:
        if change in _MOVES and rng.random() < _CHANCE:
            homography = _MOVES[change](rng.uniform(0, 1), rng, width, height) @ homography
    return homography


def _turned(amount: float, rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    return turn_homography(_side(rng) * amount * _TURN, width, height)


def _rolled(amount: float, rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    return roll_homography(_side(rng) * amount * _ROLL, 1.0, width, height)


def _zoomed(amount: float, rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    return roll_homography(0.0, _ZOOM**amount, width, height)


# Changes that move pixels, and by which homography
_MOVES: dict[Change, Callable[[float, np.random.Generator, int, int], NDArray[np.float64]]] = {
    turn: _turned,
    roll: _rolled,
    zoom: _zoomed,
}


def _warped(picture: Picture, homography: NDArray[np.float64]) -> Picture:
    size = picture.shape[1], picture.shape[0]
    warped = cv2.warpPerspective(picture, homography, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(warped, dtype=np.uint8)


def _side(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _clipped(values: NDArray[np.floating]) -> Picture:
    return np.clip(values, 0, 255).round().astype(np.uint8)
