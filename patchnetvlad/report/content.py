"""What a result page shows of a run, as plain values: outcomes, candidates, matches, positions."""

import math
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.ground_truth import GroundTruth
from patchnetvlad.image_lists import ImageList
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.recall import ranks_of_first_match
from patchnetvlad.reranking import PairScore

CANDIDATES_SHOWN = 5
MATCHES_BUDGET = 20_000_000  # characters
LARGE_RUN = 500  # queries, beyond which only their best candidates' matches are stored
_OUTLIERS_SHOWN = 80  # of a pair and patch size, evenly taken
_MAP_POINTS = 20_000  # database pictures on the map, evenly taken

Positives = Sequence[NDArray[np.int64]]
Shown = tuple[float | None, ...]
"""A candidate on the page: place in its database, score, right (1, 0 or None), distance (or None)."""


@dataclass(frozen=True)
class DrawnMatches:
    """Matches of one pair at one patch size, small enough for a page.

    positions: uint8, M×4, query x and y and reference x and y in 1/255 of each picture, inliers first.
    """

    patch_size: int
    score: float
    num_matches: int
    num_inliers: int
    positions: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ReportContent:
    """What a page shows. stages: database indices nQ×k under each stage's name, −1 for none, retrieval first;
    scores: the same shape or shorter rows, larger is better; confidence: of each query's best prediction, comparable
    between queries, for the stages that have such a number, and what it is called."""

    queries: ImageList
    database: ImageList
    stages: Mapping[str, NDArray[np.int64]]
    scores: Mapping[str, NDArray[np.floating]]
    confidence: Mapping[str, tuple[str, NDArray[np.float64]]]
    ground_truth: GroundTruth | None
    matches: Callable[[int, int], Sequence[DrawnMatches]] | None = None  # of a query's and a database row
    settings: Mapping[str, str] = field(default_factory=dict)
    exif_rotation: bool = False

    @cached_property
    def positives(self) -> Positives | None:
        """Database rows that truly match each query; None without ground truth."""
        return self.ground_truth.positives() if self.ground_truth else None

    @cached_property
    def nearest_matches(self) -> list[int | None]:
        """The true match nearest to each query; empty without ground truth."""
        if self.ground_truth is None or self.positives is None:
            return []
        database = self.ground_truth.utm_database
        return [
            int(rows[np.linalg.norm(database[rows] - query, axis=1).argmin()]) if len(rows) else None
            for query, rows in zip(self.ground_truth.utm_query, self.positives, strict=True)
        ]

    @cached_property
    def used_rows(self) -> list[int]:
        """Database rows that the page shows pictures of, ascending."""
        shown = {int(row) for indices in self.stages.values() for row in indices[:, :CANDIDATES_SHOWN].flat if row >= 0}
        return sorted(shown.union(row for row in self.nearest_matches if row is not None))

    def ranks(self, stage: str) -> NDArray[np.float64]:
        """Rank of each query's first true match in a stage, infinite for none. Needs ground truth."""
        assert self.positives is not None
        return ranks_of_first_match(self.stages[stage], self.positives)

    def distance(self, row: int, index: int) -> float | None:
        """From a query to a database picture; None without ground truth."""
        if self.ground_truth is None:
            return None
        return number(np.linalg.norm(self.ground_truth.utm_query[row] - self.ground_truth.utm_database[index]))


def outcomes(content: ReportContent) -> list[str]:
    """right, wrong, rescued and lost (by re-ranking), none (no match exists) of each query; empty without truth."""
    if content.positives is None:
        return []
    ranks = [content.ranks(stage) for stage in content.stages]
    named = []
    for before, after, matches in zip(ranks[0] == 1, ranks[-1] == 1, content.positives, strict=True):
        if len(matches) == 0:
            named.append("none")
        elif before == after:
            named.append("right" if after else "wrong")
        else:
            named.append("rescued" if after else "lost")
    return named


def match_ranks(content: ReportContent) -> list[list[int]]:
    """Rank of each query's first true match in each stage, 0 where it is not among the candidates."""
    if content.positives is None:
        return []
    ranks = [content.ranks(stage) for stage in content.stages]
    return [[int(rank) if math.isfinite(rank) else 0 for rank in row] for row in zip(*ranks, strict=True)]


