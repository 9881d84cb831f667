"""Makers against the published lists: data of the distributed form is built from them and must read back equal."""

import csv
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from patchnetvlad.commands.datasets import make_dataset
from patchnetvlad.datasets.makers import MAKERS, finish
from patchnetvlad.datasets.matlab import FIELDS
from patchnetvlad.errors import UserError
from patchnetvlad.ground_truth import read_ground_truth
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.ranking import check_panoramas


@pytest.fixture(scope="module")
def published(real_data: Path) -> Path:
    return real_data / "data" / "benchmark_lists"


def refused(complaint: str):
    return pytest.raises(UserError, match=complaint)


def names_of(path: Path) -> tuple[str, ...]:
    return read_image_list(path, path.parent).names


def touch(root: Path, names) -> None:
    for folder in {(root / name).parent for name in names}:
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).touch()


def run(*arguments) -> None:
    assert make_dataset(["-q", *map(str, arguments)]) == 0


def cells(names) -> np.ndarray:
    """MATLAB's cell column of strings."""
    column = np.empty((len(names), 1), dtype=object)
    column[:, 0] = names
    return column


def write_struct(path: Path, queries, database, utm_queries, utm_database, which="test", **changes) -> None:
    struct = {
        "whichSet": which,
        "dbImageFns": cells(database),
        "utmDb": utm_database.T,
        "qImageFns": cells(queries),
        "utmQ": utm_queries.T,
        "numImages": float(len(database)),
        "numQueries": float(len(queries)),
        "posDistThr": 25.0,
        "posDistSqThr": 625.0,
        "nonTrivPosDistSqThr": 100.0,
    }
    assert tuple(struct) == FIELDS
    struct |= changes
    scipy.io.savemat(path, {"dbStruct": {key: value for key, value in struct.items() if value is not None}})


def small_struct(folder: Path, **changes) -> Path:
    path = folder / "pitts30k_test.mat"
    queries, database = ["000/0_pitch1.jpg"], ["000/1.jpg", "000/2.jpg"]
    write_struct(path, queries, database, np.array([[5e5, 4e6]]), np.array([[5e5, 4e6], [5.1e5, 4e6]]), **changes)
    return path


def equal_ground_truth(path: Path, expected: Path) -> None:
    with np.load(path) as made, np.load(expected) as published:
        for key in published.files:
            assert np.array_equal(made[key], published[key]), key


def test_pittsburgh_as_published(published, tmp_path, capsys):
    index, query = (names_of(published / f"pitts30k_imageNames_{part}.txt") for part in ("index", "query"))
    truth = np.load(published / "pitts30k_test.npz")
    (tmp_path / "datasets").mkdir()
    write_struct(
        tmp_path / "datasets" / "pitts30k_test.mat",
        [name.removeprefix("Pittsburgh250k/queries_real/") for name in query],
        [name.removeprefix("Pittsburgh250k/") for name in index],
        truth["utmQ"],
        truth["utmDb"],
    )
    touch(tmp_path, index + query)
    run("pitts30k", tmp_path, "--lists_dir", tmp_path / "l", "--ground_truth_dir", tmp_path / "g")
    assert names_of(tmp_path / "l" / "pitts30k_imageNames_index.txt") == index
    assert names_of(tmp_path / "l" / "pitts30k_imageNames_query.txt") == query
    equal_ground_truth(tmp_path / "g" / "pitts30k_test.npz", published / "pitts30k_test.npz")
    printed = capsys.readouterr().out
    assert "6816 queries, 10000 database pictures" in printed and "UTM zone 17N" in printed
    assert "within 25 m; 0 queries have none" in printed


