"""The user's own pictures: one CSV file becomes training data."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchnetvlad.csv_table import read_table, write_table
from patchnetvlad.datasets.makers import MAKERS
from patchnetvlad.errors import UserError
from patchnetvlad.training_csv import earth_centred, read_training_csv
from patchnetvlad.training_data import triplet_places

METRIC = """image,easting,northing,role,city,night,panorama
q/a.jpg,0,0,train_query,north,True,False
q/b.jpg,100,0,train_query,north,False,False
d/a.jpg,6,8,train_database,north,False,False
d/b.jpg,0,25,train_database,north,False,False
d/wide.jpg,0,1,train_database,north,False,True
d/far.jpg,0,0,train_database,south,False,False
q/c.jpg,0,0,train_query,south,False,False
v/q.jpg,0,0,val_query,north,False,False
v/d.jpg,3,4,val_database,north,False,False
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "own.csv"
    path.write_text(text)
    return path


def test_roles_cities_and_distances(tmp_path: Path) -> None:
    data = read_training_csv(write(tmp_path, METRIC), tmp_path)
    assert [city.name for city in data.train] == ["north", "south"]
    places = triplet_places(data.train, 10, 25)
    names = [path.relative_to(tmp_path).as_posix() for path in places.paths]
    assert names == ["q/a.jpg", "q/c.jpg", "d/a.jpg", "d/b.jpg", "d/far.jpg"]  # q/b has no positive
    assert [names[row] for row in places.positives[0]] == ["d/a.jpg"]
    assert [names[row] for row in places.near[0]] == ["d/a.jpg", "d/b.jpg"]
    assert [names[row] for row in places.positives[1]] == ["d/far.jpg"]
    assert places.weights.tolist() == [3, 1]
    assert len(data.validation) == 1 and len(data.validation[0].database) == 1
    wide = read_training_csv(tmp_path / "own.csv", tmp_path, include_panoramas=True)
    assert len(wide.train[0].database) == 3


def test_degrees_give_metres(tmp_path: Path) -> None:
    # A minute of latitude at 45° is 1852.2 m on WGS 84, one of longitude 1314.2 m (cos φ · normal radius)
    here = earth_centred(np.array([45.0]), np.array([7.0]))
    north = earth_centred(np.array([45.0 + 1 / 60]), np.array([7.0]))
    east = earth_centred(np.array([45.0]), np.array([7.0 + 1 / 60]))
    assert np.linalg.norm(north - here) == pytest.approx(1852.2, abs=0.3)
    assert np.linalg.norm(east - here) == pytest.approx(1314.2, abs=0.3)
    text = "image,latitude,longitude,role\n" + "".join(
        f"{name}.jpg,{45 + metres / 111_132:.8f},7.0,{role}\n"
        for name, metres, role in [
            ("a", 0, "train_query"),
            ("b", 9.9, "train_database"),
            ("c", 10.1, "train_database"),
            ("d", 0, "val_query"),
            ("e", 0, "val_database"),
        ]
    )
    places = triplet_places(read_training_csv(write(tmp_path, text), tmp_path).train, 10, 25)
    assert [len(rows) for rows in (places.positives[0], places.near[0])] == [1, 2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "train_query,north,True",
            "query,north,True",
            r"own\.csv: line 2: role = 'query': expected one of train_query",
        ),
        ("easting", "east", "expected columns latitude and longitude, or easting and northing: found image, east"),
        ("northing", "north", "or easting and northing: found image, easting, north"),
        ("6,8", "6,nan", r"line 4: northing = 'nan': expected a number"),
        ("val_database", "train_database", "city north has no picture of role val_database"),
        ("image", "photo", "has no column name or path or image"),
        ("d/b.jpg", "", r"own\.csv: line 5: names no picture"),
        ("6,8", '"6,5",8', r"line 4: easting = '6,5': expected a number with a decimal point"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_training_csv(write(tmp_path, METRIC.replace(old, new)), tmp_path)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("151.2,-33.8", r"1 of 1 position out of range.*longitude swapped\?\): a\.jpg \(151\.2, -33\.8\)"),
        ("0,0", r"1 of 1 position at 0, 0 \(written without a GPS fix\?\): a\.jpg"),
    ],
)
def test_degrees_that_cannot_be(tmp_path: Path, place: str, message: str) -> None:
    """By the same rule as in the dataset maker's tables."""
    text = f"image,latitude,longitude,role\na.jpg,{place},train_query\n"
    with pytest.raises(UserError, match=message):
        read_training_csv(write(tmp_path, text), tmp_path)


def test_degrees_count_where_there_are_metres_too(tmp_path: Path) -> None:
    """Training and the dataset maker take the same of both; the metres here would have every picture in one place."""
    header, rows = "image,easting,northing,latitude,longitude,role\n", {"q.jpg": 45.0, "d.jpg": 45.0003, "e.jpg": 45.1}
    roles = ("train_query", "train_database", "train_database")
    lines = [f"{name},5,5,{place},7,{role}\n" for (name, place), role in zip(rows.items(), roles, strict=True)]
    (city,) = read_training_csv(write(tmp_path, header + "".join(lines)), tmp_path, complete=False).train
    assert [found.tolist() for found in city.positives(40)] == [[0]]  # 0.0003° of latitude are 33 m
    (tmp_path / "queries.csv").write_text(header + lines[0])
    (tmp_path / "database.csv").write_text(header + "".join(lines[1:]))
    (dataset,) = MAKERS["csv"].make(tmp_path, "queries.csv", "database.csv", radius=40)
    assert str(dataset.zone) == "32N" and [found.tolist() for found in dataset.ground_truth().positives()] == [[0]]


def test_other_spellings_of_one_table(tmp_path: Path) -> None:
    """Semicolons or tabs, byte order mark, index column, column names in any case, blank lines: no matter."""
    expected = read_training_csv(write(tmp_path, METRIC), tmp_path)
    indexed = "\n\n".join(f"{'' if row == 0 else row}, {line} " for row, line in enumerate(METRIC.splitlines()))
    head, _, rest = METRIC.partition("\n")
    for text in (
        METRIC.replace(",", ";"),
        METRIC.replace(",", "\t"),
        "\ufeff" + METRIC.replace("\n", "\r\n"),
        indexed,
        f"{head.upper()}\n{rest}",
        METRIC.replace("image,easting", "Filename,UTM_East"),
    ):
        found = read_training_csv(write(tmp_path, text), tmp_path)
        for ours, theirs in zip(
            (*found.train, *found.validation), (*expected.train, *expected.validation), strict=True
        ):
            for side, other in ((ours.queries, theirs.queries), (ours.database, theirs.database)):
                assert side.paths == other.paths
                np.testing.assert_array_equal(side.positions, other.positions)
                np.testing.assert_array_equal(side.night, other.night)


def test_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    text = METRIC.replace("q/b.jpg", "\n\nq/b.jpg").replace("6,8", "six,8")
    with pytest.raises(UserError, match=r"own\.csv: line 6: easting = 'six'"):
        read_training_csv(write(tmp_path, text), tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=("Cc", "Cs"))).map(str.strip),
            st.floats(allow_nan=False, allow_infinity=False),
            st.booleans(),
        )
    )
)
def test_written_tables_are_read_back(tmp_path: Path, rows: list[tuple[str, float, bool]]) -> None:
    path = tmp_path / "table.csv"
    write_table(path, ("image", "metres", "night"), rows)
    table = read_table(path)
    read = zip(table.text("image"), table.numbers("metres").tolist(), table.flags("night").tolist(), strict=True)
    assert list(read) == rows and b"\r" not in path.read_bytes()
