"""Two pictures side by side with their patch matches, for people to judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.reranking import PairScore

SCALE_COLOURS = ("#ffb000", "#00c2ff", "#ff4fa3", "#7ddc3c", "#b08cff")  # by patch size; apart for the colour-blind
OUTLIER_COLOUR = "#a0a0a0"
GAP = 0.02  # between the pictures, share of their height


@dataclass(frozen=True)
class MatchedPair:
    """What a figure shows: both pictures, as files' own pixels, and how their patches match.

    grids: one for each patch size, in pixels of the resized pictures; size: (height, width) they were resized to, or
    None when they kept their own.
    """

    query: Image.Image
    reference: Image.Image
    query_grids: Sequence[PatchGrid]
    reference_grids: Sequence[PatchGrid]
    pair: PairScore
    size: tuple[int, int] | None = None


def match_figure(matched: MatchedPair, score: float, width: float = 10.0, outlines: bool = False) -> Figure:
    """Draw both pictures at their own aspect and equal height, inliers in colour over outliers in grey.

    width: of the figure in inches; outlines: draw the inliers' patches as squares.
    """
    pictures = (matched.query, matched.reference)
    widths = [picture.width / picture.height for picture in pictures]  # in units of the common height
    offset = widths[0] + GAP
    total = offset + widths[1]
    title_height = 0.62  # inches
    height = width / total + title_height
    figure = Figure(figsize=(width, height), layout=None, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1 - title_height / height))
    axes.set_axis_off()
    for picture, left, wide in zip(pictures, (0.0, offset), widths, strict=True):
        axes.imshow(np.asarray(picture), extent=(left, left + wide, 1.0, 0.0), interpolation="antialiased")
    axes.set_xlim(0, total)
    axes.set_ylim(1, 0)
    legend = []
    parts = []
    for number, (query_grid, reference_grid, found, result) in enumerate(
        zip(matched.query_grids, matched.reference_grids, matched.pair.matches, matched.pair.scores, strict=True)
    ):
        colour = SCALE_COLOURS[number % len(SCALE_COLOURS)]
        start = query_grid.centers()[found.query].numpy() * _unit(matched.size, pictures[0])
        end = reference_grid.centers()[found.reference].numpy() * _unit(matched.size, pictures[1]) + (offset, 0.0)
        inliers = result.inliers.numpy()
        lines = np.stack([start, end], axis=1)  # M×2×2
        axes.add_collection(
            LineCollection(list(lines[~inliers]), colors=OUTLIER_COLOUR, linewidths=0.4, alpha=0.35, zorder=2)
        )
        axes.add_collection(
            LineCollection(list(lines[inliers]), colors=colour, linewidths=0.9, alpha=0.8, zorder=3 + number)
        )
        for points in (start[inliers], end[inliers]):
            axes.plot(*points.T, "o", color=colour, markersize=2.2, markeredgewidth=0, zorder=10 + number)
        if outlines:
            for points, grid, picture in (
                (start[inliers], query_grid, pictures[0]),
                (end[inliers], reference_grid, pictures[1]),
            ):
                axes.add_collection(
                    LineCollection(
                        _squares(points, grid.patch_pixels * _unit(matched.size, picture)),
                        colors=colour,
                        linewidths=0.5,
                        alpha=0.6,
                        zorder=2.5,
                    )
                )
        legend.append(Line2D([], [], color=colour, linewidth=2))
        side = query_grid.patch_size
        parts.append(
            f"{side}×{side} patches: {int(inliers.sum())} inliers of {len(found)} matches, score {result.value:.4g}"
        )
    figure.text(0.008, 1 - 0.10 / height, f"Similarity {score:.5f}", ha="left", va="top", fontsize=11, weight="bold")
    axes_legend = figure.legend(
        legend,
        parts,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.30 / height),
        ncols=max(1, len(parts)),
        frameon=False,
        fontsize=8,
        handlelength=1.2,
        borderaxespad=0.3,
        columnspacing=1.5,
    )
    axes_legend.set_in_layout(False)
    return figure


def save_figure(figure: Figure, path: Path, dots_per_inch: int = 160) -> None:
    """Write a figure as the kind of file its name says (.png, .pdf, .svg)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dots_per_inch)


def _unit(size: tuple[int, int] | None, picture: Image.Image) -> np.ndarray:
    """Factors (x, y) from pixels of the resized picture to the figure's unit, the picture's height."""
    height, width = size or (picture.height, picture.width)
    return np.array([picture.width / picture.height / width, 1 / height])


def _squares(centers: np.ndarray, sides: np.ndarray) -> list[np.ndarray]:
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]) / 2 * sides
    return [center + corners for center in centers]
