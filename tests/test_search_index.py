"""Search indices that are made once: what they find, that they are bound to a list and a model, and damage."""

import json

import faiss
import numpy as np
import pytest
from tiny_run import EXAMPLES, example_names, run, tiny_model

from patchnetvlad.commands.features import build_index as build_index_command
from patchnetvlad.commands.features import feature_match
from patchnetvlad.errors import UserError
from patchnetvlad.retrieval import DatabaseIndex
from patchnetvlad.search_index import build_index, default_factory, open_index

NAMES = [f"db/{number}.jpg" for number in range(600)]


def retrieve(queries, database, k, index="Flat"):
    return DatabaseIndex(database, index).search(queries, k)


def views(places: int, each: int, dims: int, seed: int) -> np.ndarray:
    """Unit rows in groups that are near each other, as pictures of one place are."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(rng.standard_normal((places, dims)), each, axis=0)
    rows += 0.5 * rng.standard_normal(rows.shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def database():
    return views(60, 10, 32, 0)


@pytest.fixture(scope="module")
def queries(database):
    rows = database[::7] + 0.05 * np.random.default_rng(1).standard_normal(database[::7].shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def overlap(found: np.ndarray, nearest: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(*rows)) / nearest.shape[1] for rows in zip(found, nearest, strict=True)]))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF8,SQ8", "HNSW16,SQ8", "PCA16,IVF4,PQ8x4"])
def test_a_built_index_finds_what_it_promises(tmp_path, database, queries, factory, shards):
    mapped_path = tmp_path / "globalfeats.npy"
    np.save(mapped_path, database)
    mapped = np.load(mapped_path, mmap_mode="r")
    built = build_index(mapped, NAMES, tmp_path / "city.json", factory, shards, neighbours=10, recall=0.95)
    assert built.record.recall >= 0.95
    assert len(list(tmp_path.glob("city.*.faiss"))) == shards == len(built.record.shards)
    index = open_index(tmp_path / "city.json", mapped, NAMES)
    assert index.record == built.record
    found, exact = retrieve(queries, mapped, 10, index), retrieve(queries, database, 10)
    assert overlap(found.indices, exact.indices) > 0.9
    distances = ((queries[:, None] - database[found.indices]) ** 2).sum(-1)  # exact, whatever the index stores
    np.testing.assert_allclose(found.scores, -distances, atol=1e-6)
    assert (np.diff(found.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("shards", [1, 4])
def test_an_exact_index_answers_as_the_exact_search_does(tmp_path, database, queries, shards):
    database = np.concatenate([database[:300], database[:300]])  # every picture twice: the first one ranks first
    build_index(database, NAMES, tmp_path / "city.json", "Flat", shards)
    found = retrieve(queries, database, 25, open_index(tmp_path / "city.json", database, NAMES))
    exact = retrieve(queries, database, 25)
    np.testing.assert_array_equal(found.indices[:, :24], exact.indices[:, :24])
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-6)


def test_the_least_effort_is_chosen(tmp_path, database):
    easy = build_index(database, NAMES, tmp_path / "easy.json", "IVF16,Flat", neighbours=5, recall=0.3)
    hard = build_index(database, NAMES, tmp_path / "hard.json", "IVF16,Flat", neighbours=5, recall=1.0)
    assert easy.record.parameters["nprobe"] < hard.record.parameters["nprobe"]
    assert 0.3 <= easy.record.recall < hard.record.recall == 1.0
    assert hard.record.widening == 1  # full descriptors need no second look


def test_coarse_codes_are_looked_up_wider(tmp_path, database):
    built = build_index(database, NAMES, tmp_path / "city.json", "PQ4x4", neighbours=30, recall=0.9)
    assert built.record.widening > 1


def test_the_recall_is_that_of_the_queries_given(tmp_path, database):
    asked = views(200, 1, 32, 5)
    built = build_index(database, NAMES, tmp_path / "city.json", "IVF32,Flat", neighbours=5, recall=0.0, queries=asked)
    assert built.record.parameters == {"nprobe": 1} and built.record.widening == 1
    _, found = faiss.read_index(str(tmp_path / "city.000.faiss")).search(asked, 5)
    nearest = faiss.knn(asked, database, 5)[1]
    assert built.record.recall == pytest.approx(overlap(found, nearest))


@pytest.mark.parametrize("factory", ["IVF32,Flat", "PQ8x4", "HNSW8,SQ4"])
def test_queries_that_were_held_out_see_the_recall_that_was_told(tmp_path, factory):
    """Pictures of the same places at half the likeness: what is found for the database's own would promise more."""
    rng = np.random.default_rng(6)
    database = views(400, 10, 64, 3)
    names = [f"{number}.jpg" for number in range(len(database))]
    other = rng.standard_normal((200, 64)).astype(np.float32)
    asked = 0.5 * database[::20] + 0.87 * other / np.linalg.norm(other, axis=1, keepdims=True)
    built = build_index(database, names, tmp_path / "city.json", factory, neighbours=20, recall=0.95)
    found, exact = retrieve(asked, database, 20, built), retrieve(asked, database, 20)
    assert overlap(found.indices, exact.indices) > built.record.recall - 0.02


