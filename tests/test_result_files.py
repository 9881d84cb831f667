"""Every format is written, read back and, where its own tool is installed, read by that tool."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad.candidates import RankingScores
from patchnetvlad.errors import UserError
from patchnetvlad.recall import recall_at
from patchnetvlad.result_files import (
    NamedRanking,
    name_rankings,
    read_pairs,
    read_predictions,
    read_scores,
    write_hloc_pairs,
    write_kapture_pairs,
    write_msls_predictions,
    write_published_pairs,
    write_recalls,
    write_scores,
)

QUERIES = ("query/a.jpg", "query/b c.jpg")
DATABASE = ("db/0.jpg", "db/1.jpg", "/elsewhere/2.jpg")
RANKINGS = [
    NamedRanking(QUERIES[0], (DATABASE[1], DATABASE[0], DATABASE[2])),
    NamedRanking(QUERIES[1], (DATABASE[2],)),
]


def refused(complaint: str):
    return pytest.raises(UserError, match=complaint)


def test_names_of_predictions_leave_out_absent_ones():
    assert name_rankings(QUERIES, DATABASE, np.array([[1, 0, 2], [2, -1, -1]])) == RANKINGS


def test_kapture_pairs_to_the_letter(tmp_path):
    path = tmp_path / "results" / "NetVLAD_predictions.txt"
    write_kapture_pairs(path, RANKINGS)
    assert path.read_bytes().decode() == (
        "# kapture format: 1.1\n"
        "# query_image, map_image, score\n"
        "query/a.jpg, db/1.jpg, 1\n"
        "query/a.jpg, db/0.jpg, 0.5\n"
        "query/a.jpg, /elsewhere/2.jpg, 0.3333333333\n"
        "query/b c.jpg, /elsewhere/2.jpg, 1\n"
    )
    assert read_pairs(path) == RANKINGS


def test_published_pairs_to_the_letter(tmp_path):
    path = tmp_path / "NetVLAD_predictions.txt"
    write_published_pairs(path, [NamedRanking("/data/query/b c.jpg", ("/data/db/1.jpg", "/data/db/0.jpg"))])
    assert path.read_bytes().decode() == (
        "# kapture format: 1.0\n"
        "# query_image, map_image\n"
        "/data/query/b c.jpg, /data/db/1.jpg\n"
        "/data/query/b c.jpg, /data/db/0.jpg\n"
    )
    assert read_pairs(path) == [NamedRanking("/data/query/b c.jpg", ("/data/db/1.jpg", "/data/db/0.jpg"))]
    with refused("holds no comma"):
        write_published_pairs(path, [NamedRanking("/data/a,b.jpg", ("/data/db/1.jpg",))])


def test_kapture_scores_keep_long_rankings_in_order(tmp_path):
    database = tuple(f"db/{i}.jpg" for i in range(2000))
    write_kapture_pairs(tmp_path / "pairs.txt", [NamedRanking("q.jpg", database)])
    scores = [float(line.split(", ")[2]) for line in (tmp_path / "pairs.txt").read_text().splitlines()[2:]]
    assert (np.diff(scores) < 0).all() and scores[-1] > 0
    assert read_pairs(tmp_path / "pairs.txt") == [NamedRanking("q.jpg", database)]


def test_kapture_itself_reads_our_pairs(tmp_path):
    pairsfile = pytest.importorskip("kapture_localization.utils.pairsfile", exc_type=ImportError)
    write_kapture_pairs(tmp_path / "pairs.txt", RANKINGS)
    found = pairsfile.get_ordered_pairs_from_file(str(tmp_path / "pairs.txt"))
    assert [NamedRanking(query, tuple(name for name, _ in pairs)) for query, pairs in found.items()] == RANKINGS
    shorter = pairsfile.get_ordered_pairs_from_file(str(tmp_path / "pairs.txt"), topk_override=1)
    assert shorter[QUERIES[0]] == [(DATABASE[1], 1.0)]


def test_hloc_pairs_to_the_letter(tmp_path):
    rankings = [NamedRanking("q,1.jpg", ("b.jpg", "a.jpg")), NamedRanking("q2.jpg", ("b.jpg",))]
    write_hloc_pairs(tmp_path / "pairs.txt", rankings)
    assert (tmp_path / "pairs.txt").read_text() == "q,1.jpg b.jpg\nq,1.jpg a.jpg\nq2.jpg b.jpg\n"
    assert read_pairs(tmp_path / "pairs.txt") == rankings


names = st.lists(
    st.text(st.characters(codec="utf-8", categories=("L", "N", "P"), exclude_characters=",#"), min_size=1, max_size=8)
    .map(lambda text: f"images/{text}.jpg"),
    min_size=1,
    max_size=6,
    unique=True,
)  # fmt: skip


@settings(deadline=None)
@given(queries=names, database=names, data=st.data())
def test_pairs_of_any_names_come_back(tmp_path_factory, queries, database, data):
    path = tmp_path_factory.mktemp("pairs") / "pairs.txt"
    rankings = [NamedRanking(query, tuple(data.draw(st.permutations(database)))) for query in queries]
    for write in (write_kapture_pairs, write_hloc_pairs):
        write(path, rankings)
        assert read_pairs(path) == rankings
        found = read_predictions(path, queries, database)
        assert name_rankings(queries, database, found.indices) == rankings


@pytest.mark.parametrize("name", ["a,b.jpg", "#a.jpg", " a.jpg", "a.jpg "])
def test_names_that_kapture_pairs_cannot_hold(tmp_path, name):
    for ranking in (NamedRanking(name, ("db.jpg",)), NamedRanking("q.jpg", ("db.jpg", name))):
        with refused(re.escape(f"picture {name!r}")):
            write_kapture_pairs(tmp_path / "pairs.txt", [ranking])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b.jpg", "#a.jpg", "a.jpg\t", "a.jpg,"])
def test_names_that_hloc_pairs_cannot_hold(tmp_path, name):
    with refused(re.escape(f"picture {name!r}")):
        write_hloc_pairs(tmp_path / "pairs.txt", [NamedRanking("q.jpg", (name,))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "# kapture format: 1.1\n# query, map, score\nq, b, 0.2\nq, a, 0.9\n\nr, a, -3\n",
        "q,b,0.2\nq,a,0.9\nr,a,1\n",
        "\ufeffq , b , 0.2\r\nq , a , 0.9\r\nr , a , 1\r\n",
        "q, a\nq, b\nr, a\n",
        "./q a\n././q ./b\nr a\n",
        "q  a\nq\tb\nq a\nr a\n",  # the second time does not count
    ],
)
def test_pairs_of_other_tools(tmp_path, text):
    path = tmp_path / "pairs.txt"
    path.write_bytes(text.encode())
    assert read_pairs(path) == [NamedRanking("q", ("a", "b")), NamedRanking("r", ("a",))]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("q, a, 1\nq, b\n", 2),
        ("q, a, good\n", 1),
        ("q, a, nan\n", 1),
        ("# header\n\nq, , 1\n", 3),
        ("q, a, 1, 2\n", 1),
        ("q a\nq b 0.5\n", 2),
        ("alone\n", 1),
        ("three words here\n", 1),
    ],
)
def test_lines_that_are_no_pairs(tmp_path, text, line):
    (tmp_path / "pairs.txt").write_text(text)
    with refused(rf"pairs\.txt: line {line}: .*expected query"):
        read_pairs(tmp_path / "pairs.txt")


def test_files_that_are_no_pairs(tmp_path):
    with refused(r"cannot be read \(No such file"):
        read_pairs(tmp_path / "absent.txt")
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8\xff")
    with refused("not UTF-8 text"):
        read_pairs(tmp_path / "picture.jpg")


def test_predictions_of_another_method_as_array(tmp_path):
    path = tmp_path / "predictions.npy"
    np.save(path, np.array([[2, 0, 2], [-1, 1, -1]], dtype=np.int32))
    found = read_predictions(path, QUERIES, DATABASE)
    assert found.indices.tolist() == [[2, 0], [1, -1]]
    assert found.scores.tolist() == [[1, 0.5], [1, -np.inf]]
    assert (found.indices.dtype, found.scores.dtype) == (np.int64, np.float32)


def test_predictions_of_another_method_as_pairs_of_unequal_length(tmp_path):
    (tmp_path / "pairs.txt").write_text("./r ./b\nq c\nq a\n")
    found = read_predictions(tmp_path / "pairs.txt", ["q", "./r"], ["a", "./b", "c"])
    assert found.indices.tolist() == [[2, 0], [1, -1]]


def test_a_picture_listed_twice(tmp_path):
    (tmp_path / "pairs.txt").write_text("q b\nq a\n")
    assert read_predictions(tmp_path / "pairs.txt", ["q", "q"], ["a", "a", "b"]).indices.tolist() == [[2, 0], [2, 0]]


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.array([[0, 3], [0, 1]]), "index 3: the database has 3 pictures"),
        (np.array([[0, 1]]), "1 row for 2 queries"),
        (np.array([0, 1]), "expected a table of integers"),
        (np.array([[0.0], [1.0]]), "expected a table of integers"),
        (np.array([[0], [None]]), "not an .npy file of integers"),
        (np.array([[-1], [0]]), "no prediction for 1 picture such as query/a.jpg"),
        (np.empty((2, 0), dtype=int), "no prediction for 2 pictures"),
    ],
)
def test_wrong_arrays_of_predictions(tmp_path, array, complaint):
    np.save(tmp_path / "predictions.npy", array, allow_pickle=True)
    with refused(rf"^{re.escape(str(tmp_path))}.*{complaint}"):
        read_predictions(tmp_path / "predictions.npy", QUERIES, DATABASE)


def test_damaged_or_absent_array_of_predictions(tmp_path):
    with refused("cannot be read"):
        read_predictions(tmp_path / "absent.npy", QUERIES, DATABASE)
    (tmp_path / "text.npy").write_text("0 1 2\n")
    with refused("not an .npy file"):
        read_predictions(tmp_path / "text.npy", QUERIES, DATABASE)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("q a\nr a\nx a\ny a\n", "2 pictures such as x, y: not in the query list"),
        ("q a\nr other/a\n", "1 picture such as other/a: not in the index list"),
        ("q a\n", "no prediction for 1 picture such as r"),
        ("", "no prediction for 2 pictures such as q, r"),
    ],
)
def test_pairs_of_other_lists(tmp_path, text, complaint):
    (tmp_path / "pairs.txt").write_text(text)
    with refused(complaint):
        read_predictions(tmp_path / "pairs.txt", ["q", "r"], ["a", "b"])


def msls_table(path):
    """As the MSLS evaluation reads it, which needs a rectangular table."""
    return np.loadtxt(path, ndmin=2, dtype=str).tolist()


def test_msls_predictions_of_several_cities(tmp_path):
    path = tmp_path / "msls.txt"
    cph = [NamedRanking("train_val/cph/query/images/k1.jpg", ("train_val/cph/database/images/d1.jpg", "x/d-2_.jpg"))]
    sf = [
        NamedRanking("sf/k2.jpg", ("sf/d5.jpg", "sf/d6.jpg", "sf/d7.jpg")),
        NamedRanking("sf/k3.jpg", ("sf/d6.jpg",)),
    ]
    write_msls_predictions(path, cph)
    assert path.read_text() == "k1 d1 d-2_\n"
    write_msls_predictions(path, sf, append=True)
    # shorter rows repeat their last key
    assert msls_table(path) == [["k1", "d1", "d-2_", "d-2_"], ["k2", "d5", "d6", "d7"], ["k3", "d6", "d6", "d6"]]
    before = path.read_bytes()
    with refused("query k2 appears a second time"):
        write_msls_predictions(path, sf, append=True)
    assert path.read_bytes() == before
    write_msls_predictions(path, sf)
    assert len(msls_table(path)) == 2


def test_appending_to_no_file_makes_one(tmp_path):
    write_msls_predictions(tmp_path / "msls.txt", [NamedRanking("k.jpg", ("d.jpg",))], append=True)
    assert msls_table(tmp_path / "msls.txt") == [["k", "d"]]


@pytest.mark.parametrize(
    ("rankings", "complaint"),
    [
        ([NamedRanking("a/k.jpg", ())], "a/k.jpg has no prediction"),
        ([NamedRanking("a/k 1.jpg", ("d.jpg",))], "no white space"),
        ([NamedRanking("k.jpg", ("a/d.jpg", "b/d.jpg"))], "a/d.jpg and b/d.jpg have the same MSLS key d"),
        ([NamedRanking("k.jpg", ("d.jpg",))] * 2, "query k appears a second time"),
    ],
)
def test_what_msls_predictions_cannot_hold(tmp_path, rankings, complaint):
    with refused(complaint):
        write_msls_predictions(tmp_path / "msls.txt", rankings)
    assert list(tmp_path.iterdir()) == []


def test_recalls_to_the_letter(tmp_path):
    positives = [np.array([0]), np.array([1]), np.array([5])]
    netvlad = recall_at(np.array([[0, 2], [0, 1], [3, 4]]), positives, (1, 5))
    patch_netvlad = recall_at(np.array([[0, 2], [1, 0], [5, 4]]), positives, (1, 5))
    write_recalls(tmp_path / "recalls.txt", {"NetVLAD": netvlad, "PatchNetVLAD": patch_netvlad})
    assert (tmp_path / "recalls.txt").read_text() == (
        "Recall NetVLAD@1: 0.3333\n"
        "Recall NetVLAD@5: 0.6667\n"
        "Recall PatchNetVLAD@1: 1.0000\n"
        "Recall PatchNetVLAD@5: 1.0000\n"
    )
    write_recalls(tmp_path / "recalls.txt", {"NetVLAD": netvlad})
    assert "Patch" not in (tmp_path / "recalls.txt").read_text()


def test_scores_come_back(tmp_path):
    scores = RankingScores(
        (2, 5), "RANSAC", np.array([[2, 0], [1, -1]]), np.array([[0.7, -0.7], [0, 0]]), np.arange(8.0).reshape(2, 2, 2)
    )
    write_scores(tmp_path / "scores.npz", scores, QUERIES, DATABASE)
    with np.load(tmp_path / "scores.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {
            *("patch_sizes", "matcher", "indices", "fused", "per_scale"),
            *("query_names", "database_names"),
        }
    found, queries, database = read_scores(tmp_path / "scores.npz")
    assert (queries, database) == (QUERIES, DATABASE)
    assert (found.patch_sizes, found.matcher) == (scores.patch_sizes, scores.matcher)
    for field in ("indices", "fused", "per_scale"):
        np.testing.assert_array_equal(getattr(found, field), getattr(scores, field))
        assert getattr(found, field).dtype == getattr(scores, field).dtype


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.npz"
    path.write_bytes(b"old")

    def disk_full(file, **arrays):
        file.write(b"new, as far as it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    scores = RankingScores((2,), "RANSAC", np.empty((0, 0)), np.empty((0, 0)), np.empty((0, 0, 1)))
    with refused(r"scores\.npz: cannot be written \(No space left on device; the disk is full"):
        write_scores(path, scores, (), ())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("file/pairs.txt: cannot be written"):
        write_hloc_pairs(tmp_path / "file" / "pairs.txt", RANKINGS[:1])
    (tmp_path / "folder").mkdir()
    with refused("folder: cannot be written"):
        write_hloc_pairs(tmp_path / "folder", RANKINGS[:1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_hloc_pairs(tmp_path / "pairs.txt", RANKINGS[:1])
    assert (tmp_path / "pairs.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode
