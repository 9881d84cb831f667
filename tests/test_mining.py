"""Mining picks what brute force would, and the loss is the formula's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad.mining import TripletSet, epoch_queries, hard_negatives, make_subset, mine, training_batches
from patchnetvlad.training_data import TripletPlaces

CPU = torch.device("cpu")


def line_of_places(num_places: int = 30, queries_each: int = 2, database_each: int = 3) -> TripletPlaces:
    """Places in a row; a place's own pictures are positives, its neighbours' are too near to be negatives."""
    num_queries = num_places * queries_each
    positives, near = [], []
    for query in range(num_queries):
        place = query // queries_each
        positives.append(num_queries + database_each * place + np.arange(database_each))
        neighbours = range(max(0, place - 1), min(num_places, place + 2))
        near.append(np.concatenate([num_queries + database_each * p + np.arange(database_each) for p in neighbours]))
    paths = tuple(Path(f"{number}.jpg") for number in range(num_queries + num_places * database_each))
    return TripletPlaces(paths, num_queries, tuple(positives), tuple(near), np.ones(num_queries))


def test_draws_follow_the_weights() -> None:
    places = line_of_places(200)
    weights = np.ones(400)
    weights[:20] = 10
    places = TripletPlaces(places.paths, 400, places.positives, places.near, weights)
    drawn = np.concatenate([epoch_queries(places, 1, epoch) for epoch in range(20)])
    assert len(drawn) == 20 * 400
    assert (drawn < 20).mean() == pytest.approx(200 / 580, abs=0.02)
    np.testing.assert_array_equal(epoch_queries(places, 1, 7), epoch_queries(places, 1, 7))
    assert (epoch_queries(places, 1, 7) != epoch_queries(places, 1, 8)).any()
    assert (epoch_queries(places, 1, 7) != epoch_queries(places, 2, 7)).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 100))
def test_no_candidate_is_near_a_query_of_the_subset(seed: int, num_queries: int, num_candidates: int) -> None:
    places = line_of_places()
    queries = np.random.default_rng(seed).integers(0, places.num_queries, num_queries)
    subset = make_subset(places, queries, num_candidates, seed, 1, 0)
    near = set(np.concatenate([places.near[query] for query in queries]).tolist())
    assert not near & set(subset.candidates.tolist())
    assert len(subset.candidates) <= num_candidates and len(set(subset.candidates)) == len(subset.candidates)
    assert (subset.candidates >= places.num_queries).all()
    described = set(subset.pictures.tolist())
    assert set(queries) | set(subset.candidates) <= described
    assert {row for query in queries for row in places.positives[query]} <= described
    if num_candidates >= places.num_database:
        assert len(subset.candidates) == places.num_database - len(near)


def test_subsets_of_an_epoch_draw_different_candidates() -> None:
    places = line_of_places(100)
    first, second = (make_subset(places, np.array([0]), 50, 3, 1, number).candidates for number in (0, 1))
    assert set(first.tolist()) != set(second.tolist())


def brute_force(places, subset, descriptors, margin, count):
    vector = dict(zip(subset.pictures.tolist(), descriptors.astype(np.float64), strict=True))
    expected = []
    for query in subset.queries.tolist():

        def distance(number, query=query):
            return np.linalg.norm(vector[query] - vector[number])

        positive = min(places.positives[query].tolist(), key=distance)
        hard = [n for n in subset.candidates.tolist() if distance(n) < distance(positive) + np.sqrt(margin)]
        if hard:
            expected.append(TripletSet(query, positive, tuple(sorted(hard, key=distance)[:count])))
    return expected


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_mining_equals_brute_force(margin: float, spread: float) -> None:
    places = line_of_places()
    rng = np.random.default_rng(4)
    queries = epoch_queries(places, 5, 1)[:40]
    assert len(set(queries)) < len(queries)  # one comes twice, and then has two triplet sets
    subset = make_subset(places, queries, 40, 5, 1, 0)
    descriptors = rng.standard_normal((len(subset.pictures), 16))
    place = np.where(subset.pictures < 60, subset.pictures // 2, (subset.pictures - 60) // 3)
    descriptors = np.random.default_rng(1).standard_normal((30, 16))[place] + spread * descriptors
    descriptors = (descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)).astype(np.float32)
    found = mine(places, subset, descriptors, margin, 5, CPU)
    assert found == brute_force(places, subset, descriptors, margin, 5)
    assert (len(found) > 5) or (margin, spread) != (0.1, 1.0)


def test_only_violating_negatives_are_hard() -> None:
    """A negative further away than positive + √margin is easy: it has no loss and must not be taken."""
    distances = torch.tensor([0.9, 0.5, 0.81, 0.82, 0.5])
    assert hard_negatives(0.5, distances, 0.1, 5) == [1, 4, 2]  # 0.5 + √0.1 = 0.8162
    assert hard_negatives(0.5, distances, 0.1, 2) == [1, 4]
    assert hard_negatives(0.1, distances, 0.1, 5) == []


def test_an_empty_subset_has_no_triplets() -> None:
    places = line_of_places(2)  # every picture is near every query
    subset = make_subset(places, np.array([0, 3]), 100, 1, 1, 0)
    assert len(subset.candidates) == 0
    rows = np.zeros((len(subset.pictures), 4), np.float32)
    assert mine(places, subset, rows, 0.1, 5, CPU) == []


def test_batches_keep_every_set() -> None:
    sets = [TripletSet(number, 10, (11,)) for number in range(7)]
    batches = training_batches(sets, 3)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert [triplet for batch in batches for triplet in batch] == sets
