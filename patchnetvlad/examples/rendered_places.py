"""Street scenes drawn from seeds and seen by pinhole cameras, so that the geometry between views is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchnetvlad.examples.drawing_sheet import Array, Sheet, noise
from patchnetvlad.examples.place_drawings import OBJECTS, draw_building, draw_window

Mask = NDArray[np.bool_]
Size = tuple[int, int]  # width, height in pixels

HALF_STREET = 26.0  # metres drawn to either side of a place's middle
SUPERSAMPLING = 2  # rendered pixels along each axis of an output pixel


@dataclass(frozen=True)
class Camera:
    """A pinhole camera in a place's own metres: x along the facade (which is y = 0), y into it, z up.

    It stands at (x, −distance, height).
    """

    x: float = 0.0
    distance: float = 15.0
    height: float = 1.6
    yaw: float = 0.0  # degrees, to the right
    pitch: float = 7.0  # degrees, upwards
    field_of_view: float = 64.0  # degrees across the picture's width

    def matrix(self, size: Size) -> Array:
        """The 3×4 projection to pixels (x, y); whole numbers are pixel centres, (0, 0) the upper left one."""
        yaw, pitch = math.radians(self.yaw), math.radians(self.pitch)
        forward = np.array([math.sin(yaw) * math.cos(pitch), math.cos(yaw) * math.cos(pitch), math.sin(pitch)])
        right = np.array([math.cos(yaw), -math.sin(yaw), 0.0])
        rotation = np.stack([right, np.cross(forward, right), forward])
        focal = size[0] / 2 / math.tan(math.radians(self.field_of_view) / 2)
        intrinsics = np.array([[focal, 0, (size[0] - 1) / 2], [0, focal, (size[1] - 1) / 2], [0, 0, 1]])
        centre = np.array([self.x, -self.distance, self.height])
        return intrinsics @ np.column_stack([rotation, -rotation @ centre])

    def project(self, points: Array, size: Size) -> Array:
        """Pixels, N×2, of N×3 points in metres; the points must lie before the camera."""
        pixels = np.column_stack([points, np.ones(len(points))]) @ self.matrix(size).T
        return pixels[:, :2] / pixels[:, 2:]


@dataclass(frozen=True)
class Condition:
    """What changes between two visits to a place."""

    dusk: float = 0.0  # 0 day .. 1 dusk with lit windows
    occluders: int = 0  # vehicles and people before the facade
    noise: float = 0.0  # standard deviation of sensor noise, 8-bit levels
    blur: float = 0.0  # standard deviation in pixels of a picture 640 wide
    seed: int = 0  # of clouds, sun, lit windows and occluders


def facade_homography(camera_a: Camera, camera_b: Camera, size: Size, size_b: Size | None = None) -> Array:
    """The 3×3 homography of the facade plane from pixels of camera_a's picture to pixels of camera_b's."""
    plane_a = camera_a.matrix(size)[:, [0, 2, 3]]
    plane_b = camera_b.matrix(size_b or size)[:, [0, 2, 3]]
    homography = plane_b @ np.linalg.inv(plane_a)
    return homography / homography[2, 2]


@dataclass(frozen=True)
class _Plane:
    """A premultiplied RGBA picture on a plane: lower left corner, and the directions of its rows and columns."""

    levels: tuple[NDArray[np.uint8], ...]  # each half as large as the one before
    scale: float  # pixels of the first level for each metre
    corner: tuple[float, float, float]
    along: tuple[float, float, float] = (1.0, 0.0, 0.0)
    up: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def shadow(self, opacity: float) -> _Plane:
        """What it throws on the ground when the sun is behind the camera, to the left."""
        black = [level * np.array([0, 0, 0, opacity]) for level in self.levels[1:]]
        levels = tuple(cv2.GaussianBlur(level, (0, 0), 1.5).astype(np.uint8) for level in black)
        return _Plane(levels, self.scale / 2, self.corner, up=(0.55, 0.5, 0.0))

    def contact(self) -> _Plane:
        """The soft dark spot on the ground where it stands."""
        rows, columns = self.levels[2].shape[:2]
        foot = np.zeros((max(4, rows // 4), columns + 16, 4), np.float32)
        touching = self.levels[2][-max(1, rows // 5) :, :, 3].max(axis=0)
        foot[len(foot) // 3 : -len(foot) // 3, 8:-8, 3] = 0.75 * touching
        foot = cv2.GaussianBlur(foot, (0, 0), len(foot) / 6)
        scale = self.scale / 4
        corner = (self.corner[0] - 8 / scale, self.corner[1] - len(foot) / 2 / scale, 0.0)
        return _Plane((foot.astype(np.uint8),), scale, corner, up=(0.0, 1.0, 0.0))


def _plane(
    texture: NDArray[np.uint8],
    scale: float,
    corner: tuple[float, float, float],
    along: tuple[float, float, float] = (1.0, 0.0, 0.0),
    up: tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> _Plane:
    levels = [texture]
    for _ in range(3):
        rows, columns = levels[-1].shape[:2]
        half = cv2.resize(levels[-1], (columns // 2, rows // 2), interpolation=cv2.INTER_AREA)
        levels.append(half.astype(np.uint8, copy=False))
    return _Plane(tuple(levels), scale, corner, along, up)


def _light_only(light: Array) -> NDArray[np.uint8]:
    """A texture that adds light (rows×columns×3, 0..255) and hides nothing."""
    clear = np.zeros((*light.shape[:2], 1), np.float32)
    return np.concatenate([np.clip(light, 0, 255), clear], axis=2).astype(np.uint8)


def _stand(name: str, x: float, y: float, scale: float, rng: np.random.Generator) -> tuple[_Plane, _Plane]:
    """One of OBJECTS with its middle at (x, y) on the ground, facing the camera; and its light at dusk."""
    width, height, paint = OBJECTS[name]
    scale *= 3 if width < 2 else 1  # people come near
    sheet = Sheet(0, width, height, scale)
    paint(sheet, rng)
    texture, glow = sheet.premultiplied(), _light_only(sheet.lights(rng, 1.0, 1.0)[0])
    if rng.random() < 0.5 and name != "bus":  # it carries words
        texture, glow = np.ascontiguousarray(texture[:, ::-1]), np.ascontiguousarray(glow[:, ::-1])
    corner = (x - width / 2, y, 0.0)
    return _plane(texture, scale, corner), _plane(glow, scale / 2, corner)


class Place:
    """One street scene, drawn when first needed.

    Equal ``style`` with another ``seed`` is a look-alike: same walls and windows, other shops, signs and posters.
    ``scale`` is texture pixels a metre: about a tenth of the width of the pictures to be rendered.
    """

    def __init__(self, seed: int, style: int | None = None, scale: float = 64.0) -> None:
        self.seed, self.style, self.scale = seed, seed if style is None else style, scale

    def _random(self, *salt: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *salt]))

    @cached_property
    def _row(self) -> tuple[Sheet, tuple[float, float], list[tuple[float, float]]]:
        """The row of houses, the middle one's width and height, and where the row has gaps (from, to)."""
        style = np.random.Generator(np.random.PCG64([self.style, 1]))
        rng, sheet = self._random(2), Sheet(-HALF_STREET, 2 * HALF_STREET, 13.6, self.scale)
        width = style.uniform(9, 13)
        height = draw_building(sheet, style, rng, -width / 2, width)
        gaps: list[tuple[float, float]] = []
        for side in (-1, 1):
            edge = width / 2
            if style.random() < 0.35:
                gap = style.uniform(3.5, 5.5)
                gaps.append((edge, edge + gap) if side > 0 else (-edge - gap, -edge))
                edge += gap
            while edge < HALF_STREET - 4:
                span = min(style.uniform(6, 11), HALF_STREET - edge)
                draw_building(sheet, style, rng, edge if side > 0 else -edge - span, span)
                edge += span
        return sheet, (width, height), gaps

    @property
    def facade(self) -> tuple[float, float, float, float]:
        """The middle house's front on the plane y = 0: left, bottom, right, top in metres."""
        width, height = self._row[1]
        return -width / 2, 0.0, width / 2, height

    @cached_property
    def planes(self) -> list[_Plane]:
        """Ground, distant houses, side walls and the facade, back to front."""
        sheet, (_, height), gaps = self._row
        rng = self._random(3)
        far = Sheet(-60, 120, 19, max(4.0, self.scale / 5))
        x = -60.0
        while x < 55:
            width = rng.uniform(7, 13)
            draw_building(far, rng, rng, x, min(width, 60 - x))
            x += width
        texture = far.premultiplied()
        veil = np.array([196, 206, 218], np.float32)
        hazy = 0.45 * texture[..., :3] + 0.55 * veil * (texture[..., 3:] / 255)
        texture = np.concatenate([hazy.astype(np.uint8), texture[..., 3:]], axis=2)
        planes = [_plane(self._ground(), self.scale / 2, (-32.0, -24.0, 0.0), up=(0.0, 1.0, 0.0))]
        planes.append(_plane(texture, far.scale, (-60.0, 34.0, 0.0)))
        for left, right in gaps:
            wall = Sheet(0, 12, height - 0.6, self.scale / 2)
            wall.masonry(rng, 0, 0, 12, height - 0.6, "brick", (118, 84, 72))
            for at in (2.0, 5.0, 8.0):
                style = {"paint": 0, "surround": 0, "panes": 2, "shutters": 0}
                draw_window(wall, rng, at, 4.2, 1.1, 1.6, style)
            for edge in (left, right):
                planes.append(_plane(wall.premultiplied(), wall.scale, (edge, 0.0, 0.0), along=(0.0, 1.0, 0.0)))
        front = sheet.premultiplied()
        rows = front.shape[0]
        # Walls darken towards the ground and the street.
        soot = 1 - 0.22 * np.exp(-(np.arange(rows)[::-1] / self.scale) / 0.7)
        front[..., :3] = front[..., :3] * soot[:, None, None]
        planes.append(_plane(front, self.scale, (-HALF_STREET, 0.0, 0.0)))
        return planes

    @cached_property
    def fixtures(self) -> list[tuple[_Plane, _Plane]]:
        """Lamps and trees that stand at the place for good."""
        rng = self._random(4)
        at = rng.uniform(-9, -3)
        spots = [("lamp", at, -3.0), ("lamp", at + rng.uniform(10, 15), -3.0)]
        if rng.random() < 0.55:
            spots.append(("tree", rng.uniform(5, 9) * (1 if rng.random() < 0.5 else -1), -2.6))
        return [_stand(name, x, y, self.scale, rng) for name, x, y in spots]

    def _ground(self) -> NDArray[np.uint8]:
        """Ground from x = −32 to 32 and y = −24 to 24: pavement, kerb, road, pavement."""
        rng, scale = self._random(5), self.scale / 2
        sheet = Sheet(-32, 64, 48, scale)
        asphalt = (104, 104, 108)
        sheet.masonry(rng, -32, 0, 64, 48, "asphalt", asphalt)
        for y, depth in ((20.4, 27.6), (0.0, 13.0)):
            sheet.masonry(rng, -32, y, 64, depth, "slabs", (176, 170, 160))
        for y in (20.15, 13.0):
            sheet.box(-32, y, 64, 0.25, (196, 192, 184))
        sheet.box(-32, 19.95, 64, 0.2, (60, 60, 62))
        for x in np.arange(-31.5 + rng.uniform(0, 3), 31, 4.0):
            sheet.box(x, 16.7, 2.0, 0.14, (220, 218, 206))
        if rng.random() < 0.5:
            crossing = rng.uniform(-6, 4)
            for y in np.arange(13.5, 19.6, 1.0):
                sheet.box(crossing, y, 3.0, 0.5, (222, 220, 210))
        for _ in range(5):
            sheet.box(
                rng.uniform(-14, 12),
                rng.uniform(13.5, 18),
                rng.uniform(0.8, 4),
                rng.uniform(0.6, 1.6),
                (40, 40, 44, 40),
            )
            sheet.ellipse(rng.uniform(-14, 14), rng.uniform(14, 19.5), 0.3, 0.3, (82, 80, 78))
        # The facade's own shade on the pavement.
        for step in range(8):
            sheet.box(-32, 24 - 0.16 * (8 - step), 64, 0.16 * (8 - step), (0, 0, 0, 14))
        return sheet.premultiplied()

    def glow(self, condition: Condition) -> _Plane:
        """What shines on the facade at dusk: some windows and shops, and the walls near lamps."""
        sheet = self._row[0]
        shine, bare, front = sheet.lights(self._random(6, condition.seed), 0.85, 0.5)
        scale = sheet.scale / 2
        spill = cv2.GaussianBlur(bare, (0, 0), 0.7 * scale) * 0.8
        rows, columns = front.shape[:2]
        z = (rows - np.arange(rows)[:, None]) / scale
        x = np.arange(columns)[None] / scale - HALF_STREET
        for lamp, _ in self.fixtures[:2]:
            away = ((x - lamp.corner[0] - 0.4) ** 2 + (z - 4.2) ** 2 + 9) / 9
            spill += 150 * away[..., None] ** -1.5 * np.array([1.0, 0.78, 0.46], np.float32)
        texture = (shine + spill * front[..., :3] / 255) * (front[..., 3:] > 0)
        return _plane(_light_only(texture), scale, (-HALF_STREET, 0.0, 0.0))


