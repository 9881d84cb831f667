"""House fronts, trees, vehicles and people, drawn in metres from random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from patchnetvlad.examples.drawing_sheet import Colour, Sheet, tint

WALLS: dict[str, list[Colour]] = {
    "brick": [(158, 92, 72), (134, 82, 68), (176, 132, 100), (120, 96, 88)],
    "stone": [(196, 186, 166), (172, 168, 160), (188, 172, 140)],
    "boards": [(122, 146, 150), (206, 202, 188), (150, 160, 132)],
    "plaster": [
        (222, 206, 172),
        (214, 178, 132),
        (186, 198, 190),
        (218, 184, 172),
        (226, 222, 212),
        (170, 186, 204),
    ],
}
# fmt: off
TRADES = [
    "CAFE", "BAKERY", "BOOKS", "FLORIST", "HOTEL", "PHARMACY", "TAILOR", "MUSIC",
    "BANK", "CYCLES", "OPTICIAN", "CINEMA", "DELI", "TEA", "TOYS", "KIOSK",
]
OWNERS = [
    "LUNA", "MORRIS", "NORD", "ALMA", "VERDI", "HOLM", "ROSA", "WEST",
    "ZETA", "KLEIN", "ORION", "PARK", "DUBOIS", "FINCH", "IRIS", "QUAY",
]
# fmt: on
SIGNS: list[Colour] = [
    (150, 34, 38),
    (28, 74, 60),
    (32, 52, 96),
    (44, 42, 44),
    (206, 154, 40),
    (92, 46, 84),
    (30, 110, 122),
]
PAINT: list[Colour] = [(238, 234, 224), (96, 70, 52), (58, 74, 66), (70, 76, 88)]


def draw_window(
    sheet: Sheet,
    rng: np.random.Generator,
    x: float,
    z: float,
    width: float,
    height: float,
    style: dict[str, int],
) -> None:
    frame = PAINT[style["paint"]]
    surround = style["surround"]
    if surround:
        sheet.box(x - 0.14, z - 0.05, width + 0.28, height + 0.2, (235, 228, 212, 150))
    if surround == 2:
        sheet.box(x - 0.22, z + height + 0.12, width + 0.44, 0.14, (236, 230, 216))
        sheet.box(x - 0.22, z + height + 0.06, width + 0.44, 0.06, (0, 0, 0, 80))
    sheet.box(x, z, width, height, tint(frame, 0.55))
    dark = rng.uniform(0.75, 1.15)
    for strip in range(8):
        tone = dark * (0.35 + 0.09 * strip)
        sheet.box(x, z + height * strip / 8, width, height / 8 + 0.02, tint((92, 116, 136), tone))
    kind = rng.integers(5)
    if kind <= 1:
        for side in (x, x + width * 0.76):
            sheet.box(side, z, width * 0.24, height, (226, 218, 200, 190))
    elif kind == 2:
        drop = rng.uniform(0.25, 0.7) * height
        sheet.box(x, z + height - drop, width, drop, (214, 206, 186, 225))
    slant = rng.uniform(-0.2, 0.5) * width
    reflection = [(x + slant + width * k, z + height * t) for k, t in ((0.1, 0), (0.4, 0), (0.75, 1), (0.45, 1))]
    sheet.polygon([(min(max(a, x), x + width), b) for a, b in reflection], (214, 230, 240, 60))
    bars = [(x + width * k / style["panes"] - 0.035, z, 0.07, height) for k in range(style["panes"] + 1)]
    bars += [(x, z + height * level - 0.035, width, 0.07) for level in (0.02, 0.66, 0.98)]
    for bar in bars:
        sheet.box(*bar, frame)
    sheet.box(x, z + height - 0.12, width, 0.12, (0, 0, 0, 90))
    sheet.box(x, z, 0.07, height, (0, 0, 0, 70))
    sheet.box(x - 0.12, z - 0.32, width + 0.24, 0.24, (0, 0, 0, 45))
    sheet.box(x - 0.12, z - 0.1, width + 0.24, 0.12, tint((214, 206, 192), 1.0))
    if style["shutters"]:
        colour = SIGNS[style["shutters"]]
        for side in (x - width * 0.5 - 0.06, x + width + 0.06):
            sheet.box(side, z, width * 0.5, height, colour)
            for slat in np.arange(0.1, height - 0.08, 0.13):
                sheet.box(side + 0.06, z + slat, width * 0.5 - 0.12, 0.05, (0, 0, 0, 80))
            sheet.box(side + width * 0.5, z - 0.05, 0.06, height, (0, 0, 0, 60))
    sheet.windows.append((x, z, width, height))


def _draw_balcony(sheet: Sheet, x: float, z: float, width: float, plants: bool, rng: np.random.Generator) -> None:
    sheet.box(x - 0.4, z - 0.75, width + 0.8, 0.6, (0, 0, 0, 70))
    sheet.box(x - 0.45, z - 0.2, width + 0.9, 0.18, (182, 176, 166))
    for rail in np.arange(x - 0.42, x + width + 0.44, 0.14):
        sheet.box(rail, z, 0.04, 0.9, (40, 42, 46))
    sheet.box(x - 0.45, z + 0.9, width + 0.9, 0.07, (40, 42, 46))
    for _ in range(26 if plants else 0):
        spot = (x + rng.uniform(-0.4, width + 0.4), z + rng.uniform(-0.15, 0.5))
        sheet.ellipse(*spot, 0.12, 0.1, tint((74, 122, 58), rng.uniform(0.6, 1.3)))
        if rng.random() < 0.4:
            sheet.ellipse(*spot, 0.06, 0.06, ((206, 60, 76), (232, 190, 70))[rng.integers(2)])


def _draw_shop(sheet: Sheet, rng: np.random.Generator, x: float, width: float) -> None:
    colour, accent = SIGNS[rng.integers(len(SIGNS))], SIGNS[rng.integers(len(SIGNS))]
    sheet.box(x, 0, width, 3.0, tint(colour, 0.8))
    door = x + (0.3 if rng.random() < 0.5 else width - 1.4)
    panes = [(x + 0.2, door - x - 0.4), (door + 1.3, x + width - door - 1.5)]
    for pane, span in [(p, s) for p, s in panes if s > 0.6]:
        for strip in range(8):
            sheet.box(pane, 0.55 + 0.24 * strip, span, 0.25, tint((78, 84, 86), 0.45 + 0.1 * strip))
        for shelf in (0.6, 1.25):
            for spot in np.arange(pane + 0.15, pane + span - 0.3, 0.36):
                goods = tint(SIGNS[rng.integers(len(SIGNS))], rng.uniform(0.7, 1.7))
                sheet.box(spot, shelf, rng.uniform(0.14, 0.3), rng.uniform(0.15, 0.5), goods)
        sheet.polygon(
            [(pane + span * k, z) for k, z in ((0.1, 0.55), (0.3, 0.55), (0.6, 2.45), (0.4, 2.45))],
            (225, 235, 240, 45),
        )
        sheet.box(pane, 2.3, span, 0.15, (0, 0, 0, 110))
        sheet.windows.append((pane, 0.55, span, 1.9))
    sheet.box(door, 0.05, 1.1, 2.4, tint(accent, 0.7))
    sheet.box(door + 0.2, 0.9, 0.7, 1.35, (70, 84, 92))
    sheet.box(door + 0.92, 1.1, 0.06, 0.25, (220, 190, 90))
    sheet.box(x - 0.05, 2.55, width + 0.1, 0.75, colour)
    sheet.box(x - 0.05, 3.3, width + 0.1, 0.08, (236, 230, 218))
    words = [TRADES[rng.integers(len(TRADES))], OWNERS[rng.integers(len(OWNERS))]]
    name = " ".join(words if rng.random() < 0.6 else words[:1])
    sheet.text(x + width / 2, 2.92, 0.62, width - 0.4, name, (248, 240, 216) if sum(colour) < 400 else (40, 32, 28))
    if rng.random() < 0.55:
        stripes = max(5, round(width / 0.5))
        for stripe in range(stripes):
            left, step = x + width * stripe / stripes, width / stripes
            cloth = accent if stripe % 2 else (238, 232, 220)
            sheet.polygon([(left, 2.5), (left + step, 2.5), (left + step, 1.85), (left, 1.85)], cloth)
            sheet.ellipse(left + step / 2, 1.85, step / 2, 0.14, cloth)
        sheet.box(x, 2.32, width, 0.18, (255, 255, 255, 40))
        sheet.box(x, 1.35, width, 0.4, (0, 0, 0, 90))
    else:
        sheet.box(x, 2.4, width, 0.15, (0, 0, 0, 110))


def _draw_door(sheet: Sheet, rng: np.random.Generator, x: float) -> None:
    sheet.box(x - 0.2, 0, 1.6, 2.75, (206, 198, 182))
    sheet.box(x, 0.15, 1.2, 2.4, tint(SIGNS[rng.integers(len(SIGNS))], 0.9))
    sheet.box(x, 2.05, 1.2, 0.5, (88, 104, 116))
    for panel in (0.3, 1.2):
        for side in (0.12, 0.66):
            sheet.box(x + side, panel, 0.42, 0.72, (0, 0, 0, 60))
    sheet.box(x, 2.43, 1.2, 0.12, (0, 0, 0, 100))
    sheet.box(x - 0.35, 0, 1.9, 0.15, (150, 146, 140))
    sheet.text(x + 1.7, 1.9, 0.35, 0.6, str(rng.integers(1, 199)), (30, 40, 80))


def _draw_posters(sheet: Sheet, rng: np.random.Generator, x: float) -> None:
    for column in range(rng.integers(1, 4)):
        paper, ink = tint(SIGNS[rng.integers(len(SIGNS))], 1.3), SIGNS[rng.integers(len(SIGNS))]
        left, bottom = x + 0.8 * column, rng.uniform(0.9, 1.2)
        sheet.box(left, bottom, 0.7, 1.0, paper)
        sheet.ellipse(left + 0.35, bottom + 0.6, rng.uniform(0.12, 0.3), rng.uniform(0.12, 0.3), ink)
        sheet.text(left + 0.35, bottom + 0.2, 0.25, 0.6, OWNERS[rng.integers(len(OWNERS))], (250, 246, 236))


def draw_building(sheet: Sheet, style: np.random.Generator, rng: np.random.Generator, x: float, width: float) -> float:
    """A house front from x to x + width; returns its height. ``style`` decides walls and windows, ``rng`` the rest."""
    material = list(WALLS)[style.integers(4)]
    wall = WALLS[material][style.integers(len(WALLS[material]))]
    floors, storey = int(style.integers(2, 4)), style.uniform(2.7, 3.1)
    columns = max(1, round(width / style.uniform(2.1, 3.0)))
    look = {"paint": int(style.integers(4)), "surround": int(style.integers(3)), "panes": int(style.integers(1, 4))}
    pitch = width / columns
    look["shutters"] = int(style.integers(1, len(SIGNS))) if pitch > 2.3 and style.random() < 0.35 else 0
    opening = (
        pitch * (0.42 if look["shutters"] else style.uniform(0.42, 0.6)),
        storey * style.uniform(0.5, 0.62),
    )
    ground = 3.6
    height = ground + (floors - 1) * storey + 0.5
    sheet.masonry(rng, x, 0, width, height, material, wall)
    if style.random() < 0.5:
        sheet.masonry(rng, x, 0, width, ground - 0.15, "stone", WALLS["stone"][style.integers(3)])
    sheet.box(x, ground - 0.15, width, 0.16, tint(wall, 1.25))
    sheet.box(x, ground - 0.3, width, 0.15, (0, 0, 0, 60))
    for floor in range(floors - 1):
        for column in range(columns):
            left = x + pitch * (column + 0.5) - opening[0] / 2
            bottom = ground + floor * storey + 0.65
            draw_window(sheet, rng, left, bottom, *opening, look)
            if rng.random() < 0.14:
                _draw_balcony(sheet, left, bottom, opening[0], rng.random() < 0.6, rng)
    _draw_roof(sheet, rng, int(style.integers(3)), x, width, height, pitch, wall, look)
    _draw_ground_floor(sheet, rng, x, width, look)
    if rng.random() < 0.5:
        _draw_blade_sign(sheet, rng, x, width)
    for pipe in (x + 0.06, x + width - 0.16):
        sheet.box(pipe, 0, 0.1, height - 0.3, tint((96, 98, 96), 0.9))
        sheet.box(pipe + 0.1, 0, 0.06, height - 0.3, (0, 0, 0, 50))
    return height


def _draw_roof(
    sheet: Sheet,
    rng: np.random.Generator,
    kind: int,
    x: float,
    width: float,
    height: float,
    pitch: float,
    wall: Colour,
    look: dict[str, int],
) -> None:
    """Edge of a roof at a height; kind 0 is flat, 1 has dormers, and both others have a chimney."""
    sheet.box(x, height - 0.75, width, 0.45, (0, 0, 0, 65))
    sheet.box(x - 0.1, height - 0.35, width + 0.2, 0.4, tint(wall, 1.2))
    if kind == 1:
        sheet.masonry(rng, x, height + 0.05, width, 1.5, "boards", (98, 96, 106))
        for left in np.arange(x + pitch, x + width - 1.2, pitch * 2):
            sheet.box(left - 0.15, height + 0.1, 1.3, 1.5, (220, 214, 202))
            draw_window(sheet, rng, left, height + 0.25, 1.0, 1.15, look | {"shutters": 0, "surround": 0})
    if kind:
        left, top = x + rng.uniform(0.1, 0.8) * width, height + (1.5 if kind == 1 else 0.0)
        sheet.masonry(rng, left, top, 0.9, 0.9, "brick", (140, 84, 68))
        sheet.box(left - 0.08, top + 0.9, 1.06, 0.12, (110, 104, 98))


def _draw_ground_floor(sheet: Sheet, rng: np.random.Generator, x: float, width: float, look: dict[str, int]) -> None:
    """Shops, doors, posters and windows from x to x + width."""
    spot = x + 0.25
    while spot < x + width - 1.6:
        room = x + width - 0.25 - spot
        kind = rng.random()
        if kind < 0.6 and room > 3:
            span = min(room, rng.uniform(3.2, 6.5))
            _draw_shop(sheet, rng, spot, span)
        elif kind < 0.8 and room > 2.4:
            span = 2.4
            _draw_door(sheet, rng, spot + 0.4)
        elif kind < 0.9 or room < 2.6:
            span = min(room, 2.4)
            if room > 2.5:
                _draw_posters(sheet, rng, spot + 0.1)
        else:
            span = 2.4
            draw_window(sheet, rng, spot + 0.6, 1.0, 1.3, 1.7, look | {"shutters": 0})
        spot += span + rng.uniform(0.25, 0.6)


def _draw_blade_sign(sheet: Sheet, rng: np.random.Generator, x: float, width: float) -> None:
    """A sign that stands out from the wall, its word written from top to bottom."""
    left, tall = x + width * rng.uniform(0.15, 0.85), rng.uniform(1.6, 2.6)
    colour, word = SIGNS[rng.integers(len(SIGNS))], TRADES[rng.integers(len(TRADES))]
    sheet.box(left + 0.1, 4.0, 0.62, tall, (0, 0, 0, 60))
    sheet.box(left, 4.1, 0.6, tall, colour)
    step = (tall - 0.2) / len(word)
    for row, letter in enumerate(word):
        sheet.text(left + 0.3, 4.0 + tall - step * (row + 0.5), step, 0.6, letter, (250, 244, 226))


def _paint_tree(sheet: Sheet, rng: np.random.Generator) -> None:
    sheet.polygon([(1.85, 0), (2.2, 0), (2.1, 3.4), (1.95, 3.4)], (84, 68, 54))
    for low, reach in ((1.9, -0.9), (2.2, 0.9), (2.6, -0.5)):
        sheet.polygon([(2, low), (2.08, low), (2.04 + reach, low + 1.6), (1.98 + reach, low + 1.6)], (84, 68, 54))
    green = tint(((84, 120, 56), (104, 122, 52), (70, 108, 66))[rng.integers(3)], 1.0)
    for leaf in range(520):
        angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0, 1) ** 0.5
        x, z = 2.03 + 1.75 * reach * math.cos(angle), 4.1 + 1.7 * reach * math.sin(angle)
        light = 0.5 + 0.5 * leaf / 520 + 0.16 * (z - 4.1) - 0.1 * (x - 2)
        size = rng.uniform(0.1, 0.22)
        sheet.ellipse(x, z, size, size * 0.8, tint(green, light))


def _paint_wheels(sheet: Sheet, radius: float, *centres: float) -> None:
    for x in centres:
        sheet.ellipse(x, radius, radius, radius, (28, 28, 30))
        sheet.ellipse(x, radius, radius * 0.6, radius * 0.6, (150, 152, 156))
        sheet.ellipse(x, radius, radius * 0.2, radius * 0.2, (70, 70, 74))


def _paint_car(sheet: Sheet, rng: np.random.Generator) -> None:
    paint = [(170, 36, 40), (38, 62, 110), (196, 198, 200), (52, 56, 58), (214, 208, 190), (58, 96, 84)][
        rng.integers(6)
    ]
    cabin = [(1.0, 0.85), (1.5, 1.42), (3.0, 1.42), (3.65, 0.88)]
    sheet.polygon([(0.1, 0.3), (0.05, 0.75), (0.3, 0.9), *cabin, (4.2, 0.78), (4.3, 0.3)], paint)
    sheet.polygon([(1.15, 0.88), (1.58, 1.34), (2.2, 1.34), (2.2, 0.88)], (52, 64, 74))
    sheet.polygon([(2.3, 0.88), (2.3, 1.34), (2.94, 1.34), (3.45, 0.88)], (52, 64, 74))
    sheet.polygon([(1.3, 0.9), (1.65, 1.3), (1.85, 1.3), (1.5, 0.9)], (200, 214, 224, 90))
    sheet.box(0.05, 0.3, 4.25, 0.12, (20, 20, 22, 150))
    sheet.box(0.3, 0.84, 3.9, 0.04, (255, 255, 255, 90))
    sheet.box(2.24, 0.4, 0.03, 0.5, (0, 0, 0, 120))
    sheet.box(4.1, 0.6, 0.18, 0.12, (250, 240, 200))
    sheet.windows.append((4.1, 0.6, 0.18, 0.12))
    sheet.box(0.06, 0.6, 0.12, 0.14, (190, 20, 24))
    _paint_wheels(sheet, 0.32, 0.95, 3.4)


def _paint_bus(sheet: Sheet, rng: np.random.Generator) -> None:
    paint = [(178, 38, 36), (226, 176, 52), (52, 108, 84), (60, 92, 150)][rng.integers(4)]
    sheet.box(0, 0.35, 9.6, 2.65, paint)
    sheet.box(0.1, 2.85, 9.4, 0.15, tint(paint, 1.3))
    sheet.box(0, 1.1, 9.6, 0.22, (238, 236, 228))
    for x in np.arange(0.25, 9.2, 1.34):
        sheet.box(x, 1.45, 1.22, 1.1, (46, 58, 68))
        sheet.windows.append((x, 1.45, 1.22, 1.1))
        sheet.polygon([(x + 0.2, 1.45), (x + 0.45, 1.45), (x + 0.85, 2.55), (x + 0.6, 2.55)], (196, 210, 220, 80))
        head = x + rng.uniform(0.3, 0.9)
        sheet.ellipse(head, 1.75, 0.13, 0.17, (96, 78, 70))
    for x in (2.93, 8.29):
        sheet.box(x - 0.05, 0.45, 1.3, 2.1, (40, 50, 58))
        sheet.box(x + 0.58, 0.45, 0.05, 2.1, tint(paint, 0.9))
    sheet.text(6.2, 0.8, 0.5, 2.6, OWNERS[rng.integers(len(OWNERS))], (248, 244, 230))
    sheet.box(0, 0.35, 9.6, 0.14, (0, 0, 0, 110))
    _paint_wheels(sheet, 0.48, 1.9, 7.4)


def _paint_person(sheet: Sheet, rng: np.random.Generator) -> None:
    coat = tint(SIGNS[rng.integers(len(SIGNS))], rng.uniform(0.9, 1.5))
    stride = rng.uniform(0.05, 0.2)
    for foot, shade in ((-stride, 0.8), (stride, 1.0)):
        leg = tint((52, 54, 70), shade)
        sheet.polygon([(0.42, 0.9), (0.6, 0.9), (0.56 + foot, 0.05), (0.44 + foot, 0.05)], leg)
        sheet.ellipse(0.54 + foot, 0.05, 0.13, 0.05, (34, 28, 26))
    sheet.polygon([(0.34, 0.75), (0.3, 1.35), (0.4, 1.48), (0.62, 1.48), (0.72, 1.35), (0.68, 0.75)], coat)
    sheet.polygon([(0.3, 1.4), (0.2, 0.85), (0.3, 0.82), (0.42, 1.35)], tint(coat, 0.8))
    sheet.polygon([(0.72, 1.4), (0.8, 0.88), (0.71, 0.84), (0.6, 1.35)], tint(coat, 1.15))
    skin = [(214, 170, 140), (150, 104, 78), (232, 196, 168)][rng.integers(3)]
    sheet.ellipse(0.52, 1.62, 0.11, 0.14, skin)
    sheet.ellipse(0.5, 1.67, 0.12, 0.11, [(52, 38, 30), (120, 84, 48), (36, 34, 38)][rng.integers(3)])
    if rng.random() < 0.5:
        sheet.box(0.64, 0.52, 0.27, 0.33, tint(SIGNS[rng.integers(len(SIGNS))], 1.3))


def _paint_lamp(sheet: Sheet, rng: np.random.Generator) -> None:
    sheet.box(0.27, 0, 0.26, 0.5, (44, 50, 50))
    sheet.box(0.35, 0.4, 0.1, 3.6, (52, 58, 58))
    sheet.box(0.2, 3.9, 0.4, 0.07, (44, 50, 50))
    sheet.windows.append((0.2, 3.97, 0.4, 0.48))
    sheet.polygon([(0.25, 3.97), (0.55, 3.97), (0.65, 4.45), (0.15, 4.45)], (232, 226, 200))
    sheet.polygon([(0.08, 4.45), (0.72, 4.45), (0.4, 4.75)], (44, 50, 50))


# width and height in metres, and how it is drawn
OBJECTS: dict[str, tuple[float, float, Callable[[Sheet, np.random.Generator], None]]] = {
    "tree": (4.1, 6.2, _paint_tree),
    "car": (4.4, 1.6, _paint_car),
    "bus": (9.6, 3.1, _paint_bus),
    "person": (1.0, 1.85, _paint_person),
    "lamp": (0.8, 4.8, _paint_lamp),
}