def candidates(content: ReportContent) -> list[list[list[Shown]]]:
    """The best candidates of each query in each stage."""
    place = {row: position for position, row in enumerate(content.used_rows)}
    positives = [set(rows.tolist()) for rows in content.positives] if content.positives is not None else None
    by_query: list[list[list[Shown]]] = []
    for row in range(len(content.queries)):
        stages: list[list[Shown]] = []
        for stage, indices in content.stages.items():
            best = [int(index) for index in indices[row, :CANDIDATES_SHOWN] if index >= 0]
            scores: list[float | None] = [number(score) for score in content.scores[stage][row, : len(best)]]
            scores += [None] * (len(best) - len(scores))
            stages.append(
                [
                    (
                        place[index],
                        score,
                        None if positives is None else int(index in positives[row]),
                        content.distance(row, index),
                    )
                    for index, score in zip(best, scores, strict=True)
                ]
            )
        by_query.append(stages)
    return by_query


def examples(content: ReportContent) -> list[Shown | None]:
    """The nearest true match of each query."""
    place = {row: position for position, row in enumerate(content.used_rows)}
    return [
        None if nearest is None else (place[nearest], None, 1, content.distance(row, nearest))
        for row, nearest in enumerate(content.nearest_matches)
    ]


def stored_matches(content: ReportContent, progress: bool = False) -> dict[str, list[list[Any]]]:
    """Matches under "query:database place" of each query's best candidates, those that matter most first.

    The best candidate of every stage, in a small run also the others shown; of lost, rescued and wrong queries before
    the rest, until the budget is spent.
    """
    if content.matches is None:
        return {}
    place = {row: position for position, row in enumerate(content.used_rows)}
    rows = list(range(len(content.queries)))
    named = outcomes(content)
    if named:
        urgent = ("lost", "rescued", "wrong", "none", "right")
        rows.sort(key=lambda row: urgent.index(named[row]))
    columns = CANDIDATES_SHOWN if len(rows) <= LARGE_RUN else 1
    pairs = dict.fromkeys(
        (row, int(indices[row, column]))
        for column in range(columns)
        for row in rows
        for indices in reversed(list(content.stages.values()))
        if column < indices.shape[1] and indices[row, column] >= 0
    )
    stored: dict[str, list[list[Any]]] = {}
    spent = 0
    for row, index in tqdm(pairs, "Matches to show", unit="pair", disable=not progress):
        if spent > MATCHES_BUDGET:
            break
        entry = [_encoded(drawn) for drawn in content.matches(row, index)]
        stored[f"{row}:{place[index]}"] = entry
        spent += sum(len(scale[-1]) + 40 for scale in entry)
    return stored


def map_points(content: ReportContent) -> dict[str, Any] | None:
    truth = content.ground_truth
    if truth is None:
        return None
    database = truth.utm_database[:, :2]
    if len(database) > _MAP_POINTS:
        database = database[np.linspace(0, len(database) - 1, _MAP_POINTS).astype(int)]
    origin = np.minimum(database.min(axis=0), truth.utm_query[:, :2].min(axis=0))
    return {
        "queries": (truth.utm_query[:, :2] - origin).round(1).tolist(),
        "database": (database - origin).round(1).tolist(),
    }


def drawn_matches(
    pair: PairScore, query_grids: Sequence[PatchGrid], reference_grids: Sequence[PatchGrid]
) -> tuple[DrawnMatches, ...]:
    """A compared pair for a page: all inliers, and some of the outliers."""
    drawn = []
    for score, matches, query_grid, reference_grid in zip(
        pair.scores, pair.matches, query_grids, reference_grids, strict=True
    ):
        inliers = score.inliers.cpu().numpy()
        outliers = np.flatnonzero(~inliers)
        if len(outliers) > _OUTLIERS_SHOWN:
            outliers = outliers[np.linspace(0, len(outliers) - 1, _OUTLIERS_SHOWN).astype(int)]
        kept = np.concatenate([np.flatnonzero(inliers), outliers])
        shares = [
            grid.centers()[indices.cpu()].numpy() / _extent(grid)
            for grid, indices in ((query_grid, matches.query), (reference_grid, matches.reference))
        ]
        positions = np.concatenate(shares, axis=1)[kept] if len(kept) else np.zeros((0, 4))
        quantised = (positions.clip(0, 1) * 255).round().astype(np.uint8)
        drawn.append(DrawnMatches(query_grid.patch_size, score.value, len(inliers), int(inliers.sum()), quantised))
    return tuple(drawn)


def _extent(grid: PatchGrid) -> NDArray[np.float64]:
    """Width and height of the pictures in pixels, as far as the feature map tells."""
    return np.array([grid.map_width, grid.map_height]) * float(grid.geometry.stride)


def _encoded(matches: DrawnMatches) -> list[Any]:
    packed = b64encode(np.ascontiguousarray(matches.positions).tobytes()).decode("ascii")
    return [matches.patch_size, number(matches.score), matches.num_matches, matches.num_inliers, packed]


def number(value: float | np.floating) -> float | None:
    """Five digits for the page; None for what JSON has no word for."""
    return float(f"{float(value):.5g}") if math.isfinite(value) else None