def test_tokyo_as_published(published, tmp_path):
    query = names_of(published / "tokyo247_imageNames_query.txt")
    truth = np.load(published / "tokyo247.npz")
    database = [f"{i // 12000:05d}/{i}.jpg" for i in range(len(truth["utmDb"]))]  # its list is not published with these
    root = tmp_path
    write_struct(
        root / "tokyo247.mat", [Path(name).name for name in query], database, truth["utmQ"], truth["utmDb"], "test"
    )
    where = ("--lists_dir", root, "--ground_truth_dir", root, "--no_picture_check")
    run("tokyo247", root, *where)
    assert names_of(root / "tokyo247_imageNames_query.txt") == query
    index = names_of(root / "tokyo247_imageNames_index.txt")
    assert index == tuple(f"247_Tokyo_GSV_Perspective/{name}" for name in database)
    equal_ground_truth(root / "tokyo247.npz", published / "tokyo247.npz")
    read_ground_truth(root / "tokyo247.npz", 315, 75984)


def test_pictures_with_another_extension_are_listed_under_their_own(tmp_path):
    names = [f"03811/{number:02}.jpg" for number in range(12)]
    place = np.array([[4e5, 4e6]])
    write_struct(tmp_path / "tokyo247.mat", ["1.jpg"], names, place, np.repeat(place, 12, axis=0))
    (dataset,) = MAKERS["tokyo247"].make(tmp_path, mat=None)
    folder = "247_Tokyo_GSV_Perspective"
    files = [f"{folder}/{Path(name).with_suffix('.png').as_posix()}" for name in names]
    touch(tmp_path, [f"{folder}/247query_v3/1.jpg", *files])
    made, _ = finish(dataset, tmp_path, tmp_path, tmp_path)
    assert list(made.database.names) == files
    assert any("another extension, that of the file: 12 pictures" in note for note in made.notes)


def test_a_panorama_without_one_of_its_cutouts_is_left_out_whole(tmp_path):
    names = [f"03811/{number:02}.jpg" for number in range(36)]
    places = np.repeat([[4e5, 4e6], [5e5, 4e6], [6e5, 4e6]], 12, axis=0)
    write_struct(tmp_path / "tokyo247.mat", ["1.jpg"], names, places[:1], places)
    (dataset,) = MAKERS["tokyo247"].make(tmp_path, mat=None)
    folder = "247_Tokyo_GSV_Perspective"
    listed = [f"{folder}/{name}" for name in names]
    touch(tmp_path, [f"{folder}/247query_v3/1.jpg", *listed[:13], *listed[14:20], *listed[21:]])
    made, files = finish(dataset, tmp_path, tmp_path, tmp_path, leave_out=True)
    assert list(made.database.names) == [*listed[:12], *listed[24:]]
    assert any(note.startswith("left out: 10 cut-outs at hand") for note in made.notes)
    assert any(note.startswith("left out: 2 of 37 listed pictures not found") for note in made.notes)
    truth = read_ground_truth(files.ground_truth, 1, 24)
    check_panoramas(12, 24, truth.utm_database)
    for name in (listed[0], listed[-1]):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"too few are left \(another root\?\)"):
        finish(dataset, tmp_path, tmp_path, tmp_path, leave_out=True)


def test_nordland_as_published(published, tmp_path):
    index, query = (names_of(published / f"nordland_imageNames_{part}.txt") for part in ("index", "query"))
    touch(tmp_path, index + query)
    run("nordland", tmp_path, "--published", "--lists_dir", tmp_path, "--ground_truth_dir", tmp_path)
    assert names_of(tmp_path / "nordland_imageNames_index.txt") == index
    assert names_of(tmp_path / "nordland_imageNames_query.txt") == query
    equal_ground_truth(tmp_path / "nordland.npz", published / "nordland.npz")
    run("nordland", tmp_path, "--lists_dir", tmp_path, "--ground_truth_dir", tmp_path)
    truth = np.load(tmp_path / "nordland.npz")
    assert truth["utmQ"][0].tolist() == [202, 0] and truth["utmDb"][-1].tolist() == [int(index[-1][-9:-4]), 0]


