"""The one run from descriptions to rankings: alike from the shell, from Python and when locating; every key counts."""

import csv
import logging
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import EXAMPLES, run, tiny_model

from patchnetvlad.commands.features import feature_match
from patchnetvlad.commands.places import locate
from patchnetvlad.config import FeatureMatchConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.ranking import Ranker, check_panoramas, visiting_order
from patchnetvlad.recognizer import PlaceRecognizer
from patchnetvlad.retrieval import Candidates
from patchnetvlad.store.arrays.codecs import CPU
from patchnetvlad.store.cache.memory_cache import PictureCache, available_memory, cache_bytes
from patchnetvlad.store.reading.patch_sources import DescribedPictures, PatchesInMemory

QUERIES = [f"queries/query{number:02}_0.jpg" for number in (0, 3, 7)]
DATABASE = [f"database/place{number:02}_0.jpg" for number in range(12)]
GRID = PatchGrid(5, 6, 2)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with features and ground truth of the example places, and the options of the model that made them."""
    folder = tmp_path_factory.mktemp("places")
    options = tiny_model(folder)
    run(options, EXAMPLES, folder, QUERIES, DATABASE)
    blocks = np.repeat(np.arange(4.0), 3)[:, None] * 100  # as cut-outs of four panoramas would have them
    np.savez(folder / "panoramas.npz", utmQ=np.zeros((3, 2)), utmDb=np.hstack([blocks, blocks]), posDistThr=10)
    return folder, options


def match(places, results: Path, *overrides: str, truth: str | None = None) -> int:
    folder, options = places
    files = ["--dataset_root_dir", str(EXAMPLES), "--result_save_folder", str(results), "-q", "--nocuda"]
    for kind, name in (("queries", "query"), ("database", "index")):
        files += [f"--{name}_file_path={folder / kind}.txt", f"--{name}_input_features_dir={folder / kind}"]
    if truth is not None:
        files += ["--ground_truth_path", str(folder / truth)]
    return feature_match([*options, *files, *(part for item in overrides for part in ("--set", item))])


def located(places, output: Path, *overrides: str) -> int:
    folder, options = places
    files = ["--ground_truth_path", str(folder / "panoramas.npz"), "--index_file_path", str(folder / "database.txt")]
    files += ["--index_input_features_dir", str(folder / "database"), "--dataset_root_dir", str(EXAMPLES)]
    files += ["--picture", *(str(EXAMPLES / name) for name in QUERIES), "--positions", str(output), "-q", "--nocuda"]
    return locate([*options, *files, *(part for item in overrides for part in ("--set", item))])


KEYS = {
    "published": [],
    "matcher": ["feature_match.matcher=spatialApproximator"],
    "weights": ["feature_match.patchweights2use=0,1"],
    "rerank_top": ["feature_match.rerank_top=4"],
    "n_values_all": ["feature_match.n_values_all=1,3"],
    "panoramas": ["feature_match.panorama_cutouts=3"],
    "index": ["feature_match.index=IVF6,Flat"],  # finds one cell of six
    "similarity": ["feature_match.similarity=float32"],
    "on_demand": ["feature_match.local_features=on_demand"],
    "cache": ["feature_match.cache_gb=0.0001"],
}


@pytest.mark.filterwarnings("ignore:.*clustering:UserWarning")
@pytest.mark.parametrize("key", KEYS)
def test_three_ways_to_query_are_one(places, tmp_path, key):
    """The same candidates and scores from the shell, from Python and when locating, whatever the settings."""
    _, options = places
    assert match(places, tmp_path, *KEYS[key]) == 0
    scores = np.load(tmp_path / "scores.npz")
    expected = [[index for index in row if index >= 0] for row in scores["indices"].tolist()]
    if key == "rerank_top":
        assert all(len(row) == 4 for row in expected)
    if key == "panoramas":
        assert all(len({index // 3 for index in row}) == len(row) == 4 for row in expected)
    if key == "index":
        assert any(len(row) < 10 for row in expected)

    assert located(places, tmp_path / "positions.csv", *KEYS[key]) == 0
    with (tmp_path / "positions.csv").open(newline="") as file:
        assert [row["best_match"] for row in csv.DictReader(file)] == [DATABASE[row[0]] for row in expected]

    overrides = [*options[3::2], *KEYS[key]]
    if key in ("on_demand", "cache"):  # which a database in memory cannot follow
        with pytest.raises(UserError, match=r"^\[feature_match\] (local_features|cache_gb) = .*memory"):
            PlaceRecognizer.load("rootsift.ini", overrides=overrides).database([EXAMPLES / name for name in DATABASE])
        return
    database = PlaceRecognizer.load("rootsift.ini", overrides=overrides).database(
        [EXAMPLES / name for name in DATABASE]
    )
    for query, row, fused in zip(QUERIES, expected, scores["fused"], strict=True):
        answers = database.query(EXAMPLES / query, top=len(row))
        assert [answer.index for answer in answers] == row
        assert [answer.score for answer in answers] == pytest.approx(fused[: len(row)], abs=1e-4)


def test_given_candidates_belong_to_lists(places, tmp_path, capsys):
    np.save(tmp_path / "given.npy", np.array([[5, 1], [2, 3], [7, 0]]))
    override = f"feature_match.pred_input_path={tmp_path / 'given.npy'}"
    assert match(places, tmp_path, override) == 0
    assert np.sort(np.load(tmp_path / "scores.npz")["indices"]).tolist() == [[1, 5], [2, 3], [0, 7]]
    assert located(places, tmp_path / "positions.csv", override) == 2
    assert "[feature_match] pred_input_path" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"\[feature_match\] pred_input_path = .*list of queries"):
        PlaceRecognizer.load("rootsift.ini", overrides=[*places[1][3::2], override]).database([])


def test_databases_that_are_no_panoramas_are_refused(places, tmp_path, capsys):
    cases = [
        (match(places, tmp_path, "feature_match.panorama_cutouts=5"), "12 pictures, 2 panoramas and 2 more"),
        (
            match(places, tmp_path, "feature_match.panorama_cutouts=4", truth="panoramas.npz"),
            "database pictures 1 to 4 have different coordinates in the ground truth, as have 2 further",
        ),
        (located(places, tmp_path / "p.csv", "feature_match.panorama_cutouts=6"), "pictures 1 to 6 have different"),
    ]
    errors = capsys.readouterr().err.splitlines()
    assert [status for status, _ in cases] == [2, 2, 2] and len(errors) == 3
    for line, (_, words) in zip(errors, cases, strict=True):
        assert words in line and "[feature_match] panorama_cutouts" in line
    assert match(places, tmp_path, "feature_match.panorama_cutouts=3", truth="panoramas.npz") == 0
    recognizer = PlaceRecognizer.load("rootsift.ini", overrides=[*places[1][3::2], "feature_match.panorama_cutouts=3"])
    with pytest.raises(UserError, match="2 pictures, 0 panoramas and 2 more"):
        recognizer.database([EXAMPLES / name for name in DATABASE[:2]])


def test_panoramas_on_paper():
    check_panoramas(2, 4, np.array([[0.0, 1], [0, 1], [5, 5], [5, 5]]))
    check_panoramas(1, 3, np.arange(6.0).reshape(3, 2))
    check_panoramas(3, 0)
    with pytest.raises(UserError, match=r"pictures 3 to 4 .*as have 0 further"):
        check_panoramas(2, 4, np.array([[0.0, 1], [0, 1], [5, 5], [5, 6]]))


def test_published_panoramas(real_data):
    path = real_data / "data" / "benchmark_lists" / "tokyo247.npz"
    positions = np.load(path)["utmDb"].astype(np.float64)
    check_panoramas(12, len(positions), positions)
    with pytest.raises(UserError, match="1 to 24"):
        check_panoramas(24, len(positions), positions)


# --- short memory ----------------------------------------------------------------------------------------------


def test_bytes_are_the_same_however_little_memory_there_is(places, tmp_path):
    settings = ("feature_match.similarity=float32", "feature_match.n_values_all=1,6")
    for name, cache in (("large", "None"), ("small", "0.0005"), ("none", "0")):
        assert match(places, tmp_path / name, *settings, f"feature_match.cache_gb={cache}") == 0
    for name in ("small", "none"):
        for file in ("scores.npz", "PatchNetVLAD_predictions.txt", "NetVLAD_predictions.txt"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "large" / file).read_bytes()
    logs = {name: (tmp_path / name / "match.log").read_text() for name in ("large", "small", "none")}
    assert "half of what is available" in logs["large"] and "WARNING" not in logs["large"]
    assert "0.0005 GB (cache_gb, as configured)" in logs["small"]
    for name in ("small", "none"):
        assert "WARNING" in logs[name] and "feature_dtype = float16 or int8" in logs[name]
        assert "rerank_top" in logs[name] and "cache_gb" in logs[name]
    reads = int(logs["large"].split("database patches: ")[1].split()[0])
    indices = np.load(tmp_path / "large/scores.npz")["indices"]
    assert reads == len(np.unique(indices))
    assert f"{indices.size - reads} times found in memory" in logs["large"]
    assert int(logs["none"].split("database patches: ")[1].split()[0]) >= indices.size


def test_half_of_the_memory_within_a_container(tmp_path):
    free = available_memory(tmp_path)
    assert free > 0 and cache_bytes(1.5) == 1_500_000_000 and cache_bytes(None) > 0
    for name, text in (("max", "1000000"), ("current", "700000"), ("stat", "anon 5\ninactive_file 100000")):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert available_memory(tmp_path) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 1_000_000
    (tmp_path / "memory").mkdir()
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "800"), ("stat", "total_inactive_file 50")):
        (tmp_path / "memory" / f"memory.{name}").write_text(text)
    assert available_memory(tmp_path) == 150


def test_the_next_query_shares_most():
    candidates = [[0, 1, 2], [7, 8, 9], [1, 2, 3], [8, 9, 10], [2, 3, 4]]
    sizes = dict.fromkeys(range(11), 10)
    assert visiting_order(candidates, sizes, 50) == [0, 2, 4, 1, 3]
    assert visiting_order(candidates, sizes, 110) == visiting_order(candidates, sizes, None) == [0, 1, 2, 3, 4]
    heavy = {**sizes, 9: 1000}
    assert visiting_order([[0, 9], [0, 1], [9, 2]], {index: heavy[index] for index in (0, 1, 2, 9)}, 50) == [0, 2, 1]
    assert visiting_order([], {}, 0) == [] and visiting_order([[], [3]], {3: 5}, 0) == [0, 1]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), unique=True), max_size=12), st.integers(0, 120))
def test_every_query_is_visited_once(candidates, room):
    sizes = {index: 1 + 3 * index for index in set(chain.from_iterable(candidates))}
    assert sorted(visiting_order(candidates, sizes, room)) == list(range(len(candidates)))


def misses_of(order: list[int], capacity: int) -> int:
    """Reads of a cache that knows the order, by definition: it drops what is used last."""
    held: set[int] = set()
    reads = 0
    for place, index in enumerate(order):
        if index not in held:
            reads += 1
            if capacity:
                held.add(index)
            if len(held) > capacity:
                rest = order[place + 1 :]
                held.remove(max(held, key=lambda other: rest.index(other) if other in rest else len(order)))
    return reads


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=40), st.integers(0, 8))
def test_the_cache_reads_as_little_as_an_announced_order_allows(order, capacity):
    cache = PictureCache(lambda index: (np.full(10, index, np.int8),), lambda index: 10, 10 * capacity, workers=0)
    cache.prefetch(order)
    for index in order:
        assert int(cache.get(index)[0][0]) == index
        assert cache.statistics.held_bytes <= 10 * capacity
    assert cache.statistics.reads == misses_of(order, capacity)
    cache.close()


def test_reading_ahead_goes_on_past_what_is_not_needed():
    read = []

    def load(index):
        read.append(index)
        return (np.zeros(1, dtype=np.uint8),)

    cache = PictureCache(load, lambda index: 1, 100, workers=1)
    cache.prefetch(range(12))
    for index in range(11):
        cache.pass_over(index)
    cache.get(11)
    cache.close()
    assert read == list(range(12))  # four ahead at most, unless passed pictures make way


def test_an_announced_order_beats_recency():
    cache = PictureCache(lambda index: (np.zeros(10, np.int8),), lambda index: 10, 20, workers=0)
    order = [0, 1, 2] * 5
    cache.prefetch(order)
    for index in order:
        cache.get(index)
    assert cache.statistics.reads == 7  # 0 and 1 stay, 2 is read again; the least recently used would give 15
    cache.close()


def pictures(count: int, seed: int) -> list[PatchFeatures]:
    generator = torch.Generator().manual_seed(seed)
    rows = [F.normalize(torch.randn(len(GRID), 12, generator=generator), dim=1) for _ in range(count)]
    return [PatchFeatures((some,), (GRID,)) for some in rows]


def test_queries_are_ranked_in_the_order_of_the_list(caplog):
    """However they are visited; memory for two pictures, of four that each query asks for."""

    visited: list[int] = []

    class Limited(PatchesInMemory):
        cache_bytes = 2 * len(GRID) * 12 * 4

        def patches(self, index, device=CPU):
            visited.append(index)
            return super().patches(index, device)

    options = FeatureMatchConfig("spatialApproximator", (4,), patchweights2use=(1.0,), similarity="float32")
    queries, database = pictures(4, 1), pictures(8, 2)
    given = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [3, 2, 1, 0], [7, 6, 5, 4]])
    chosen = Candidates(given, np.zeros(given.shape, dtype=np.float32))
    vectors = np.eye(8, dtype=np.float32)
    asked = DescribedPictures(vectors[:4], PatchesInMemory(queries))
    found = []
    for source in (PatchesInMemory(database), Limited(database)):
        ranker = Ranker(options, DescribedPictures(vectors, source), torch.device("cpu"))
        with caplog.at_level(logging.WARNING):
            found.append(ranker.rank(asked, chosen))
    assert [index // 4 for index in visited[1:]] == [0] * 8 + [1] * 8  # 0, 2, 1, 3; the first decides on 8 bits
    np.testing.assert_array_equal(found[0].indices, found[1].indices)
    np.testing.assert_array_equal(found[0].scores.per_scale, found[1].scores.per_scale)
    assert np.sort(found[0].indices).tolist() == np.sort(given).tolist()
    assert caplog.text.count("the candidates of one query take") == 1


def test_more_candidates_are_reranked_where_more_are_asked_for():
    options = FeatureMatchConfig(
        "spatialApproximator", (2,), rerank_top=1, patchweights2use=(1.0,), similarity="float32"
    )
    described = DescribedPictures(np.eye(6, dtype=np.float32), PatchesInMemory(pictures(6, 1)))
    ranker = Ranker(options, described, torch.device("cpu"))
    assert ranker.rank(described).scores.indices.shape == (6, 1)
    assert ranker.rank(described).indices.shape == (6, 2)
    assert ranker.rank(described, at_least=4).scores.indices.shape == (6, 4)
    assert (options.reranked, options.retrieved) == (1, 2)
    assert replace(options, rerank_top=None).reranked == 2
    assert replace(options, rerank_top=9).retrieved == 9
