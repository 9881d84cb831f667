"""Nearest neighbours: exactness, ties, panoramas, approximate indices."""

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from patchnetvlad import retrieval
from patchnetvlad.candidates import Candidates
from patchnetvlad.errors import UserError
from patchnetvlad.retrieval import DatabaseIndex, best_cutout_per_panorama, looks_like_cutouts, read_rows


def retrieve(queries, database, k, index="Flat", panorama_cutouts=1):
    return DatabaseIndex(database, index).search(queries, k, panorama_cutouts)


def unit_rows(count: int, dims: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_definition(queries, database, k):
    """Full sort of float64 distances; equal ones by row."""
    distances = ((queries[:, None].astype(np.float64) - database[None]) ** 2).sum(-1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, -np.take_along_axis(distances, order, axis=1)


@pytest.fixture(params=["faiss", "torch", "torch, streamed"])
def search(request, monkeypatch):
    """`retrieve` by both searches; the accelerator's one runs on the CPU here, in blocks of three rows.

    Streamed, it has room for a few rows only.
    """
    if request.param != "faiss":
        monkeypatch.setattr(retrieval, "_DATABASE_ROWS", 3)
        room = 2000 if request.param == "torch, streamed" else None
        monkeypatch.setattr(
            retrieval, "_faiss_search", lambda database: retrieval._torch_search(database, torch.device("cpu"), room)
        )
    return retrieve


@pytest.mark.parametrize("k", [1, 5, 150])
def test_exact_search(search, k):
    queries, database = unit_rows(300, 24, 0), unit_rows(150, 24, 1)
    expected, scores = by_definition(queries, database, k)
    found = search(queries, database, k)
    np.testing.assert_array_equal(found.indices, expected)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert (found.indices.dtype, found.scores.dtype) == (np.int64, np.float32)


@settings(deadline=None)
@given(
    queries=arrays("float32", (3, 2), elements=st.integers(-1, 1)),
    database=st.integers(1, 60).flatmap(lambda n: arrays("float32", (n, 2), elements=st.integers(-1, 1))),
    k=st.integers(1, 60),
)
def test_equal_distances_rank_the_lower_row_first(queries, database, k):
    k = min(k, len(database))
    expected, scores = by_definition(queries, database, k)
    found = retrieve(queries, database, k)
    np.testing.assert_array_equal(found.indices, expected)
    np.testing.assert_array_equal(found.scores, scores)


def test_many_equal_pictures(search):
    database = np.repeat(unit_rows(4, 16, 0), 100, axis=0)  # more equal neighbours than the search's margin
    found = search(database[[250, 50]], database, 40)
    np.testing.assert_array_equal(found.indices, [np.arange(200, 240), np.arange(40)])
    assert (found.scores == 0).all()


def test_no_more_candidates_than_pictures(search):
    queries, database = unit_rows(2, 8, 0), unit_rows(3, 8, 1)
    assert search(queries, database, 10).indices.shape == (2, 3)
    assert search(queries, database[:0], 10).indices.shape == (2, 0)
    assert search(queries[:0], database, 10).indices.shape == (0, 3)


def test_database_on_disk(search, tmp_path):
    database = unit_rows(30, 8, 1)
    np.save(tmp_path / "globalfeats.npy", database)
    mapped = np.load(tmp_path / "globalfeats.npy", mmap_mode="r")
    np.testing.assert_array_equal(search(database, mapped, 1).indices[:, 0], np.arange(30))


def test_best_cutout_of_each_panorama(search):
    database = np.array([[0.0], [1], [2], [10], [11], [12], [20], [21]], dtype=np.float32)  # the last is incomplete
    found = search(np.array([[11.2], [2.4]], dtype=np.float32), database, 2, panorama_cutouts=3)
    np.testing.assert_array_equal(found.indices, [[4, 6], [2, 3]])
    np.testing.assert_allclose(found.scores, [[-(0.2**2), -(8.8**2)], [-(0.4**2), -(7.6**2)]], rtol=1e-4)
    assert search(database[:1], database, 9, panorama_cutouts=3).indices.tolist() == [[0, 3, 6]]


@settings(deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 6))
def test_panoramas_are_kept_in_order_and_once(data, cutouts, k):
    rows = [data.draw(st.permutations(range(12)))[:9] for _ in range(3)]
    rows[0] = [*rows[0][:4], -1, -1, -1, -1, -1]
    indices = np.array(rows)
    scores = np.where(indices >= 0, -np.arange(9, dtype=np.float32), np.float32(-np.inf))
    found = best_cutout_per_panorama(Candidates(indices, scores), cutouts, k)
    for row, kept, kept_scores in zip(rows, found.indices.tolist(), found.scores.tolist(), strict=True):
        first_of = {}
        for index in row:
            if index >= 0:
                first_of.setdefault(index // cutouts, index)
        expected = list(first_of.values())[:k]
        assert kept[: len(expected)] == expected
        assert set(kept[len(expected) :]) <= {-1}
        assert kept_scores[: len(expected)] == [-row.index(index) for index in expected]
        assert all(score == -np.inf for score in kept_scores[len(expected) :])


def test_databases_of_cutouts_are_recognised():
    places = np.random.default_rng(0).uniform(0, 1e6, (5, 2))
    assert looks_like_cutouts(np.repeat(places, 12, axis=0))
    assert not looks_like_cutouts(np.repeat(places, 12, axis=0)[:-1])
    assert not looks_like_cutouts(np.repeat(places, 6, axis=0)[:24])
    assert not looks_like_cutouts(np.zeros((24, 2)))  # all in one place says nothing
    assert not looks_like_cutouts(places[:0])
    assert looks_like_cutouts(np.repeat(places, 6, axis=0), panorama_cutouts=6)


@pytest.mark.parametrize(("name", "expected"), [("tokyo247", True), ("pitts30k_test", False), ("nordland", False)])
def test_published_databases_of_cutouts(real_data, name, expected):
    path = real_data / "data" / "benchmark_lists" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the real data")
    assert looks_like_cutouts(np.load(path)["utmDb"]) is expected


@pytest.mark.parametrize("factory", ["HNSW16", "IVF4,Flat", "PCA8,Flat"])
def test_other_indices_find_a_picture_itself(factory):
    database = unit_rows(200, 16, 0)
    found = retrieve(database, database, 3, index=factory)
    assert found.indices.shape == (200, 3)
    assert (found.indices[:, 0] == np.arange(200)).mean() > 0.95
    finite = np.where(found.indices >= 0, found.scores, 0)
    assert np.isfinite(finite).all() and (np.diff(finite, axis=1)[found.indices[:, 1:] >= 0] <= 0).all()


def test_an_index_that_finds_too_few_says_so():
    database = unit_rows(40, 16, 0)
    found = retrieve(database[:4], database, 40, index="IVF8,Flat")  # looks into one cell of eight
    assert (found.indices[:, -1] == -1).all()
    assert (found.scores[:, -1] == -np.inf).all()


@pytest.mark.parametrize("factory", ["Foo", "IVF64,Flat", "PQ5"])
def test_wrong_indices_are_refused_in_one_line(factory):
    database = unit_rows(30, 16, 0)  # too few to train 64 cells; 5 does not divide 16
    with pytest.raises(UserError, match=rf"^\[feature_match\] index = {factory}: .*Flat\)$") as caught:
        retrieve(database, database, 3, index=factory)
    assert "\n" not in str(caught.value)


def test_faiss_leaves_its_defaults_alone():
    threads = faiss.omp_get_max_threads()
    retrieve(unit_rows(3, 4, 0), unit_rows(5, 4, 1), 2)
    assert faiss.omp_get_max_threads() == threads


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 64), st.integers(0, 3_000_000))
def test_blocks_fit_the_room_on_the_device(count, dims, room):
    rows, staying = retrieval._block_plan((count, dims), room)
    held = min(count, rows * staying) * 4 * dims
    if count * 4 * dims <= room:
        assert rows * staying >= count
    elif room >= 16 * dims:  # four rows: one that passes through, its squares, and what stays
        assert held + 2 * rows * 4 * dims <= room
    else:
        assert (rows, staying) == (1, max(0, room // (4 * dims) - 2))


def test_blocks_beyond_the_room_come_once_for_each_batch_of_queries(monkeypatch):
    database = unit_rows(40, 8, 1)
    reads = []

    class Read(np.ndarray):
        def __getitem__(self, place):
            reads.append(place.start)
            return np.asarray(self)[place]

    monkeypatch.setattr(retrieval, "_DATABASE_ROWS", 10)
    search = retrieval._torch_search(database.view(Read), torch.device("cpu"), 40 * 8 * 4 - 1)
    assert reads == [0, 9]  # these stay; two more blocks would fit, in whose place the others come
    expected, _ = by_definition(unit_rows(5, 8, 0), database, 7)
    for _ in range(2):
        reads.clear()
        np.testing.assert_array_equal(search(unit_rows(5, 8, 0), 7)[1], expected)
        assert reads == [18, 27, 36]


@pytest.mark.parametrize("first", [0, 3])
def test_rows_of_a_mapped_table_are_those_asked_for(tmp_path, first):
    """Also of a part of it, whose first row does not lie at the mapping's start."""
    table = np.random.default_rng(0).standard_normal((700, 37)).astype(np.float32)
    np.save(tmp_path / "rows.npy", table)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")[first:]
    rows = np.array([0, 5, 6, 311, 696])
    for one in (mapped, table[first:]):
        read = read_rows(one, rows)
        assert type(read) is np.ndarray
        np.testing.assert_array_equal(read, table[first + rows])
    assert read_rows(mapped, rows[:0]).shape == (0, 37)


def test_faiss_compares_as_many_queries_together_as_a_product_gains_from():
    """Its own threshold, in numbers of the queries or in queries: 16 of 512 dimensions are above either."""
    assert faiss.cvar.distance_compute_blas_threshold <= 16 * 512
    queries, database = unit_rows(40, 512, 0), unit_rows(900, 512, 1)
    expected, scores = by_definition(queries, database, 20)
    for count in (1, 15, 17, 40):  # on either side
        found = retrieve(queries[:count], database, 20)
        np.testing.assert_array_equal(found.indices, expected[:count])
        np.testing.assert_allclose(found.scores, scores[:count], atol=1e-6)
