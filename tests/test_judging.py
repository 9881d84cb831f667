"""Measures on rankings small enough to count by eye, and against definitions written out."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from patchnetvlad.errors import UserError
from patchnetvlad.judging import (
    Judged,
    average_precision,
    join,
    judge,
    measure,
    precision_recall,
    wilson_interval,
)
from patchnetvlad.judging_files import EvaluationProtocol, measure_lines, measure_record, read_judged, write_judged

PREDICTIONS = np.array([[4, 7, 2], [1, 3, 0], [5, 6, 8], [9, 0, 1]])
POSITIVES = [np.array([7]), np.array([0, 1]), np.array([], dtype=np.int64), np.array([2])]


def msls_average_precision(positives: set, ranking: list, n: int) -> float:
    """The evaluator's definition, written out."""
    total, hits = 0.0, 0
    for place, name in enumerate(ranking[:n], start=1):
        if name in positives and name not in ranking[: place - 1]:
            hits += 1
            total += hits / place
    return total / min(len(positives), n)


def test_average_precision_on_paper():
    judged = judge(PREDICTIONS, POSITIVES)
    values = average_precision(judged.hits, judged.num_matches, 3)
    assert values[:2] == pytest.approx([1 / 2, (1 + 2 / 3) / 2]) and np.isnan(values[2]) and values[3] == 0
    assert measure(judged, (3,)).mean_average_precision == pytest.approx(((1 / 2 + 5 / 6) / 3,))


@settings(deadline=None)
@given(st.data(), st.integers(1, 12))
def test_average_precision_as_the_msls_evaluator(data, n):
    ranking = data.draw(st.permutations(range(12)))[:8]
    positives = data.draw(st.sets(st.integers(0, 11), min_size=1, max_size=5))
    judged = judge(np.array([ranking]), [np.array(sorted(positives))])
    assert average_precision(judged.hits, judged.num_matches, n)[0] == pytest.approx(
        msls_average_precision(positives, ranking, n)
    )


def test_precision_and_recall_on_paper():
    # best first: right, right, wrong and right with one score, wrong; 5 queries have a match, one finds none
    scores = np.array([0.9, 0.8, 0.5, 0.5, 0.1, 0.0])
    correct = np.array([True, True, False, True, False, False])
    has_match = np.array([True, True, False, True, True, True])
    curve = precision_recall(scores, correct, has_match)
    assert curve.thresholds == (0.9, 0.8, 0.5, 0.1, 0.0)
    assert curve.precision == pytest.approx((1, 1, 3 / 4, 3 / 5, 3 / 6))
    assert curve.recall == pytest.approx((1 / 5, 2 / 5, 3 / 5, 3 / 5, 3 / 5))
    assert curve.auc == pytest.approx(1 / 5 + 1 / 5 + 3 / 4 / 5)
    assert curve.recall_at_full_precision == 2 / 5
    assert precision_recall(-scores, correct, has_match).recall_at_full_precision == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_area_as_scikit_learn(answers):
    scores, correct = np.array(answers, dtype=float).T
    correct = correct.astype(bool)
    if not correct.any():
        correct[0] = True
    area = precision_recall(scores, correct, np.ones(len(scores), dtype=bool)).auc
    assert area == pytest.approx(average_precision_score(correct, scores) * correct.mean())


def test_intervals_are_wilsons_for_all_queries_and_those_with_a_match():
    positives = [np.array([0])] * 8 + [np.array([], dtype=int)] * 2
    measured = measure(judge(np.array([[0, 1]] * 4 + [[1, 0]] * 6), positives), (1, 2))
    assert measured.all_queries_interval == (wilson_interval(4, 10), wilson_interval(8, 10))
    assert measured.with_match_interval == (wilson_interval(4, 8), wilson_interval(8, 8))
    assert measured.all_queries_interval[1] == pytest.approx((0.490162, 0.943318), abs=1e-6)  # 8 of 10, as tabulated


