"""Curves of a result page: recall with its interval, precision over recall, confidence of right and wrong answers."""

from typing import Any

import numpy as np

from patchnetvlad.judging import precision_recall, wilson_interval
from patchnetvlad.report.content import ReportContent, number

_BINS = 30
_CURVE_POINTS = 400


def curves(content: ReportContent) -> dict[str, Any]:
    """Recall@N with its 95 % interval, precision over recall, and confidence of right and wrong answers."""
    positives = content.positives
    if positives is None:
        return {}
    num_queries = len(positives)
    with_match = np.array([len(rows) > 0 for rows in positives])
    result: dict[str, Any] = {"recall": {}, "precision": {}, "confidence": {}}
    for stage, indices in content.stages.items():
        ranks = content.ranks(stage)
        points = []
        for n in _recall_steps(indices.shape[1]):
            hits = int((ranks <= n).sum())
            points.append([n, hits / num_queries, *wilson_interval(hits, num_queries)])
        result["recall"][stage] = [[number(value) for value in point] for point in points]
        if stage not in content.confidence:
            continue
        label, confidence = content.confidence[stage]
        right = ranks == 1
        if with_match.any():
            curve = precision_recall(confidence, right, with_match)
            last = len(curve.recall) - 1
            thinned = np.unique(np.linspace(0, last, min(_CURVE_POINTS, last + 1)).astype(int))
            drawn = [[number(curve.recall[at]), number(curve.precision[at])] for at in thinned]
            result["precision"][stage] = drawn
        edges = np.histogram_bin_edges(confidence, _BINS)
        result["confidence"][stage] = {
            "label": label,
            "edges": [number(edge) for edge in edges],
            "right": np.histogram(confidence[right], edges)[0].tolist(),
            "wrong": np.histogram(confidence[~right], edges)[0].tolist(),
        }
    return result


def recall_table(content: ReportContent) -> list[tuple[str, int, float, float, float]]:
    """Stage, N, Recall@N and the bounds of its 95 % interval, in percent, for a few N; empty without ground truth."""
    if content.positives is None:
        return []
    table = []
    for stage, indices in content.stages.items():
        ranks = content.ranks(stage)
        for n in (1, 5, 10):
            if n <= indices.shape[1]:
                hits = int((ranks <= n).sum())
                low, high = wilson_interval(hits, len(ranks))
                table.append((stage, n, 100 * hits / len(ranks), 100 * low, 100 * high))
    return table


def _recall_steps(most: int) -> list[int]:
    return sorted({n for n in (*range(1, 21), 25, 30, 40, 50, 75, 100, 150, 200, 500, 1000, most) if n <= most})
