"""The user's own pictures: one CSV file becomes training data."""

from pathlib import Path

import numpy as np
import pytest

from patchnetvlad.errors import UserError
from patchnetvlad.training_csv import earth_centred, read_own_dataset
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
    data = read_own_dataset(write(tmp_path, METRIC), tmp_path)
    assert [city.name for city in data.train] == ["north", "south"]
    places = triplet_places(data.train, 10, 25)
    names = [path.relative_to(tmp_path).as_posix() for path in places.paths]
    assert names == ["q/a.jpg", "q/c.jpg", "d/a.jpg", "d/b.jpg", "d/far.jpg"]  # q/b has no positive
    assert [names[row] for row in places.positives[0]] == ["d/a.jpg"]
    assert [names[row] for row in places.near[0]] == ["d/a.jpg", "d/b.jpg"]
    assert [names[row] for row in places.positives[1]] == ["d/far.jpg"]
    assert places.weights.tolist() == [3, 1]
    assert len(data.validation) == 1 and len(data.validation[0].database) == 1
    wide = read_own_dataset(tmp_path / "own.csv", tmp_path, include_panoramas=True)
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
    places = triplet_places(read_own_dataset(write(tmp_path, text), tmp_path).train, 10, 25)
    assert [len(rows) for rows in (places.positives[0], places.near[0])] == [1, 2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "train_query,north,True",
            "query,north,True",
            r"own\.csv: line 2: role = 'query': expected one of train_query",
        ),
        ("easting", "x", "neither columns easting and northing nor latitude and longitude"),
        ("northing", "y", "has no column northing"),
        ("6,8", "6,nan", r"line 4: northing = 'nan': expected a number"),
        ("val_database", "train_database", "city north has no picture of role val_database"),
        ("image", "picture", "has no column image"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_own_dataset(write(tmp_path, METRIC.replace(old, new)), tmp_path)


def test_swapped_degrees(tmp_path: Path) -> None:
    text = "image,latitude,longitude,role\na.jpg,151.2,-33.8,train_query\n"
    with pytest.raises(UserError, match=r"line 2: latitude 151\.2, longitude -33\.8"):
        read_own_dataset(write(tmp_path, text), tmp_path)
