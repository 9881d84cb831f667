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
    num_queries, num_candidates = predictions.shape
    rank_of_hit = ranks_of_first_match(predictions, positives)
    num_without_match = sum(len(matches) == 0 for matches in positives)
    found = [int((rank_of_hit <= n).sum()) for n in n_values]
    return Recall(
        tuple(n_values),
        tuple(_fraction(count, num_queries) for count in found),
        tuple(_fraction(count, num_queries - num_without_match) for count in found),
        num_queries,
        num_without_match,
        num_candidates,
    )


def ranks_of_first_match(predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Rank, 1 the best, of the first true match in each of nQ×k predictions; infinite where none is among them."""
    ranks = np.full(len(predictions), np.inf)
    for row, (ranking, matches) in enumerate(zip(predictions, positives, strict=True)):
        hits = np.flatnonzero(np.isin(ranking, matches) & (ranking >= 0))
        if len(hits):
            ranks[row] = hits[0] + 1
    return ranks


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Bounds of a fraction with 95 % confidence (Wilson 1927), which stay inside 0..1; NaN without trials."""
    if trials == 0:
        return float("nan"), float("nan")
    z = 1.959963984540054
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def precision_recall(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], num_with_match: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of a system that answers only above a confidence, as that falls from high to low.

    confidence, right: of each query's best prediction; recall counts right answers among num_with_match queries.
    One point for each distinct confidence: precision 0..1, recall 0..1.
    """
    order = np.argsort(-confidence, kind="stable")
    last = np.append(np.diff(confidence[order]) != 0, True)[: len(order)]  # equal confidences are accepted together
    accepted = np.arange(1, len(order) + 1)[last]
    found = np.cumsum(right[order])[last]
    return found / np.maximum(1, accepted), found / max(1, num_with_match)


def _fraction(count: int, total: int) -> float:
    return count / total if total else float("nan")
