"""A drawing board in metres, and the walls and pavements that are laid on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.floating]
Colour = tuple[int, ...]  # red, green, blue 0..255; a fourth number is an opacity

# course height, block length and joint (metres), spread of block shades, tone of the joint
MATERIALS = {
    "brick": (0.11, 0.3, 0.016, 0.1, 1.18),
    "stone": (0.42, 0.85, 0.025, 0.06, 0.78),
    "boards": (0.22, 90.0, 0.03, 0.04, 0.72),
    "plaster": (90.0, 90.0, 0.0, 0.0, 1.0),
    "asphalt": (0.08, 0.08, 0.0, 0.07, 1.0),
    "slabs": (0.7, 0.7, 0.03, 0.07, 0.75),
}


def noise(rng: np.random.Generator, rows: int, columns: int, cell: float, octaves: int = 3) -> Array:
    """Smooth noise, rows×columns, standard deviation about 0.5; ``cell`` is its coarsest grain in pixels."""
    total = np.zeros((rows, columns), np.float32)
    for octave in range(octaves):
        grain = max(1.0, cell / 2**octave)
        grid = rng.standard_normal((int(rows / grain) + 2, int(columns / grain) + 2)).astype(np.float32)
        total += cv2.resize(grid, (columns, rows), interpolation=cv2.INTER_CUBIC) / 2**octave
    return total / 2


def _masonry(rng: np.random.Generator, material: str, colour: Colour, rows: int, columns: int, scale: float) -> Array:
    """A wall or pavement, rows×columns×3 0..255, of shaded blocks in courses, with stains."""
    course_height, length, joint, spread, tone = MATERIALS[material]
    z, x = np.arange(rows)[:, None] / scale + 0.01, np.arange(columns)[None] / scale
    course = np.floor(z / course_height).astype(int)
    x = x + length / 2 * (course % 2)
    block = np.floor(x / length).astype(int)
    shade = 1 + spread * rng.standard_normal(997)[(course * 57 + block * 131) % 997]
    joints = (z % course_height < joint) | (x % length < joint)
    shade = np.where(joints, tone, shade) + 0.045 * noise(rng, rows, columns, 1.6 * scale, 5)
    return np.clip(shade[..., None] * np.array(colour), 0, 255)


def tint(colour: Colour, factor: float) -> Colour:
    return tuple(int(min(255, channel * factor)) for channel in colour[:3])


class Sheet:
    """A drawing board in metres, x from ``left`` on, z upwards; a translucent colour only tints what is there."""

    def __init__(self, left: float, width: float, height: float, scale: float) -> None:
        # Multiples of 8 pixels: three exact halvings.
        self.size = (math.ceil(width * scale / 8) * 8, math.ceil(height * scale / 8) * 8)
        self.left, self.scale = left, scale
        self.image, self.cover = Image.new("RGB", self.size), Image.new("L", self.size)
        self._draw, self._mask = ImageDraw.Draw(self.image, "RGBA"), ImageDraw.Draw(self.cover)
        self.windows: list[tuple[float, float, float, float]] = []

    def pixels(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [((x - self.left) * self.scale, self.size[1] - z * self.scale) for x, z in points]

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        corners = self.pixels(*points)
        self._draw.polygon(corners, colour)
        if len(colour) == 3:
            self._mask.polygon(corners, 255)

    def box(self, x: float, z: float, width: float, height: float, colour: Colour) -> None:
        (left, bottom), (right, top) = self.pixels((x, z), (x + width, z + height))
        corners = (
            round(left),
            round(top),
            max(round(left), round(right) - 1),
            max(round(top), round(bottom) - 1),
        )
        self._draw.rectangle(corners, colour)
        if len(colour) == 3:
            self._mask.rectangle(corners, 255)

    def ellipse(self, x: float, z: float, radius_x: float, radius_z: float, colour: Colour) -> None:
        (left, bottom), (right, top) = self.pixels((x - radius_x, z - radius_z), (x + radius_x, z + radius_z))
        self._draw.ellipse((left, top, right, bottom), colour)
        if len(colour) == 3:
            self._mask.ellipse((left, top, right, bottom), 255)

    def text(self, x: float, z: float, height: float, width: float, words: str, colour: Colour) -> None:
        """Words centred at (x, z), no higher and no wider than told."""
        size = min(height, width / (0.68 * len(words))) * self.scale
        font = ImageFont.load_default(max(4.0, size))
        self._draw.text(self.pixels((x, z))[0], words, colour, font, "mm", stroke_width=size / 40)

    def masonry(
        self,
        rng: np.random.Generator,
        x: float,
        z: float,
        width: float,
        height: float,
        material: str,
        colour: Colour,
    ) -> None:
        (left, bottom), (right, top) = self.pixels((x, z), (x + width, z + height))
        left, right, top, bottom = round(left), round(right), round(top), round(bottom)
        wall = _masonry(rng, material, colour, bottom - top, right - left, self.scale)
        self.image.paste(Image.fromarray(wall.astype(np.uint8)), (left, top))
        self._mask.rectangle((left, top, right - 1, bottom - 1), 255)

    def lights(self, rng: np.random.Generator, low: float, high: float) -> tuple[Array, Array, Array]:
        """At half size, 0..255: what shines at dusk (lit windows behind bars and curtains), the bare light of the
        windows, and the board itself, premultiplied. Shop windows are lit with chance ``low``, others ``high``.
        """
        board = Sheet(self.left, 1, 1, self.scale / 2)
        board.size = (self.size[0] // 2, self.size[1] // 2)
        board.image = Image.new("RGB", board.size)
        board._draw = ImageDraw.Draw(board.image)
        for x, z, width, height in self.windows:
            warm = ((255, 206, 130), (255, 190, 104), (250, 224, 176), (214, 226, 240))[int(rng.integers(13)) // 4]
            level = rng.uniform(0.55, 1.0)
            for strip in range(6 if rng.random() < (low if z < 1 else high) else 0):
                shine = tint(warm, level * (0.7 + 0.06 * strip))
                board.box(x, z + height * strip / 6, width, height / 6 + 0.03, shine)
        front = cv2.resize(self.premultiplied(), board.size, interpolation=cv2.INTER_AREA).astype(np.float32)
        light = np.asarray(board.image, np.float32)
        return light * np.clip(0.35 + front[..., :3] / 232, 0, 1), light, front

    def premultiplied(self) -> NDArray[np.uint8]:
        alpha = np.asarray(self.cover)[..., None]
        return np.concatenate([np.asarray(self.image) * (alpha > 0).astype(np.uint8), alpha], axis=2)
