"""A picture of the house: rows of modules with the imports between them, annexes below."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from patchnetvlad.architecture.imports import House
from patchnetvlad.files import replacing

_WIDTH, _ROW_HEIGHT, _LABEL = 16.0, 0.95, 1.5  # inches
_BOX, _GAP = 0.42, 0.12  # height of a module's box, and the space between two
_CHARACTER, _PADDING = 0.078, 0.24  # of a name in its box, inches
_FORMULA, _OTHER, _ANNEX = "#fff1d6", "#e6eef7", "#e9f3e6"
_EVERYWHERE = {"errors"}
_INK, _LINE = "#22303c", "#3b6ea5"

_Box = tuple[float, float, float]  # left, right, middle


def draw_house(house: House, imports: Mapping[str, frozenset[str]], path: Path) -> None:
    """Write the picture as SVG or PNG, whichever the path's ending says.

    Lines go from each module down to those that import it; `errors`, which nearly all import, is left out. Formulas
    have another colour.
    """
    lines = [_wrapped(row.modules) for row in house.rows]
    height = sum(len(row) for row in lines) * _ROW_HEIGHT + _ROW_HEIGHT + 0.3
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
    axes.axis("off")
    boxes: dict[str, _Box] = {}
    top = 0.15
    for number, (row, row_lines) in enumerate(zip(house.rows, lines, strict=True)):
        row_height = len(row_lines) * _ROW_HEIGHT
        if number % 2 == 0:
            axes.axhspan(top, top + row_height, color="#f6f7f9", zorder=0)
        axes.text(0.2, top + row_height / 2, row.name, va="center", size=13, weight="bold", color=_INK)
        for modules in row_lines:
            boxes |= _placed(modules, top + _ROW_HEIGHT / 2)
            top += _ROW_HEIGHT
    boxes |= _placed([f"{annex}/" for annex in house.annexes], top + _ROW_HEIGHT / 2)
    axes.text(0.2, top + _ROW_HEIGHT / 2, "annexes", va="center", size=13, weight="bold", color=_INK)
    for name, box in boxes.items():
        face = _ANNEX if name.rstrip("/") in house.annexes else _FORMULA if name in house.formulas else _OTHER
        _draw_box(axes, name, box, face)
        for other in sorted((_used(name, imports) & boxes.keys()) - _EVERYWHERE):
            _draw_line(axes, boxes[other], box)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "house"}), replacing(path) as temporary:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix[1:], metadata=metadata)


def _used(name: str, imports: Mapping[str, frozenset[str]]) -> set[str]:
    """What a module imports, or all modules of a folder together; another folder's modules count as that folder."""
    own = [used for module, used in imports.items() if module == name or module.startswith(f"{name.rstrip('/')}.")]
    imported = {f"{used.partition('.')[0]}/" if "." in used else used for used in set().union(*own)}
    return imported - {name}


def _wrapped(modules: tuple[str, ...]) -> list[list[str]]:
    """The modules of a row in as many lines as they need."""
    lines: list[list[str]] = [[]]
    left = 0.0
    for module in modules:
        wide = _width(module) + _GAP
        if lines[-1] and left + wide > _WIDTH - _LABEL - 0.2:
            lines.append([])
            left = 0.0
        lines[-1].append(module)
        left += wide
    return lines


def _width(name: str) -> float:
    return len(name) * _CHARACTER + _PADDING


def _placed(names: list[str], middle: float) -> dict[str, _Box]:
    """Boxes of one line, spread over its width."""
    free = _WIDTH - _LABEL - 0.2 - sum(map(_width, names))
    gap = min(1.2, free / (len(names) + 1))
    left, boxes = _LABEL + (free - gap * (len(names) - 1)) / 2, {}
    for name in names:
        boxes[name] = (left, left + _width(name), middle)
        left += _width(name) + gap
    return boxes


def _draw_box(axes: Axes, name: str, box: _Box, face: str) -> None:
    left, right, middle = box
    shape = FancyBboxPatch(
        (left, middle - _BOX / 2),
        right - left,
        _BOX,
        "round,pad=0,rounding_size=0.07",
        fc=face,
        ec=_INK,
        lw=0.8,
        zorder=3,
    )
    axes.add_patch(shape)
    axes.text((left + right) / 2, middle, name, ha="center", va="center", size=9.5, color=_INK, zorder=4)


def _draw_line(axes: Axes, used: _Box, user: _Box) -> None:
    """From the lower edge of what is used to the upper edge of its user; within a row an arc above both."""
    start, end = ((box[0] + box[1]) / 2 for box in (used, user))
    if used[2] == user[2]:
        top = used[2] - _BOX / 2
        corners = [(start, top), (start, top - 0.25), (end, top - 0.25), (end, top)]
    else:
        first, last = used[2] + _BOX / 2, user[2] - _BOX / 2
        bend = min(0.6, (last - first) / 2 + 0.15)
        corners = [(start, first), (start, first + bend), (end, last - bend), (end, last)]
    curve = Curve(corners, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    axes.add_patch(PathPatch(curve, fc="none", ec=_LINE, lw=0.7, alpha=0.28, zorder=2))