@pytest.mark.parametrize("city", ["cph", "sf"])
def test_msls_as_published(published, tmp_path, city):
    rng = np.random.default_rng(0)
    for part, listed in (("query", "query"), ("database", "index")):
        names = names_of(published / f"mapillary{city}_imageNames_{listed}.txt")
        keys = [Path(name).stem for name in names]
        # pictures that the protocol leaves out stand among them
        rows = [(key, True, False) for key in keys] + [("pano", True, True), ("other_task", False, False)]
        order = sorted(rng.choice(len(rows) - 2, 2).tolist())
        rows = rows[: order[0]] + rows[-2:-1] + rows[order[0] : order[1]] + rows[-1:] + rows[order[1] : -2]
        folder = tmp_path / "Mapillary_Street_Level_Sequences" / "train_val" / city / part
        touch(tmp_path, names)
        tables = {
            "postprocessed.csv": [
                ("key", "easting", "northing"),
                *((row[0], 3e5 + i, 6e6) for i, row in enumerate(rows)),
            ],
            "subtask_index.csv": [("key", "all", "d2n"), *((row[0], row[1], False) for row in rows)],
            "raw.csv": [("key", "pano"), *((row[0], row[2]) for row in rows)],
        }
        for file, table in tables.items():
            with (folder / file).open("w", newline="") as text:
                csv.writer(text).writerows([("" if i == 0 else i - 1, *row) for i, row in enumerate(table)])
    run("msls", tmp_path, "--cities", city, "--lists_dir", tmp_path, "--ground_truth_dir", tmp_path)
    for listed in ("query", "index"):
        expected = published / f"mapillary{city}_imageNames_{listed}.txt"
        assert names_of(tmp_path / expected.name) == names_of(expected)
    truth = np.load(tmp_path / f"mapillary{city}.npz")
    assert truth["posDistThr"] == 25 and len(truth["utmQ"]) == len(
        names_of(tmp_path / f"mapillary{city}_imageNames_query.txt")
    )


@pytest.mark.parametrize("name", ["corridor", "ietower_small", "sf_toy"])
def test_small_sets_are_read_as_distributed(real_data, name):
    folder = real_data / "data" / name
    index, query = (read_image_list(folder / f"{name}_imageNames_{part}.txt", folder) for part in ("index", "query"))
    truth = read_ground_truth(folder / f"{name}.npz", len(query), len(index))
    assert all(path.is_file() for path in (*query.paths, *index.paths))
    assert any(len(rows) for rows in truth.positives())


def test_corridor_from_its_frames(real_data, tmp_path):
    folder = real_data / "data" / "corridor"
    options = ("--queries", "query", "--database", "ref", "--name", "corridor")
    run("frames", folder, *options, "--lists_dir", tmp_path, "--ground_truth_dir", tmp_path)
    for part in ("index", "query"):
        file = f"corridor_imageNames_{part}.txt"
        assert names_of(tmp_path / file) == names_of(folder / file)
    equal_ground_truth(tmp_path / "corridor.npz", folder / "corridor.npz")


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"utmQ": None}, "lacks utmQ: found whichSet"),
        ({"utmDb": None, "utmdb": np.zeros((2, 2))}, "lacks utmDb.*utmdb.*renamed"),
        ({"utmDb": np.zeros((2, 3))}, "utmDb has 3 positions but dbImageFns has 2 names"),
        ({"numQueries": 7.0}, "numQueries is 7 but qImageFns has 1 name"),
        ({"posDistSqThr": 25.0}, "posDistSqThr is 25, not the square"),
        ({"which": "val"}, "whichSet is 'val', expected 'test'"),
        ({"utmQ": np.array([[np.nan], [4e6]])}, "1 position not finite"),
        ({"posDistThr": "far"}, "posDistThr: expected one number"),
        ({"posDistThr": -25.0}, "posDistThr is -25, expected a distance"),
        ({"posDistThr": np.nan}, "posDistThr is nan, expected a distance"),
    ],
)
def test_a_struct_that_cannot_be_right(tmp_path, changes, complaint):
    small_struct(tmp_path, **changes)
    with refused(complaint):
        MAKERS["pitts30k"].make(tmp_path, mat=None, split="test")