@given(st.integers(1, 500), st.data())
def test_wilsons_bounds_are_where_the_score_test_turns(trials, data):
    """Each bound p solves |share − p| = z·√(p(1−p)/n)."""
    successes = data.draw(st.integers(0, trials))
    share = successes / trials
    for bound in wilson_interval(successes, trials):
        assert abs(share - bound) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / trials), abs=1e-6)


def test_cities_joined_and_apart():
    parts = [judge(PREDICTIONS[:2], POSITIVES[:2], np.array([0.9, 0.2])), judge(PREDICTIONS[2:, :2], POSITIVES[2:])]
    joined = join(parts)
    assert joined.hits.shape == (4, 3) and joined.scores is None
    assert measure(joined, (1, 3)).recall.all_queries == (1 / 4, 2 / 4)
    assert measure(parts[0], (1, 3)).recall.all_queries == (1 / 2, 1)
    assert join(parts[:1]).scores.tolist() == [0.9, 0.2]


def test_nothing_to_measure_is_not_a_number():
    measured = measure(judge(PREDICTIONS[2:3], POSITIVES[2:3], np.array([1.0])), (1,))
    assert np.isnan(measured.mean_average_precision[0]) and measured.precision_recall is None
    record = measure_record(EvaluationProtocol(1, 10, 25.0), {"NetVLAD": measured})
    assert json.loads(json.dumps(record, allow_nan=False))["mean_average_precision"]["NetVLAD"]["1"] is None


def test_table_and_record():
    measures = {"NetVLAD": measure(judge(PREDICTIONS, POSITIVES, np.array([0.1, 0.9, 0.3, 0.2])), (1, 3, 5))}
    protocol = EvaluationProtocol(4, 10, 25.0, "m")
    assert measure_lines(protocol, measures) == [
        "4 queries against 10 pictures, a match within 25 m; 1 queries have no match",
        "Recall@N (%)                  1      3      5",
        "NetVLAD                    25.0   50.0   50.0",
        "NetVLAD, with a match      33.3   66.7   66.7",
        "(at N = 5 the lists hold only 3 candidates)",
    ]
    detailed = "\n".join(measure_lines(protocol, measures, details=True))
    assert "mAP@N (MSLS), NetVLAD" in detailed and "recall at 100 % precision 33.3 %" in detailed
    record = measure_record(protocol, measures)
    assert record["protocol"] == {
        "queries": 4,
        "database": 10,
        "radius": 25.0,
        "unit": "m",
        "queries_without_match": 1,
    }
    assert record["recalls"]["NetVLAD"]["all_queries"] == {"1": 0.25, "3": 0.5, "5": 0.5}
    low, high = record["recalls"]["NetVLAD"]["all_queries_interval"]["3"]
    assert 0 <= low < 0.5 < high <= 1
    assert record["precision_recall"]["NetVLAD"]["recall_at_full_precision"] == 1 / 3


def test_judged_rankings_on_disk(tmp_path):
    judged = {"NetVLAD": judge(PREDICTIONS, POSITIVES, np.arange(4.0)), "other": judge(PREDICTIONS[:, :1], POSITIVES)}
    path = tmp_path / "results" / "judged.npz"
    write_judged(path, EvaluationProtocol(4, 10, 25.0), judged)
    protocol, read = read_judged(path)
    assert protocol == EvaluationProtocol(4, 10, 25.0) and list(read) == ["NetVLAD", "other"]
    assert read["other"].scores is None and read["NetVLAD"].scores.tolist() == [0, 1, 2, 3]
    for name, part in judged.items():
        assert (read[name].hits == part.hits).all() and (read[name].num_matches == part.num_matches).all()
    assert isinstance(read["other"], Judged)
    with pytest.raises(UserError, match="a matching run without ground truth"):
        read_judged(tmp_path / "judged.npz")
    np.savez(path, hits=np.zeros(3))
    with pytest.raises(UserError, match="not the judged rankings"):
        read_judged(path)
