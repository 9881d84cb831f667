"""Recall on rankings small enough to count by eye."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad.recall import Shift, constant_shift, recall_at


def test_recall_on_paper():
    predictions = np.array([[4, 7, 2], [1, 3, 0], [5, 6, 8], [9, 0, 1]])
    positives = [np.array([7]), np.array([0, 1]), np.array([], dtype=np.int64), np.array([2])]
    recall = recall_at(predictions, positives, (1, 2, 3))
    assert recall.n_values == (1, 2, 3)
    assert recall.all_queries == (1 / 4, 2 / 4, 2 / 4)
    assert recall.with_match == (1 / 3, 2 / 3, 2 / 3)
    assert (recall.num_queries, recall.num_without_match, recall.num_candidates) == (4, 1, 3)
    assert recall.beyond_candidates == ()


def test_short_lists_are_counted_and_named():
    recall = recall_at(np.array([[0, 1]]), [np.array([1])], (1, 5, 100))
    assert recall.all_queries == (0, 1, 1)
    assert recall.beyond_candidates == (5, 100)


def test_no_prediction_never_matches():
    recall = recall_at(np.array([[-1, -1], [0, -1]]), [np.array([-1, 3]), np.array([0])], (1, 2))
    assert recall.all_queries == (0.5, 0.5)
    assert recall_at(np.empty((2, 0), dtype=np.int64), [np.array([0])] * 2, (1,)).all_queries == (0,)


def test_recall_of_nothing_is_not_a_number():
    recall = recall_at(np.array([[0]]), [np.array([], dtype=np.int64)], (1,))
    assert recall.all_queries == (0,)
    assert math.isnan(recall.with_match[0])


def test_as_many_ground_truths_as_queries():
    with pytest.raises(ValueError):
        recall_at(np.array([[0], [1]]), [np.array([0])], (1,))


@settings(deadline=None)
@given(st.data(), st.integers(1, 8))
def test_recall_by_definition(data, num_queries):
    predictions = np.array([data.draw(st.permutations(range(10)))[:6] for _ in range(num_queries)])
    positives = [
        np.array(sorted(data.draw(st.sets(st.integers(0, 9), max_size=3))), dtype=np.int64) for _ in predictions
    ]
    n_values = (1, 3, 6)
    recall = recall_at(predictions, positives, n_values)
    for n, value in zip(n_values, recall.all_queries, strict=True):
        hits = [bool(set(row[:n]) & set(true)) for row, true in zip(predictions.tolist(), positives, strict=True)]
        assert value == sum(hits) / num_queries
    assert list(recall.all_queries) == sorted(recall.all_queries)


def test_a_constant_shift_is_found_among_wrong_matches():
    rng = np.random.default_rng(3)
    database, query = np.arange(100.0, 400.0), np.arange(60.0)
    rows = query.astype(np.int64) + 17 + rng.integers(-1, 2, 60)  # query 0 shows frame 117, give or take one
    rows[::3] = rng.integers(0, 300, 20)
    shift = constant_shift(rows[:, None], query, database, 2)
    assert shift is not None and abs(shift.frames - 117) <= 1 and shift.helps
    assert shift.found_before == 0 and shift.found_after >= 40 / 60


def test_drives_without_a_shift_are_left_alone():
    database, query = np.arange(50.0), np.arange(50.0)
    exact = constant_shift(np.arange(50)[:, None], query, database, 2)
    assert exact == Shift(0, 1.0, 1.0) and not exact.helps
    assert constant_shift(np.full((50, 1), -1), query, database, 2) is None
    assert constant_shift(np.zeros((50, 0), dtype=np.int64), query, database, 2) is None
    scattered = np.random.default_rng(1).permutation(50)[:, None]
    found = constant_shift(scattered, 1000 * query, database, 2)
    assert found is None or not found.helps