@pytest.mark.parametrize("count", [0, 2])
def test_a_mat_file_of_no_struct_or_several(tmp_path, count):
    structs = np.zeros((1, count), dtype=[(field, np.float64) for field in FIELDS])
    scipy.io.savemat(tmp_path / "pitts30k_test.mat", {"dbStruct": structs})
    with refused(f"dbStruct is {count} structs, expected one"):
        MAKERS["pitts30k"].make(tmp_path, mat=None, split="test")


def test_mat_files_that_are_none(tmp_path):
    with refused("pitts250k_val.mat: not found in"):
        MAKERS["pitts250k"].make(tmp_path, mat=None, split="val")
    scipy.io.savemat(tmp_path / "other.mat", {"x": 1})
    with refused("holds no dbStruct: found x"):
        MAKERS["pitts30k"].make(tmp_path, mat=tmp_path / "other.mat", split="test")
    (tmp_path / "text.mat").write_text("nothing " * 30)
    with refused("not a MATLAB file"):
        MAKERS["pitts30k"].make(tmp_path, mat=tmp_path / "text.mat", split="test")


def test_absent_pictures_are_all_named_and_counted(tmp_path, capsys):
    small_struct(tmp_path)
    touch(tmp_path, ["Pittsburgh250k/queries_real/000/0_pitch1.jpg", "Pittsburgh250k/000/1.jpg"])
    where = ("--lists_dir", str(tmp_path), "--ground_truth_dir", str(tmp_path))
    assert make_dataset(["pitts30k", str(tmp_path), *where]) == 2
    assert "1 of 3 listed pictures not found" in capsys.readouterr().err
    run("pitts30k", tmp_path, *where, "--incomplete", "leave_out")
    printed = capsys.readouterr().out
    assert "left out: 1 of 3 listed pictures not found" in printed and "Pittsburgh250k/000/2.jpg" in printed
    assert np.load(tmp_path / "pitts30k_test.npz")["utmDb"].tolist() == [[5e5, 4e6]]


def test_many_absent_pictures_are_named_in_a_file(tmp_path):
    database = [f"000/{i}.jpg" for i in range(60)]
    utm = np.full((60, 2), 5e5)
    write_struct(tmp_path / "pitts30k_test.mat", ["000/q.jpg"], database, utm[:1], utm)
    touch(tmp_path, ["Pittsburgh250k/queries_real/000/q.jpg"])
    (dataset,) = MAKERS["pitts30k"].make(tmp_path, mat=None, split="test")
    with refused("60 of 61 listed pictures not found.*and 40 more; all are named in"):
        finish(dataset, tmp_path, tmp_path, tmp_path)
    assert (tmp_path / "pitts30k_missing.txt").read_text().splitlines() == [
        f"Pittsburgh250k/{name}" for name in database
    ]


def test_a_season_with_frames_missing(tmp_path):
    touch(tmp_path, [f"{season}/images-{i:05d}.png" for season in ("winter", "summer") for i in range(1, 9)])
    (tmp_path / "summer/images-00004.png").unlink()
    (dataset,) = MAKERS["nordland"].make(tmp_path)
    assert dataset.notes == ("missing in summer: 1 frame of winter: 4",)
    assert dataset.queries.coordinates[3].tolist() == [4, 0] and dataset.database.coordinates[3].tolist() == [5, 0]
    with refused("missing in summer: 1 frame of winter: 4; the published form"):
        MAKERS["nordland"].make(tmp_path, published=True)
    touch(tmp_path, ["winter/other/images-00003.png"])
    with refused("1 picture has the frame number of another"):
        MAKERS["nordland"].make(tmp_path)
    touch(tmp_path, ["autumn/view.png"])
    with refused("1 picture has no frame number"):
        MAKERS["nordland"].make(tmp_path, queries="autumn")
    with refused("no such folder"):
        MAKERS["nordland"].make(tmp_path, queries="spring")