def _sky(condition: Condition) -> _Plane:
    """A far curtain: gradient and clouds, bluish by day, dark over a warm horizon at dusk."""
    rng = np.random.Generator(np.random.PCG64([condition.seed, 7]))
    rows, columns, scale = 144, 480, 0.36
    z = np.linspace(1, 0, rows)[:, None, None] ** 0.7
    cloud = np.clip(noise(rng, rows, columns // 2, 40, 5) * 1.3 + rng.uniform(-0.5, 0.7), 0, 1)
    cloud = cv2.resize(cloud, (columns, rows))[..., None] * np.clip(3 * z, 0, 1)
    day = np.array([214, 226, 236]) * (1 - z) + np.array([92, 142, 204]) * z
    day = day + (np.array([240, 240, 240]) - day) * cloud * 0.85
    dusk = np.array([226, 148, 104]) * (1 - z) ** 3 + np.array([44, 56, 102]) * (1 - (1 - z) ** 3)
    dusk = dusk + (np.array([112, 88, 112]) - dusk) * cloud * 0.5
    colour = day * (1 - condition.dusk) + dusk * condition.dusk
    texture = np.concatenate([colour, np.full((rows, columns, 1), 255.0)], axis=2).astype(np.uint8)
    return _Plane((texture,), scale, (-columns / scale / 2, 300.0, -20.0))


def _roof_shade(front: _Plane, condition: Condition, opacity: float) -> _Plane:
    """The shadow of the other side's roofs on the facade; its height goes with the sun."""
    rng = np.random.Generator(np.random.PCG64([condition.seed, 10]))
    board = Sheet(-HALF_STREET, 2 * HALF_STREET, 13.6, 8)
    level, x = rng.uniform(-3.5, 4.5), -HALF_STREET
    while x < HALF_STREET:
        width, top = rng.uniform(4, 9), level + rng.uniform(-1.2, 1.8)
        board.polygon([(x, 0), (x + width, 0), (x + width + 0.2 * top, top), (x + 0.2 * top, top)], (0, 0, 0))
        x += width
    shade = cv2.GaussianBlur(board.premultiplied()[..., 3].astype(np.float32), (0, 0), 1.0)
    houses = front.levels[1]
    texture = np.zeros_like(houses)  # only where there is a wall
    texture[..., 3] = cv2.resize(shade, houses.shape[1::-1]) * opacity * (houses[..., 3] / 255)
    return _Plane((texture,), front.scale / 2, front.corner)


def _occluders(place: Place, camera: Camera, condition: Condition) -> list[tuple[_Plane, _Plane]]:
    """Traffic and passers-by between the camera and the facade, somewhere in the camera's view."""
    rng = place._random(8, condition.seed)
    planes: list[tuple[_Plane, _Plane]] = []
    road: list[tuple[float, float]] = []  # stretches that vehicles take up
    for number in range(condition.occluders):
        name = ("bus", "car", "person", "person")[rng.integers(2) if number == 0 else rng.integers(1, 4)]
        near = max(-11.8, 4.5 - camera.distance)  # metres: where people pass close to the camera
        y = {"car": -5.3, "bus": -6.2}.get(name, near if rng.random() < 0.5 else rng.uniform(-3, -1))
        middle = camera.x + math.tan(math.radians(camera.yaw)) * (y + camera.distance)
        for _ in range(10):
            x = middle + rng.uniform(-0.6, 0.6) * (y + camera.distance)
            if name == "bus":  # half of it at most, so that the place can be seen
                x = middle + (4.4 + rng.uniform(0, 1.5)) * (1 if rng.random() < 0.5 else -1)
            half = OBJECTS[name][0] / 2
            if name == "person" or all(x + half < left or x - half > right for left, right in road):
                planes.append(_stand(name, x, y, place.scale, rng))
                if name != "person":
                    road.append((x - half - 0.5, x + half + 0.5))
                break
    return planes


def _composite(frame: Array, plane: _Plane, projection: Array, light: Array) -> None:
    """Lay a plane over the frame, rows×columns×3, by the frame's 3×4 projection, under a light (three factors)."""
    rows, columns = plane.levels[0].shape[:2]
    axes = np.column_stack([np.append(plane.along, 0), np.append(plane.up, 0), np.append(plane.corner, 1)])
    to_metres = np.array([[1, 0, 0.5], [0, -1, rows - 0.5], [0, 0, plane.scale]]) / plane.scale
    homography = projection @ axes @ to_metres
    grid = np.stack([a.ravel() for a in np.meshgrid(np.linspace(0, columns, 9), np.linspace(0, rows, 9))])
    projected = homography @ np.vstack([grid, np.ones(81)])
    before = projected[2] > 0.05
    if not before.any():
        return
    height, width = frame.shape[:2]
    pixels = projected[:2, before] / projected[2, before]
    left, top, right, bottom = 0, 0, width, height
    if before.all():
        left, top = (int(max(0, low)) for low in np.floor(pixels.min(axis=1)) - 1)
        right, bottom = (
            int(min(end, high)) for end, high in zip((width, height), np.ceil(pixels.max(axis=1)) + 2, strict=True)
        )
        if left >= right or top >= bottom:
            return
    inside = (pixels > -0.1 * width).all(axis=0) & (pixels[0] < 1.1 * width) & (pixels[1] < 1.1 * height)
    # A homography gives a texel |determinant| / depth³ pixels; take the level where that comes near 1.
    depth = projected[2, before][inside] if inside.any() else projected[2, before]
    density = float(np.quantile(np.sqrt(abs(np.linalg.det(homography)) / depth**3), 0.7))
    level = int(np.clip(round(-math.log2(max(density, 1e-9))), 0, len(plane.levels) - 1))
    halving = np.diag([2.0**level, 2.0**level, 1.0])
    halving[:2, 2] = (2**level - 1) / 2
    shift = np.array([[1.0, 0, -left], [0, 1, -top], [0, 0, 1]])
    matrix = shift @ homography @ halving
    warped = cv2.warpPerspective(plane.levels[level], matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    if not before.all():  # The part behind the camera would show upside down beyond the horizon.
        inverse = np.linalg.inv(matrix)[2]
        rays = inverse[0] * np.arange(right - left)[None] + inverse[1] * np.arange(bottom - top)[:, None] + inverse[2]
        warped[rays <= 0] = 0
    window = frame[top:bottom, left:right]
    window *= 1 - warped[..., 3:].astype(np.float32) / 255
    window += warped[..., :3] * light.astype(np.float32)


def render_place(
    place: Place, camera: Camera, condition: Condition | None = None, size: Size = (640, 480)
) -> Image.Image:
    """The picture that a camera takes of a place; the same arguments give the same picture."""
    condition = condition or Condition()
    rng = place._random(9, condition.seed)
    fine = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
    projection = camera.matrix(fine)
    frame = np.zeros((fine[1], fine[0], 3), np.float32)
    dusk, sun = condition.dusk, rng.uniform(0, 1)
    noon = np.array([1.04, 1.0, 0.94]) * (0.86 + 0.26 * sun) + np.array([-0.02, 0, 0.03]) * (1 - sun)
    light = noon * (1 - dusk) + np.array([0.33, 0.36, 0.5]) * dusk
    opacity = (0.15 + 0.4 * sun) * (1 - dusk)
    movers = sorted([*place.fixtures, *_occluders(place, camera, condition)], key=lambda mover: -mover[0].corner[1])
    ground, *houses = place.planes
    plain = np.ones(3)
    layers = [(_sky(condition), plain), (ground, light)]
    layers += [(shade, plain) for body, _ in movers for shade in (body.shadow(opacity), body.contact())]
    layers += [*((house, light) for house in houses), (_roof_shade(houses[-1], condition, opacity), plain)]
    layers += [(place.glow(condition), plain * dusk)] if dusk > 0 else []
    layers += [layer for body, glow in movers for layer in ((body, light), (glow, plain * dusk))]
    for plane, factor in layers:
        _composite(frame, plane, projection, factor)
    picture = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    bloom = cv2.GaussianBlur(np.maximum(picture - 170, 0), (0, 0), size[0] / 60) * 0.5 * condition.dusk
    picture = picture + bloom
    if condition.blur > 0:
        picture = cv2.GaussianBlur(picture, (0, 0), condition.blur * size[0] / 640)
    picture = picture + condition.noise * rng.standard_normal(picture.shape, np.float32)
    return Image.fromarray(np.clip(picture, 0, 255).round().astype(np.uint8))


def facade_mask(place: Place, camera: Camera, condition: Condition | None = None, size: Size = (640, 480)) -> Mask:
    """Where a picture shows the facade plane (the whole row of houses) with nothing before it, rows×columns bool."""
    projection = camera.matrix(size)
    clear, behind = (np.ones((size[1], size[0], 3), np.float32) for _ in range(2))
    _composite(behind, place.planes[-1], projection, np.zeros(3))
    for body, _ in [*place.fixtures, *_occluders(place, camera, condition or Condition())]:
        _composite(clear, body, projection, np.zeros(3))
    return (clear[..., 0] > 0.9) & (behind[..., 0] < 0.1)
