"""How often a true match is among the first N predictions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Recall:
    """Recall@N for each N of n_values, as fractions 0..1.

    all_queries: found queries / all queries, the figure of the paper; with_match: found queries / queries that have
    a true match at all, the protocol of MSLS, NaN if there is none. num_candidates: length of the prediction lists;
    beyond it Recall@N counts what the lists hold.
    """

    n_values: tuple[int, ...]
    all_queries: tuple[float, ...]
    with_match: tuple[float, ...]
    num_queries: int
    num_without_match: int
    num_candidates: int

    @property
    def beyond_candidates(self) -> tuple[int, ...]:
        """The values of N that the prediction lists are too short for."""
        return tuple(n for n in self.n_values if n > self.num_candidates)


def recall_at(
    predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]], n_values: Sequence[int]
) -> Recall:
    """Recall@N of ranked database rows, nQ×k, best first; −1 stands for no prediction and never matches.

    positives: database rows that truly match, for each query. Raises ValueError unless there are as many as queries.
    """
    hits = true_matches(predictions, positives)
    return recall_of_hits(hits, np.array([len(rows) for rows in positives], dtype=np.int64), n_values)


def true_matches(predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Which predictions nQ×k are true matches; the arguments are those of recall_at."""
    hits = np.zeros(predictions.shape, dtype=bool)
    for row, (ranking, matches) in enumerate(zip(predictions, positives, strict=True)):
        hits[row] = np.isin(ranking, matches) & (ranking >= 0)
    return hits


def recall_of_hits(hits: NDArray[np.bool_], num_matches: NDArray[np.int64], n_values: Sequence[int]) -> Recall:
    """Recall@N from which predictions nQ×k are true matches and how many matches each query has in all (nQ,)."""
    num_queries, num_candidates = hits.shape
    num_without_match = int((num_matches == 0).sum())
    recalled = found_within(hits, n_values).sum(axis=0).tolist()
    return Recall(
        tuple(n_values),
        tuple(_fraction(count, num_queries) for count in recalled),
        tuple(_fraction(count, num_queries - num_without_match) for count in recalled),
        num_queries,
        num_without_match,
        num_candidates,
    )


def found_within(hits: NDArray[np.bool_], n_values: Sequence[int]) -> NDArray[np.bool_]:
    """Whether a true match is among the first N predictions: nQ×k, m values of N → nQ×m."""
    return np.stack([hits[:, :n].any(axis=1) for n in n_values], axis=1)


def ranks_of_first_match(predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Rank, 1 the best, of the first true match in each of nQ×k predictions; infinite where none is among them."""
    hits = true_matches(predictions, positives)
    if not hits.shape[1]:
        return np.full(len(hits), np.inf)
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.inf)


@dataclass(frozen=True)
class Shift:
    """A constant between the frame numbers of two drives: query n shows frame n + frames of the database.

    found_before, found_after: share of queries whose first prediction lies within the radius, without it and with it.
    """

    frames: int
    found_before: float
    found_after: float

    @property
    def helps(self) -> bool:
        """Whether it explains more queries than chance would: two, and one in twenty."""
        return self.frames != 0 and self.found_after - self.found_before >= 0.05


def constant_shift(
    predictions: NDArray[np.int64], query: NDArray[np.float64], database: NDArray[np.float64], radius: float
) -> Shift | None:
    """The shift that brings most first predictions within the radius; None where fewer than two are brought there.

    predictions: database rows nQ×k, −1 for none; query (nQ,) and database (M,): frame numbers.
    """
    asked = np.flatnonzero(predictions[:, 0] >= 0) if predictions.shape[1] else np.empty(0, dtype=np.int64)
    between = np.sort(database[predictions[asked, 0]] - query[asked]) if len(asked) else np.empty(0)
    starts = np.arange(len(between))
    ends = np.searchsorted(between, between + 2 * radius, side="right")
    if not len(between) or (ends - starts).max() < 2:
        return None
    first = int((ends - starts).argmax())
    frames = round(float(np.median(between[first : ends[first]])))
    recalls = [float((np.abs(between - shift) <= radius).sum()) / len(query) for shift in (0, frames)]
    return Shift(frames, *recalls)


def _fraction(count: int, total: int) -> float:
    return count / total if total else float("nan")