def msls_city(root: Path, part: str, keys, city="cph", **changes) -> None:
    folder = root / "train_val" / city / part
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "postprocessed.csv": "key,easting,northing\n" + "".join(f"{key},{i},0\n" for i, key in enumerate(keys)),
        "subtask_index.csv": "key,all\n" + "".join(f"{key},True\n" for key in keys),
        "raw.csv": "key,pano\n" + "".join(f"{key},False\n" for key in keys),
    }
    for file, text in (tables | changes).items():
        (folder / file).write_text(text)


def test_msls_tables_that_cannot_be_right(tmp_path):
    with refused("holds no folder train_val or test"):
        MAKERS["msls"].make(tmp_path)
    msls_city(tmp_path, "query", ["a", "b"])
    msls_city(tmp_path, "database", ["c", "d"])
    assert MAKERS["msls"].make(tmp_path, cities=["cph"])[0].database.coordinates.tolist() == [[0, 0], [1, 0]]
    with refused("no such folder.*not downloaded"):
        MAKERS["msls"].make(tmp_path)  # sf
    msls_city(tmp_path, "query", ["a", "b"], **{"raw.csv": "key,pano\nb,False\na,False\n"})
    with refused("raw.csv: line 2: key b, but subtask_index.csv has a"):
        MAKERS["msls"].make(tmp_path, cities=["cph"])
    msls_city(tmp_path, "query", ["a", "a"])
    with refused("line 3: key a stands in line 2 too"):
        MAKERS["msls"].make(tmp_path, cities=["cph"])
    msls_city(tmp_path, "query", ["a"], **{"postprocessed.csv": "key,east,northing\na,1,2\n"})
    with refused("no column easting: found key, east, northing"):
        MAKERS["msls"].make(tmp_path, cities=["cph"])
    msls_city(tmp_path, "query", ["a"], **{"postprocessed.csv": "key,easting,northing\na,,2\n"})
    with refused("1 picture has no easting"):
        MAKERS["msls"].make(tmp_path, cities=["cph"])
    msls_city(tmp_path, "query", ["a"], **{"raw.csv": "key,pano\na,maybe\n"})
    with refused("line 2: pano = 'maybe': expected True or False"):
        MAKERS["msls"].make(tmp_path, cities=["cph"])


def test_msls_test_cities_have_lists_only(tmp_path):
    for part in ("query", "database"):
        folder = tmp_path / "test" / "miami" / part
        folder.mkdir(parents=True)
        (folder / "subtask_index.csv").write_text(",key,all\n0,k1,True\n1,k2,False\n")
    run(
        "msls",
        tmp_path,
        "--cities",
        "miami",
        "--no_picture_check",
        "--lists_dir",
        tmp_path,
        "--ground_truth_dir",
        tmp_path,
    )
    assert names_of(tmp_path / "mapillarymiami_imageNames_index.txt") == ("test/miami/database/images/k1.jpg",)
    assert not (tmp_path / "mapillarymiami.npz").exists()


def test_queries_without_match_are_left_out_on_request(tmp_path, capsys):
    msls_city(tmp_path, "query", ["a", "b"], **{"postprocessed.csv": "key,easting,northing\na,0,0\nb,900,0\n"})
    msls_city(tmp_path, "database", ["c", "d"])
    where = ("--no_picture_check", "--lists_dir", tmp_path, "--ground_truth_dir", tmp_path)
    run("msls", tmp_path, "--cities", "cph", *where)
    assert "1 query has none" in capsys.readouterr().out
    run("msls", tmp_path, "--cities", "cph", *where, "--only_queries_with_match")
    assert "left out: 1 query without a match" in capsys.readouterr().out
    assert names_of(tmp_path / "mapillarycph_imageNames_query.txt") == ("train_val/cph/query/images/a.jpg",)


