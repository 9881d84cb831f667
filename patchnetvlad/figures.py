"""Two pictures side by side with their patch matches, for people to judge."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from patchnetvlad.errors import UserError, counted
from patchnetvlad.files import writing
from patchnetvlad.pair_comparison import MatchedPair

SCALE_COLOURS = ("#ffb000", "#00c2ff", "#ff4fa3", "#7ddc3c", "#b08cff")  # by patch size; apart for the colour-blind
OUTLIER_COLOUR = "#8c8c8c"
GAP = 0.025  # between the pictures, share of their height
FORMATS = (".png", ".pdf", ".svg")
_SHORTEST_NAMES = 24  # characters for the names of both pictures, below which they are left out
_NARROW = 6.0  # inches; a figure below it, for a column of a paper, has its texts below each other
_INK = 14.0  # how many lines of 1 point's width a picture of 10 inches bears before they thin out, per inch


def match_figure(matched: MatchedPair, score: float, width: float = 10.0, outlines: bool = False) -> Figure:
    """Draw both pictures at their own aspect and equal height, inliers in colour over outliers in grey.

    width: of the figure in inches, 3.3 to 3.5 for one column of a paper; outlines: draw the inliers' patches.
    """
    pictures = (matched.query, matched.reference)
    widths = [picture.width / picture.height for picture in pictures]  # in units of the common height
    offset = widths[0] + GAP
    figure, axes = _empty_figure(width, offset + widths[1], matched, score)
    for picture, left, wide in zip(pictures, (0.0, offset), widths, strict=True):
        axes.imshow(np.asarray(picture), extent=(left, left + wide, 1.0, 0.0), interpolation="antialiased")
    axes.set_xlim(0, offset + widths[1])
    axes.set_ylim(1, 0)
    counts = [int(scale_score.inliers.sum()) for scale_score in matched.pair.scores]
    shrink = min(1.0, width / 8)
    stroke = min(1.1, max(0.3, _INK * width / max(1, sum(counts)))) * shrink
    dot = 2.2 * stroke + 1.2 * shrink
    for scale, scale_score in enumerate(matched.pair.scores):
        colour = SCALE_COLOURS[scale % len(SCALE_COLOURS)]
        # Pixel x has its centre at x + ½ of the picture's width in pixels
        ends = [
            (points + 0.5) / picture.height + (left, 0.0)
            for points, picture, left in zip(matched.points(scale), pictures, (0.0, offset), strict=True)
        ]
        inliers = scale_score.inliers.cpu().numpy()
        lines = np.stack(ends, axis=1)  # M×2×2
        axes.add_collection(
            LineCollection(list(lines[~inliers]), colors=OUTLIER_COLOUR, linewidths=0.35, alpha=0.3, zorder=2)
        )
        axes.add_collection(
            LineCollection(list(lines[inliers]), colors=colour, linewidths=stroke, alpha=0.55, zorder=3 + scale)
        )
        for points, picture in zip(ends, pictures, strict=True):
            axes.plot(
                *points[inliers].T,
                "o",
                color=colour,
                markersize=dot,
                markeredgecolor="#202020",
                markeredgewidth=0.35 * shrink,
                zorder=20 + scale,
            )
            if outlines:
                squares = _rectangles(points[inliers], matched.patch_sides(scale, picture) / picture.height)
                axes.add_collection(
                    LineCollection(squares, colors=colour, linewidths=0.6 * shrink, alpha=0.6, zorder=2.5)
                )
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as the kind of file its name says: .png, .pdf, .svg; texts stay texts in the latter two.

    Pictures have 160 dots an inch, and small figures more, up to 400. Raises UserError for another ending.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: a figure is written as {', '.join(FORMATS)}")
    # Without dates, the same figure is the same file
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix.lower())
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "patchnetvlad"}):
        dots = min(400, max(160, 1200 / figure.get_figwidth()))
        with writing(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=dots, metadata=metadata)


def _empty_figure(
    width: float, total: float, matched: MatchedPair, score: float
) -> tuple[Figure, matplotlib.axes.Axes]:
    """A figure with its texts, and axes for pictures that are ``total`` wide in units of their height."""
    narrow = width < _NARROW
    size = 7.0 if narrow else 9.0  # points
    line = size * 1.45 / 72  # inches
    entries = [_entry(matched, scale) for scale in range(len(matched.pair.scores))]
    widest = max(map(len, entries), default=0) * size * 0.52 / 72 + 0.4  # inches, of one legend entry
    columns = max(1, min(len(entries), int(width // widest)))
    rows = -(-len(entries) // columns)
    title_height = (1 + rows + bool(matched.meaning)) * line + 0.14
    height = width / total + title_height
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1 - title_height / height))
    axes.set_axis_off()
    top = 1 - 0.05 / height
    figure.text(0.05 / width, top, f"Similarity {score:.5g}", va="top", fontsize=size + 1, weight="bold")
    room = int((width - 1.9) / (size * 0.55 / 72))
    if room >= _SHORTEST_NAMES:
        names = _fitting_names(*matched.names, room)
        figure.text(
            1 - 0.05 / width, top, names, va="top", ha="right", fontsize=size, color="#505050", parse_math=False
        )
    for number, entry in enumerate(entries):
        left = (0.05 + (number % columns) * width / columns) / width
        middle = 1 - (0.05 + line * (1.6 + number // columns)) / height
        colour = SCALE_COLOURS[number % len(SCALE_COLOURS)]
        figure.add_artist(Line2D([left, left + 0.16 / width], [middle, middle], color=colour, linewidth=2.5))
        figure.text(left + 0.22 / width, middle, entry, va="center_baseline", fontsize=size)
    if matched.meaning:
        middle = 1 - (0.05 + line * (1.6 + rows)) / height
        figure.text(
            0.05 / width, middle, f"score: {matched.meaning}", va="center_baseline", fontsize=size, color="#505050"
        )
    return figure, axes


def _fitting_names(first: str, second: str, room: int) -> str:
    """Both names in so many characters: their beginnings, by which folders differ, and their ends."""

    def shortened(name: str) -> str:
        kept = (room - len(between)) // 2 - 1
        return name if len(name) <= kept else f"{name[: kept // 2]}…{name[kept // 2 - kept :]}"

    between = " | "
    whole = first + between + second
    return whole if len(whole) <= room else shortened(first) + between + shortened(second)


def _entry(matched: MatchedPair, scale: int) -> str:
    score, side = matched.pair.scores[scale], matched.query_grids[scale].patch_size
    matches, inliers = len(matched.pair.matches[scale]), counted(int(score.inliers.sum()), "inlier")
    return f"{side}×{side}: {inliers} of {counted(matches, 'match', 'matches')}, score {score.value:.4g}"


def _rectangles(centers: NDArray[np.float64], sides: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]) / 2 * sides
    return [center + corners for center in centers]
