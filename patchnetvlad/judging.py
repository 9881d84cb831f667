"""How good rankings are, beyond one number: recall with confidence, average precision, precision against recall."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.recall import Recall, found_within, recall_of_hits, true_matches

LEVEL = 0.95  # confidence of intervals


@dataclass(frozen=True, eq=False)
class Judged:
    """Rankings held against the ground truth, all that measures need.

    hits: bool nQ×k, whether prediction number j is a true match; num_matches: int64 (nQ,), true matches a query has in
    the database; scores: float64 (nQ,), of each query's best prediction, comparable between queries, larger is better;
    None where the method gives none.
    """

    hits: NDArray[np.bool_]
    num_matches: NDArray[np.int64]
    scores: NDArray[np.float64] | None = None

    def rows(self, chosen: NDArray[np.bool_]) -> "Judged":
        """Some of the queries."""
        scores = None if self.scores is None else self.scores[chosen]
        return Judged(self.hits[chosen], self.num_matches[chosen], scores)


@dataclass(frozen=True)
class PrecisionRecall:
    """Accepting a query's best prediction when its score reaches a threshold.

    precision: correct / accepted and recall: correct / queries that have a true match, one entry a threshold, from the
    highest; auc: area under precision over recall, Σ (recall step × precision); recall_at_full_precision: the largest
    recall with nothing wrong accepted.
    """

    thresholds: tuple[float, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    auc: float
    recall_at_full_precision: float


@dataclass(frozen=True)
class Measures:
    """All figures of one method; fractions 0..1, one entry an N. Intervals are Wilson's, (low, high), at LEVEL."""

    recall: Recall
    all_queries_interval: tuple[tuple[float, float], ...]
    with_match_interval: tuple[tuple[float, float], ...]
    mean_average_precision: tuple[float, ...]
    precision_recall: PrecisionRecall | None


def judge(
    predictions: NDArray[np.int64],
    positives: Sequence[NDArray[np.int64]],
    scores: NDArray[np.floating] | None = None,
) -> Judged:
    """Hold predictions nQ×k (database rows, best first, −1 for none) against the rows that truly match."""
    return Judged(
        true_matches(predictions, positives),
        np.array([len(rows) for rows in positives], dtype=np.int64),
        None if scores is None else scores.astype(np.float64),
    )


def join(datasets: Sequence[Judged]) -> Judged:
    """Several datasets, such as cities, as one; shorter lists of predictions are filled with misses."""
    width = max(dataset.hits.shape[1] for dataset in datasets)
    scores = [dataset.scores for dataset in datasets if dataset.scores is not None]
    return Judged(
        np.concatenate([np.pad(dataset.hits, ((0, 0), (0, width - dataset.hits.shape[1]))) for dataset in datasets]),
        np.concatenate([dataset.num_matches for dataset in datasets]),
        np.concatenate(scores) if len(scores) == len(datasets) else None,
    )


def measure(judged: Judged, n_values: Sequence[int]) -> Measures:
    """Every figure of one method's rankings."""
    recalled = found_within(judged.hits, n_values)
    has_match = judged.num_matches > 0
    precision = np.stack([average_precision(judged.hits, judged.num_matches, n) for n in n_values], axis=1)
    curve = None
    if judged.scores is not None and judged.hits.shape[1] and has_match.any():
        curve = precision_recall(judged.scores, judged.hits[:, 0], has_match)
    return Measures(
        recall_of_hits(judged.hits, judged.num_matches, n_values),
        _intervals(recalled),
        _intervals(recalled[has_match]),
        tuple(precision[has_match].mean(axis=0).tolist()) if has_match.any() else (float("nan"),) * len(n_values),
        curve,
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Bounds of a share, successes of trials, at LEVEL (Wilson 1927); NaN without trials.

    Trials are taken as independent: queries of one place, such as cut-outs of a panorama, are not, and the true
    interval is wider.
    """
    if trials == 0:
        return float("nan"), float("nan")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _intervals(recalled: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """Of the share of n queries that are recalled, for each of the m columns of n×m."""
    return tuple(wilson_interval(int(count), len(recalled)) for count in recalled.sum(axis=0))


def average_precision(hits: NDArray[np.bool_], num_matches: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """Average precision of the first n predictions of each query, as the MSLS evaluator defines it: (nQ,).

    The sum of the precision at every hit, divided by min(n, true matches); the evaluator's mAP@n is the mean over
    queries that have a match (NaN for the others here).
    """
    first = hits[:, :n]
    precision = first.cumsum(axis=1) / np.arange(1, first.shape[1] + 1)
    possible = np.minimum(num_matches, n)
    sums = np.where(first, precision, 0).sum(axis=1)
    return np.divide(sums, possible, out=np.full(len(hits), np.nan), where=possible > 0)


def precision_recall(
    scores: NDArray[np.float64], correct: NDArray[np.bool_], has_match: NDArray[np.bool_]
) -> PrecisionRecall:
    """Precision against recall of n queries from the score of each one's best prediction and whether it is right.

    Queries with equal scores are accepted together. At least one query must have a match.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of each run of equal scores
    right = correct[order].cumsum()[last]
    precision, recall = right / (last + 1), right / has_match.sum()
    flawless = recall[precision == 1]
    return PrecisionRecall(
        tuple(scores[order][last].tolist()),
        tuple(precision.tolist()),
        tuple(recall.tolist()),
        float((np.diff(recall, prepend=0) * precision).sum()),
        float(flawless.max()) if len(flawless) else 0.0,
    )