def test_the_file_that_was_not_named(tmp_path, capsys):
    (tmp_path / "q.csv").write_text("name,easting,northing\na.jpg,1,2\n")
    assert make_dataset(["csv", str(tmp_path), "--queries", "q.csv"]) == 2
    told = capsys.readouterr().err
    assert f"--database database.csv: no such file, searched in {tmp_path} and in the current folder" in told
    assert "(--database names it)" in told


@pytest.mark.parametrize("place", [0, 1, 2, 6])
def test_quiet_before_and_after_the_kind(tmp_path, capsys, place):
    for side in ("queries", "database"):
        (tmp_path / side).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / side / f"{number}.png")
    words = ["folders", str(tmp_path), "--lists_dir", str(tmp_path), "--ground_truth_dir", str(tmp_path)]
    assert make_dataset([*words[:place], "-q", *words[place:]]) == 0
    captured = capsys.readouterr()
    assert not captured.err and "2 queries, 2 database pictures" in captured.out
    assert make_dataset(words) == 0
    assert "Looking for pictures" in capsys.readouterr().err


def test_csv_with_latitude_and_longitude(tmp_path):
    (tmp_path / "queries.csv").write_text("Name,Lat,Lon\nq/1.jpg,55.6761,12.5683\nq/2.jpg,55.6850,12.5683\n")
    (tmp_path / "database.csv").write_text("name,latitude,longitude\nd/1.jpg,55.6762,12.5683\n")
    (dataset,) = MAKERS["csv"].make(tmp_path, "queries.csv", "database.csv")
    # 12.57° east lies in zone 33 (12° to 18°)
    assert str(dataset.zone) == "33N" and dataset.queries.names == ("q/1.jpg", "q/2.jpg")
    assert np.abs(dataset.queries.coordinates[0] - dataset.database.coordinates[0])[1] == pytest.approx(11.1, abs=0.2)
    assert [len(rows) for rows in dataset.ground_truth().positives()] == [1, 0]


@pytest.mark.parametrize(
    "rows, complaint",
    [
        ("a.jpg,139.7,35.6\n", "1 of 1 position out of range.*swapped.*a.jpg"),
        ("a.jpg,35.6,239.7\n", "out of range.*not degrees"),
        ("a.jpg,0,0\nb.jpg,35,139\n", "1 of 2 positions at 0, 0 .*a.jpg"),
        ("a.jpg,35,139\na.jpg,35,139\n", "line 3: name a.jpg stands in line 2 too"),
        ("a.jpg,35,139\nb.jpg,,139\n", "1 of 2 rows without a position: b.jpg; --incomplete"),
        ("a.jpg,35,here\n", "line 2: longitude = 'here': expected a number"),
        ("a.jpg,35\n", "line 2: 2 values for 3 columns"),
        ("a.jpg,35,139\nb.jpg,35,-70\n", "over 20° of longitude from its middle lie 1 of 4 positions"),
        (",35,139\n", "line 2: name is empty, so the row names no picture"),
    ],
)
def test_tables_that_cannot_be_right(tmp_path, rows, complaint):
    (tmp_path / "q.csv").write_text(f"name,latitude,longitude\n{rows}")
    (tmp_path / "d.csv").write_text("name,latitude,longitude\nd.jpg,35,139\ne.jpg,35,139\n")
    with refused(complaint):
        MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")


