"""Ground-truth files that are right, wrong in every way, and as published."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from patchnetvlad.errors import UserError
from patchnetvlad.ground_truth import UNKNOWN_UNIT, GroundTruth, read_ground_truth, with_unit, write_ground_truth

QUERY = np.array([[0.0, 0.0], [100.0, 0.0]])
DATABASE = np.array([[3.0, 4.0], [0.0, 5.1], [100.0, 0.0]])


def write(path, **arrays):
    np.savez(path, **{"utmQ": QUERY, "utmDb": DATABASE, "posDistThr": 5} | arrays)
    return path


def lists(truth: GroundTruth):
    return [rows.tolist() for rows in truth.positives()]


def test_a_distance_equal_to_the_radius_is_a_match(tmp_path):
    truth = read_ground_truth(write(tmp_path / "gt.npz"), 2, 3)
    assert truth.radius == 5
    assert lists(truth) == [[0], [2]]
    assert all(rows.dtype == np.int64 for rows in truth.positives())


@pytest.mark.parametrize("stored", [np.array(25), np.array([25]), np.array([[25.0]]), np.float32(25)])
def test_stored_radius_of_any_shape_and_another_by_choice(tmp_path, stored):
    path = write(tmp_path / "gt.npz", posDistThr=stored)
    assert read_ground_truth(path, 2, 3).radius == 25
    assert lists(read_ground_truth(path, 2, 3, radius=6)) == [[0, 1], [2]]
    assert lists(read_ground_truth(path, 2, 3, radius=0)) == [[], [2]]


def test_a_chosen_radius_needs_no_stored_one(tmp_path):
    np.savez(tmp_path / "gt.npz", utmQ=QUERY, utmDb=DATABASE)
    assert read_ground_truth(tmp_path / "gt.npz", 2, 3, radius=5.0).radius == 5
    with pytest.raises(UserError, match=r"gt\.npz: posDistThr missing: found utmQ, utmDb"):
        read_ground_truth(tmp_path / "gt.npz", 2, 3)


@settings(deadline=None)
@given(
    query=arrays("int64", (4, 2), elements=st.integers(-6, 6)),
    database=arrays("int64", (9, 2), elements=st.integers(-6, 6)),
    squared=st.integers(0, 80),
    offset=st.sampled_from([0, 4_476_709]),
)
def test_whole_numbers_are_exact(query, database, squared, offset):
    truth = GroundTruth(query + float(offset), database + float(offset), squared**0.5)
    expected = [np.flatnonzero(((database - row) ** 2).sum(axis=1) <= squared).tolist() for row in query]
    assert lists(truth) == expected


def test_rounding_of_coordinates_does_not_lose_a_match():
    query = np.array([[584744.1, 4476709.7]])
    database = np.array([[584744.1 + 25, 4476709.7], [584744.1, 4476709.7 - 25], [584744.1 + 25.0001, 4476709.7]])
    assert lists(GroundTruth(query, database, 25.0)) == [[0, 1]]
    assert lists(GroundTruth(np.array([[1.0, 0.0]]), np.array([[1.1, 0.0]]), 0.1)) == [[0]]


def test_all_columns_count():
    assert lists(GroundTruth(np.array([[0.0, 0, 0]]), np.array([[0.0, 0, 6], [0, 0, 5]]), 5.0)) == [[1]]


def test_nothing_to_compare():
    assert lists(GroundTruth(QUERY, DATABASE[:0], 5.0)) == [[], []]
    assert lists(GroundTruth(QUERY[:0], DATABASE, 5.0)) == []


@pytest.mark.parametrize(
    ("arrays_of_file", "complaint"),
    [
        ({"utmQ": QUERY[:1]}, "utmQ has 1 row but the query list 2 pictures"),
        ({"utmDb": QUERY}, "utmDb has 2 rows but the index list 3 pictures"),
        ({"utmQ": DATABASE, "utmDb": QUERY}, "are the query and index lists swapped?"),
        ({"utmQ": QUERY[:, :1]}, r"utmQ: expected numbers, .*float64 of shape \(2, 1\)"),
        ({"utmQ": QUERY[0]}, r"utmQ: expected numbers, .*shape \(2,\)"),
        ({"utmQ": np.array([["a", "b"], ["c", "d"]])}, "utmQ: expected numbers"),
        ({"utmQ": np.zeros((2, 2), dtype=bool)}, "utmQ: expected numbers"),
        ({"utmQ": np.hstack([QUERY, QUERY])}, "utmQ has 4 columns and utmDb 2"),
        (
            {"utmDb": np.vstack([DATABASE[0], [np.nan, 0], [0, np.inf]])},
            "utmDb: 2 rows with NaN or infinity, the first is row 1",
        ),
        ({"posDistThr": np.array([1, 2])}, "posDistThr: expected one number"),
        ({"posDistThr": "wide"}, "posDistThr: expected one number"),
        ({"posDistThr": -1}, "posDistThr = -1.0: expected a distance of 0 or more"),
        ({"posDistThr": np.nan}, "posDistThr = nan"),
        ({"utmQ": np.array([[0, 0], [1, None]], dtype=object)}, "utmQ holds Python objects"),
    ],
)
def test_wrong_contents_are_refused_in_one_line(tmp_path, arrays_of_file, complaint):
    path = write(tmp_path / "gt.npz", **arrays_of_file)
    with pytest.raises(UserError, match=complaint) as caught:
        read_ground_truth(path, 2, 3)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("radius", [-1.0, float("inf"), float("nan")])
def test_wrong_radius_by_choice(tmp_path, radius):
    with pytest.raises(UserError, match=r"^--posDistThr"):
        read_ground_truth(write(tmp_path / "gt.npz"), 2, 3, radius=radius)


def test_files_that_are_no_ground_truth(tmp_path):
    intact = write(tmp_path / "gt.npz").read_bytes()
    np.save(tmp_path / "single.npy", QUERY)
    np.savez(tmp_path / "other.npz", images=QUERY)
    for name, content in (("text.npz", b"utmQ utmDb\n"), ("empty.npz", b""), ("torn.npz", intact[:200])):
        (tmp_path / name).write_bytes(content)
    position = intact.index(QUERY.tobytes()) + 3
    (tmp_path / "flipped.npz").write_bytes(intact[:position] + b"\x55" + intact[position + 1 :])
    for name, complaint in {
        "absent.npz": r"cannot be read \(No such file or directory\)",
        ".": r"cannot be read \(Is a directory",
        "text.npz": "not an .npz file",
        "empty.npz": "not an .npz file",
        "torn.npz": "not an .npz file",
        "single.npy": "holds a single array",
        "other.npz": "utmQ, utmDb, posDistThr missing: found images",
        "flipped.npz": "utmQ is damaged",
    }.items():
        with pytest.raises(UserError, match=complaint) as caught:
            read_ground_truth(tmp_path / name, 2, 3)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "num_queries", "num_database", "radius"),
    [("pitts30k_test", 6816, 10000, 25), ("tokyo247", 315, 75984, 25), ("nordland", 27592, 27592, 10)],
)
def test_published_files(real_data, name, num_queries, num_database, radius):
    path = real_data / "data" / "benchmark_lists" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the real data")
    truth = read_ground_truth(path, num_queries, num_database)
    assert truth.radius == radius
    positives = truth.positives()
    assert len(positives) == num_queries
    for query in range(0, num_queries, 997):
        distances = np.linalg.norm(truth.utm_database - truth.utm_query[query], axis=1)
        assert positives[query].tolist() == np.flatnonzero(distances <= radius).tolist()
    if name == "nordland":  # (i, i) for frame i: a radius of 10 is 7 frames
        assert positives[100].tolist() == list(range(93, 108))


@pytest.mark.parametrize(
    "value,unit,said",
    [
        (25, "m", "25 m"),
        (1, "m", "1 m"),
        (1, "frames", "1 frame"),
        (2.5, "frames", "2.5 frames"),
        (1, "model units", "1 model unit"),
        (1, UNKNOWN_UNIT, "1 unit of the ground truth"),
    ],
)
def test_distances_have_a_unit(value, unit, said):
    assert with_unit(value, unit) == said


def test_a_file_keeps_its_unit_unless_another_is_given(tmp_path):
    path, names = tmp_path / "gt.npz", (["a", "b"], ["c", "d", "e"])
    write_ground_truth(path, QUERY, DATABASE, 5, "frames", names)
    assert read_ground_truth(path, *names).unit == "frames"
    assert read_ground_truth(path, 2, 3, unit="yards").unit == "yards"
    assert read_ground_truth(write(tmp_path / "published.npz"), *names).unit == UNKNOWN_UNIT


def test_another_list_of_the_same_length_is_refused(tmp_path):
    path = tmp_path / "gt.npz"
    write_ground_truth(path, QUERY, DATABASE, 5, "m", (["a", "b"], ["c", "d", "e"]))
    for queries, database, whose in ((["b", "a"], ["c", "d", "e"], "query"), (2, ["c", "d", "f"], "index")):
        with pytest.raises(UserError, match=f"made for another {whose} list"):
            read_ground_truth(path, queries, database)
    assert lists(read_ground_truth(path, ["a", "b"], 3)) == [[0], [2]]
    published = write(tmp_path / "published.npz")
    assert lists(read_ground_truth(published, ["b", "a"], ["x", "y", "z"])) == [[0], [2]]
