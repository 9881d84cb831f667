"""Where a query was taken: one position from those of the pictures it matches, with a radius of uncertainty."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOP = 10  # matches that vote
SHARPNESS = 1.0  # a match whose fused score (in standard deviations) is 1 lower weighs e⁻¹ as much
SHARE = 0.68  # of the weight lies within the radius of uncertainty
LIMITS = (5.0, 25.0, 100.0)  # metres; share of queries located within each


@dataclass(frozen=True, eq=False)
class Position:
    """coordinates: (c,) in the unit of the database's; radius: of uncertainty, in the same unit; supporters: matches
    near the position, out of those that voted; best: database row of the best match."""

    coordinates: NDArray[np.float64]
    radius: float
    supporters: int
    best: int


@dataclass(frozen=True)
class PositionScore:
    """median_error: over all queries; within: share of queries nearer than each of LIMITS to the truth; covered: share
    whose truth lies within the radius that was given."""

    median_error: float
    within: tuple[float, ...]
    covered: float
    num_queries: int


def estimate_position(
    indices: NDArray[np.int64], scores: NDArray[np.float64], database: NDArray[np.float64], neighbourhood: float
) -> Position:
    """Position of one query from its ranking: database rows (k,), best first, −1 for none, and fused scores (k,).

    The first TOP matches weigh exp(SHARPNESS · score). Each votes for the places within the neighbourhood (the distance
    of a true match) of its own; the match with most votes wins, so that a wrong match far away does not pull, and the
    position is the weighted mean of the matches around it. The radius is the smallest around it with SHARE of the
    weight of all matches, and not below half the distance to the next place of the database, which no query can
    resolve: two places that look alike give a large radius.
    database: M×c. Raises ValueError without any match.
    """
    kept = np.flatnonzero(indices[:TOP] >= 0)
    if not len(kept):
        raise ValueError("no match")
    rows = indices[kept]
    places = database[rows]
    weights = np.exp(SHARPNESS * (scores[kept] - scores[kept].max()))
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    near = distances <= neighbourhood
    winner = int(np.argmax(near @ weights))  # the first of equals has the best score
    around = near[winner]
    position = weights[around] @ places[around] / weights[around].sum()
    away = np.linalg.norm(places - position, axis=1)
    order = np.argsort(away, kind="stable")
    enough = np.searchsorted(np.cumsum(weights[order]), SHARE * weights.sum() * (1 - 1e-12))
    radius = max(float(away[order][min(enough, len(order) - 1)]), _resolution(position, database))
    return Position(position, radius, int(around.sum()), int(rows[0]))


def score_positions(positions: list[Position | None], truth: NDArray[np.float64]) -> PositionScore:
    """Errors of positions against the truth nQ×c; a query without a position counts as infinitely far."""
    errors = np.array(
        [
            np.inf if position is None else np.linalg.norm(position.coordinates - true)
            for position, true in zip(positions, truth, strict=True)
        ]
    )
    radii = np.array([0.0 if position is None else position.radius for position in positions])
    within = tuple(float((errors <= limit).mean()) for limit in LIMITS)
    return PositionScore(float(np.median(errors)), within, float((errors <= radii).mean()), len(errors))


def _resolution(position: NDArray[np.float64], database: NDArray[np.float64]) -> float:
    """Half the distance between the two different places of the database nearest to the position; 0 if it has one."""
    away = np.linalg.norm(database - position, axis=1)
    nearest = database[int(away.argmin())]
    steps = np.linalg.norm(database - nearest, axis=1)
    others = steps[steps > 0]
    return float(others.min()) / 2 if len(others) else 0.0