@pytest.mark.parametrize("count", [1, 2, 30])
def test_small_databases(tmp_path, database, count):
    build_index(database[:count], NAMES[:count], tmp_path / "city.json", shards=5)
    index = open_index(tmp_path / "city.json", database[:count], NAMES[:count])
    found = retrieve(database[:count], database[:count], 50, index)
    assert found.indices.shape == (count, count)
    assert sorted(found.indices[0].tolist()) == list(range(count))


def test_another_list_is_refused(tmp_path, database):
    build_index(database, NAMES, tmp_path / "city.json")
    for rows, names in ((database, NAMES[::-1]), (database[:-1], NAMES[:-1])):
        with pytest.raises(UserError, match=r"city\.json: is an index of another list") as caught:
            open_index(tmp_path / "city.json", rows, names)
        assert "\n" not in str(caught.value)


def test_another_model_is_refused(tmp_path, database):
    build_index(database, NAMES, tmp_path / "city.json")
    for rows in (views(60, 10, 32, 9), database[:, :16]):
        with pytest.raises(UserError, match=r"city\.json: is an index of other descriptors") as caught:
            open_index(tmp_path / "city.json", rows, NAMES)
        assert "\n" not in str(caught.value)


def test_damage_is_told_in_one_line(tmp_path, database):
    path = tmp_path / "city.json"
    build_index(database, NAMES, path, shards=2)
    whole, shard = path.read_text(), tmp_path / "city.001.faiss"
    content = shard.read_bytes()
    messages = []
    for damage in (
        lambda: shard.write_bytes(content[:-10]),
        lambda: shard.write_bytes(b"x" * len(content)),
        shard.unlink,
        lambda: path.write_text("{"),
        lambda: path.write_text(json.dumps({**json.loads(whole), "shards": 3})),
        lambda: path.write_text(json.dumps({**json.loads(whole), "version": 99})),
        path.unlink,
    ):
        path.write_text(whole)
        shard.write_bytes(content)
        damage()
        with pytest.raises(UserError) as caught:
            open_index(path, database, NAMES)
        messages.append(str(caught.value))
    assert all("\n" not in message and str(tmp_path) in message for message in messages)
    assert len({message.split(str(tmp_path))[1] for message in messages}) >= 5


def test_building_again_leaves_no_old_shards(tmp_path, database, queries):
    path = tmp_path / "city.json"
    build_index(database, NAMES, path, shards=4)
    build_index(database, NAMES, path, shards=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["city.000.faiss", "city.001.faiss", "city.json"]
    assert open_index(path, database, NAMES).search(queries, 3).shape[0] == len(queries)


@pytest.mark.parametrize("factory", ["Foo", "IVF700,Flat", "PQ5"])
def test_impossible_factories_are_refused_in_one_line(tmp_path, database, factory):
    with pytest.raises(UserError, match=rf"^--factory {factory}: faiss cannot make this index") as caught:
        build_index(database, NAMES, tmp_path / "city.json", factory)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_default_grows_with_the_database():
    assert default_factory(100, 512) == "SQ8"
    assert default_factory(1_000_000, 512) == "PQ256x4fs"
    assert default_factory(10_000_000, 128) == "IVF16384,PQ64x4fs"
    for count, dims in ((0, 64), (20_000, 64), (20_000, 63), (10**8, 64)):
        faiss.index_factory(dims, default_factory(count, dims))


def test_commands_build_and_use_an_index(tmp_path, capsys):
    queries, database = example_names("queries")[:3], example_names("database")[:12]
    options = tiny_model(tmp_path)
    exact = run(options, EXAMPLES, tmp_path, queries, database)
    expected = (exact / "NetVLAD_predictions.txt").read_text()
    listed = ["--index_file_path", str(tmp_path / "database.txt"), "--dataset_root_dir", str(EXAMPLES)]
    features = ["--index_input_features_dir", str(tmp_path / "database")]
    capsys.readouterr()
    assert build_index_command([*options, *listed, *features, "--factory", "HNSW8", "--shards", "2", "-q"]) == 0
    assert "Recall@12 against the exact search: 1.0000" in capsys.readouterr().out
    asked = ["--query_file_path", str(tmp_path / "queries.txt")]
    assert build_index_command([*options, *listed, *features, *asked, "-q"]) == 2
    assert "give both or none" in capsys.readouterr().err
    asked += ["--query_input_features_dir", str(tmp_path / "queries")]
    assert build_index_command([*options, *listed, *features, *asked, "--factory", "HNSW8", "--shards", "2", "-q"]) == 0
    assert "Recall@12 against the exact search: 1.0000" in capsys.readouterr().out
    index = f"feature_match.index={tmp_path / 'database' / 'search_index.json'}"
    (exact / "NetVLAD_predictions.txt").unlink()
    found = run(options, EXAMPLES, tmp_path, queries, database, "--set", index)
    assert (found / "NetVLAD_predictions.txt").read_text() == expected
    swapped = ["--query_file_path", str(tmp_path / "database.txt"), "--query_input_features_dir", features[1]]
    swapped += ["--index_file_path", str(tmp_path / "queries.txt"), "--dataset_root_dir", str(EXAMPLES)]
    swapped += ["--index_input_features_dir", str(tmp_path / "queries"), "--nocuda", "--set", index]
    assert feature_match([*options, *swapped]) == 2
    assert "is an index of another list" in capsys.readouterr().err