def test_swapped_columns_in_one_table_and_other_columns(tmp_path):
    (tmp_path / "q.csv").write_text("name,latitude,longitude\na.jpg,12.5,55.6\n")
    (tmp_path / "d.csv").write_text("name,latitude,longitude\nd.jpg,55.6,12.5\n")
    with refused("unless latitude and longitude of one are swapped"):
        MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")
    (tmp_path / "q.csv").write_text("name,easting,northing\na.jpg,12.5,55.6\n")
    with refused("expected the same in both"):
        MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")
    (tmp_path / "q.csv").write_text("name,where\na.jpg,12.5\n")
    with refused("expected columns latitude and longitude.*found name, where"):
        MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")
    (tmp_path / "q.csv").write_text("picture,latitude,longitude\na.jpg,55.6,12.5\n")
    with refused("has no column name or path or"):
        MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")


def test_utm_of_several_zones_becomes_one(tmp_path):
    """Two pictures 12 m apart on both sides of 6° east, where zones 31 and 32 meet."""
    from patchnetvlad.localization.coordinates import Zone, to_utm

    west = to_utm(np.array([[50.0, 5.9999]]), Zone(31))[0]
    east = to_utm(np.array([[50.0, 6.00007]]), Zone(32))[0]
    (tmp_path / "q.csv").write_text(f"name,easting,northing,zone\nw.jpg,{west[0]},{west[1]},31N\n")
    (tmp_path / "d.csv").write_text(f"name,easting,northing,zone\ne.jpg,{east[0]},{east[1]},32N\nf.jpg,6e5,5e6,32N\n")
    (dataset,) = MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")
    assert str(dataset.zone) == "32N" and "1 position of other zones" in dataset.notes[0]
    distance = np.linalg.norm(dataset.queries.coordinates[0] - dataset.database.coordinates[0])
    assert distance == pytest.approx(12.2, abs=0.1)
    (tmp_path / "d.csv").write_text("name,easting,northing\ne.jpg,1,2\n")
    with refused("only one of them has a column zone"):
        MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")
    (tmp_path / "d.csv").write_text("name,easting,northing,zone\ne.jpg,1,2,99N\n")
    with refused("UTM zone '99N': expected a number 1 to 60"):
        MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")
    (tmp_path / "d.csv").write_text("name,easting,northing,zone\ne.jpg,5000000,500000000,32N\n")
    with refused("1 position out of UTM's range"):
        MAKERS["csv"].make(tmp_path, "q.csv", "d.csv", zone="32N")


def test_names_that_carry_utm(tmp_path):
    touch(tmp_path, ["q/@0500000.00@4000000.50@17@S@x.jpg", "d/@0500003.00@4000004.50@17@S@.jpg"])
    (dataset,) = MAKERS["at_names"].make(tmp_path, "q", "d")
    assert dataset.queries.coordinates.tolist() == [[500000.0, 4000000.5]] and str(dataset.zone) == "17N"
    assert dataset.database.coordinates.tolist() == [[500003.0, 4000004.5]]
    touch(tmp_path, ["d/@0500003.00@4000004.50@18@S@.jpg"])
    assert "1 position of other zones" in MAKERS["at_names"].make(tmp_path, "q", "d")[0].notes[0]
    touch(tmp_path, ["d/@4000004.50@500003.00@.jpg", "d/plain.jpg"])
    with refused("2 names without @easting@northing@"):
        MAKERS["at_names"].make(tmp_path, "q", "d")


def photograph(path: Path, position: tuple[float, float] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if position is not None:

        def parts(value):
            minutes = abs(value) % 1 * 60
            return (float(int(abs(value))), float(int(minutes)), minutes % 1 * 60)

        latitude, longitude = position
        gps = exif.get_ifd(0x8825)
        gps.update({1: "S" if latitude < 0 else "N", 2: parts(latitude), 3: "W" if longitude < 0 else "E"})
        gps[4] = parts(longitude)
    Image.new("RGB", (8, 8)).save(path, exif=exif)


def test_exif_positions(tmp_path, capsys):
    photograph(tmp_path / "queries/1.jpg", (-34.6037, -58.3816))
    photograph(tmp_path / "database/1.jpg", (-34.6037, -58.3815))
    (dataset,) = MAKERS["exif"].make(tmp_path, "queries", "database")
    assert str(dataset.zone) == "21S"
    assert dataset.queries.coordinates[0] == pytest.approx([373_300, 6_170_000], abs=3000)
    assert dataset.database.coordinates[0, 0] - dataset.queries.coordinates[0, 0] == pytest.approx(9.2, abs=0.2)
    photograph(tmp_path / "queries/2.jpg", None)
    with refused("1 of 3 pictures without a GPS position in EXIF: queries/2.jpg; --incomplete"):
        MAKERS["exif"].make(tmp_path, "queries", "database")
    run("exif", tmp_path, "--incomplete", "leave_out", "--lists_dir", tmp_path, "--ground_truth_dir", tmp_path)
    assert "left out: 1 of 3 pictures without a GPS position" in capsys.readouterr().out
    assert names_of(tmp_path / "dataset_imageNames_query.txt") == ("queries/1.jpg",)
    (tmp_path / "queries/3.jpg").write_bytes(b"no picture")
    with refused("3.jpg: cannot be read as a picture"):
        MAKERS["exif"].make(tmp_path, "queries", "database")


def test_every_maker_explains_itself(capsys):
    for kind in MAKERS:
        with pytest.raises(SystemExit) as ended:
            make_dataset([kind, "--help"])
        assert ended.value.code == 0
        assert "ROOT" in capsys.readouterr().out


def test_a_csv_of_a_spreadsheet(tmp_path):
    """Semicolons, a byte order mark and an index column, as office programs and pandas write them."""
    (tmp_path / "q.csv").write_text("\ufeff;Name;Easting;Northing\r\n0;a.jpg;1.5;2\r\n1;b.jpg;3;4\r\n")
    (tmp_path / "d.csv").write_text("name\teasting\tnorthing\nc.jpg\t1\t2\n")
    (dataset,) = MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")
    assert dataset.queries.names == ("a.jpg", "b.jpg")
    assert dataset.queries.coordinates.tolist() == [[1.5, 2], [3, 4]]
    (tmp_path / "q.csv").write_text("name;easting;northing\na.jpg;1,5;2\n")
    (dataset,) = MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")
    assert dataset.queries.coordinates.tolist() == [[1.5, 2]]
    for text, said in (
        ('name,easting,northing\na.jpg,"1,5",2\n', "line 2: easting = '1,5': expected a number with a decimal point"),
        ("name;easting;northing\na.jpg;1.500,5;2\n", "line 2: easting = '1.500,5': expected a number"),
        ("name;easting;northing\na.jpg;1,500,5;2\n", "line 2: easting = '1,500,5': expected a number"),
    ):
        (tmp_path / "q.csv").write_text(text)
        with refused(said):
            MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")
    (tmp_path / "q.csv").write_bytes("name;easting;northing\nbrücke.jpg;1;2\n".encode("cp1252"))
    with refused(r"q.csv: not a CSV file in UTF-8 \(a spreadsheet is to be saved as one\)"):
        MAKERS["csv"].make(tmp_path, "q.csv", "d.csv")


def test_msls_training_cities_need_no_subtasks(tmp_path):
    for part in ("query", "database"):
        msls_city(tmp_path, part, [f"{part}1", f"{part}2"], city="zurich")
        (tmp_path / "train_val/zurich" / part / "subtask_index.csv").unlink()
    (dataset,) = MAKERS["msls"].make(tmp_path, cities=["zurich"])
    assert [Path(name).stem for name in dataset.queries.names] == ["query1", "query2"] and not dataset.notes
    with refused("subtask d2n: selects pictures of validation and test cities, and zurich is neither"):
        MAKERS["msls"].make(tmp_path, cities=["zurich"], subtask="d2n")
