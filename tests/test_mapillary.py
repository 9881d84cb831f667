"""Reading MSLS: cities, tasks, subtasks, panoramas, and errors that say which city, file, line and column."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchnetvlad.config import MSLS_CITIES
from patchnetvlad.datasets.makers import MAKERS
from patchnetvlad.distributed import Processes
from patchnetvlad.errors import UserError
from patchnetvlad.mapillary import SUBTASKS, TASKS
from patchnetvlad.training_data import TrainingData, read_cities, sampling_weights, triplet_places

ONE_PROCESS = Processes(0, 1, torch.device("cpu"))


def column(path: Path, name: str) -> list[str]:
    with path.open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


@pytest.fixture
def changed(msls: Path, tmp_path: Path) -> Path:
    """A copy of a training city and of a validation city, free to be damaged."""
    for city in ("london", "cph"):
        shutil.copytree(msls / "train_val" / city, tmp_path / "train_val" / city)
    return tmp_path


def rewrite(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def leave_out(index: Path, count: int) -> None:
    """Say False in column ``all`` of the first pictures of a subtask_index.csv."""
    text, changes = re.subn(r"^(\d+,\w+),True", r"\1,False", index.read_text(), count=count, flags=re.MULTILINE)
    assert changes == count
    index.write_text(text)


def test_tree_is_complete(msls: Path) -> None:
    for folder in (*msls.glob("train_val/*/*"), *msls.glob("test/*/*")):
        files = {"raw.csv", "postprocessed.csv", "seq_info.csv", "subtask_index.csv"}
        assert {path.name for path in folder.iterdir()} == files | {"images"}
        keys = column(folder / "seq_info.csv", "key")
        assert {path.stem for path in (folder / "images").iterdir()} == set(keys)
        assert len(set(keys)) == len(keys)
    night = column(msls / "train_val/trondheim/query/postprocessed.csv", "night")
    assert {"True", "False"} == set(night)
    assert "Sideways" in column(msls / "train_val/trondheim/query/postprocessed.csv", "view_direction")


def test_single_pictures_of_a_city(msls: Path) -> None:
    (city,) = read_cities(msls, ["cph"])
    panoramas = column(msls / "train_val/cph/database/raw.csv", "pano").count("True")
    assert panoramas == 3
    assert (len(city.queries), len(city.database)) == (8, 12)
    (with_panoramas,) = read_cities(msls, ["cph"], include_panoramas=True)
    assert len(with_panoramas.database) == 12 + panoramas
    # By the generator, the pictures within 25 m are those of the same place
    for query, found in zip(city.queries.keys, city.positives(25), strict=True):
        place = column(msls / "train_val/cph/query/postprocessed.csv", "unique_cluster")[city.queries.keys.index(query)]
        clusters = column(msls / "train_val/cph/database/postprocessed.csv", "unique_cluster")
        expected = [row for row in range(12) if clusters[row] == place]
        assert found.tolist() == expected


def test_test_cities_have_no_positions(msls: Path) -> None:
    (city,) = read_cities(msls, ["miami"])
    assert city.queries.positions is None and len(city.queries) == 6
    with pytest.raises(UserError, match="miami/query: has no easting and northing"):
        city.positives(25)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_make_units_of_consecutive_frames(msls: Path, task: str) -> None:
    (city,) = read_cities(msls, ["trondheim"], task, sequence_length=3)
    for side, pictures in zip(task.split("2"), (city.queries, city.database), strict=True):
        assert pictures.units.shape[1] == (3 if side == "seq" else 1)
        folder = pictures.source
        frame = dict(
            zip(column(folder / "seq_info.csv", "key"), column(folder / "seq_info.csv", "frame_number"), strict=True)
        )
        sequence = dict(zip(frame, column(folder / "seq_info.csv", "sequence_key"), strict=True))
        for unit in pictures.units:
            keys = [pictures.keys[row] for row in unit]
            numbers = [int(frame[key]) for key in keys]
            assert numbers == list(range(numbers[0], numbers[0] + len(keys)))
            assert len({sequence[key] for key in keys}) == 1
    if task == "im2im":
        assert len(city.queries.units) == 12
    if task == "seq2seq":
        assert len(city.queries.units) == 2 * 4  # two drives past six places
        for query, rows in zip(city.queries.units, city.positives(25), strict=True):
            at = city.queries.positions[query]
            for row, unit in enumerate(city.database.units):
                nearest = np.linalg.norm(at[:, None] - city.database.positions[unit][None], axis=2).min()
                assert (row in rows) == (nearest <= 25)


def test_sequences_that_lose_a_picture_go(msls: Path) -> None:
    (city,) = read_cities(msls, ["trondheim"], "seq2im")
    keep = np.ones(len(city.queries), dtype=bool)
    keep[int(city.queries.units[0][0])] = False
    fewer = city.queries.kept(keep)
    assert len(fewer.units) == len(city.queries.units) - 1
    kept_keys = {tuple(fewer.keys[row] for row in unit) for unit in fewer.units}
    assert kept_keys == {tuple(city.queries.keys[row] for row in unit) for unit in city.queries.units[1:]}


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_subtasks_choose_pictures(msls: Path, subtask: str) -> None:
    (city,) = read_cities(msls, ["cph"], subtask=subtask)
    for side in (city.queries, city.database):
        flags = column(side.source / "subtask_index.csv", subtask)
        panos = column(side.source / "raw.csv", "pano")
        keys = column(side.source / "seq_info.csv", "key")
        expected = [k for k, flag, p in zip(keys, flags, panos, strict=True) if flag == "True" and p == "False"]
        assert list(side.keys) == expected


def test_a_subtask_without_pictures_says_so(changed: Path) -> None:
    path = changed / "train_val/cph/database/subtask_index.csv"
    path.write_text(path.read_text().replace("True", "False"))
    message = r"cph/database: no picture is left of 15 pictures \(panoramas: 3.*subtask d2n"
    with pytest.raises(UserError, match=message):
        read_cities(changed, ["cph"], subtask="d2n")


@pytest.mark.parametrize("task", ["im2im", "seq2seq"])
def test_training_cities_give_every_row(changed: Path, task: str) -> None:
    """Column ``all`` says False of some pictures: that is of no account where a city is learned from."""
    (before,) = read_cities(changed, ["london"], task)
    indices = [changed / "train_val/london" / side / "subtask_index.csv" for side in ("query", "database")]
    for path in indices:
        leave_out(path, 4)
    (after,) = read_cities(changed, ["london"], task)
    assert (after.queries.keys, after.database.keys) == (before.queries.keys, before.database.keys)
    for path in indices:
        path.unlink()
    (without,) = read_cities(changed, ["london"], task)
    for side in (without.queries, without.database):
        panorama = column(side.source / "raw.csv", "pano")
        keys = column(side.source / "raw.csv", "key")
        assert list(side.keys) == [key for key, wide in zip(keys, panorama, strict=True) if wide == "False"]
    with pytest.raises(UserError, match="subtask d2n: selects pictures of validation and test cities"):
        read_cities(changed, ["london"], subtask="d2n")


def test_validation_cities_give_the_rows_of_the_subtask(changed: Path) -> None:
    (before,) = read_cities(changed, ["cph"])
    index = changed / "train_val/cph/query/subtask_index.csv"
    leave_out(index, 3)
    (after,) = read_cities(changed, ["cph"])
    assert after.queries.keys == before.queries.keys[3:]
    index.unlink()
    with pytest.raises(UserError, match=r"cph/query/subtask_index\.csv: no such file"):
        read_cities(changed, ["cph"])


@pytest.mark.parametrize("subtask", SUBTASKS)
@pytest.mark.parametrize("panoramas", [False, True])
def test_training_and_the_dataset_maker_read_alike(msls: Path, subtask: str, panoramas: bool) -> None:
    names = ["cph", "sf"] + (["trondheim", "london"] if subtask == "all" else [])
    cities = read_cities(msls, names, subtask=subtask, include_panoramas=panoramas)
    made = MAKERS["msls"].make(msls, names, subtask=subtask, include_panoramas=panoramas)
    for city, dataset in zip(cities, made, strict=True):
        for side, pictures in ((city.queries, dataset.queries), (city.database, dataset.database)):
            assert [path.relative_to(msls).as_posix() for path in side.paths] == list(pictures.names)
            np.testing.assert_array_equal(side.positions, pictures.coordinates)


def test_tables_without_keys_or_sequences(changed: Path) -> None:
    """The keys of one table are enough; seq_info.csv is needed for sequences, or when no other table has keys."""
    (before,) = read_cities(changed, ["london"])
    for side in ("query", "database"):
        for name in ("raw.csv", "postprocessed.csv"):
            path = changed / "train_val/london" / side / name
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, [key for key in rows[0] if key != "key"], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
    (after,) = read_cities(changed, ["london"])
    assert (after.queries.keys, after.database.keys) == (before.queries.keys, before.database.keys)
    np.testing.assert_array_equal(after.database.positions, before.database.positions)


def test_the_root_may_lie_one_folder_further_down(msls: Path, changed: Path) -> None:
    inner = changed / "msls"
    inner.mkdir()
    (changed / "train_val").rename(inner / "train_val")
    assert read_cities(changed, ["london"])[0].queries.keys == read_cities(msls, ["london"])[0].queries.keys


def test_sequences_do_not_bridge_missing_frames(changed: Path) -> None:
    (before,) = read_cities(changed, ["london"], "seq2im")
    path = changed / "train_val/london/query/seq_info.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:  # every drive: frames 0, 1, 2, 13, 14
        row["frame_number"] = str(int(row["frame_number"]) + 10 * (int(row["frame_number"]) > 2))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (after,) = read_cities(changed, ["london"], "seq2im")
    assert (len(before.queries.units), len(after.queries.units)) == (2 * 3, 2)


def test_a_panorama_breaks_the_sequences_that_it_is_in(changed: Path) -> None:
    """One rule for pictures and for sequences: what holds a panorama is matched only where panoramas are included."""
    (before,) = read_cities(changed, ["london"], "seq2im")
    folder = changed / "train_val/london/query"
    key = before.queries.keys[before.queries.units[0][0]]
    rewrite(folder / "raw.csv", f"{key},", f"{key},,,True\n-,unused,")  # a row for the picture, and the rest of its own
    lines = (folder / "raw.csv").read_text().splitlines(keepends=True)
    (folder / "raw.csv").write_text("".join(line for line in lines if not line.startswith("-,unused,")))
    hit = sum(key in {before.queries.keys[row] for row in unit} for unit in before.queries.units)
    (after,) = read_cities(changed, ["london"], "seq2im")
    assert hit > 0 and len(after.queries.units) == len(before.queries.units) - hit
    (pictures,) = read_cities(changed, ["london"])
    assert key not in pictures.queries.keys
    (all_of_them,) = read_cities(changed, ["london"], "seq2im", include_panoramas=True)
    assert len(all_of_them.queries.units) == len(before.queries.units)


def test_unknown_labels_count_as_day_and_forward(changed: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = changed / "train_val/london/query/postprocessed.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    places = triplet_places(read_cities(changed, ["london"]), 10, 25)
    assert "WARNING" not in caplog.text and places.weights.max() > 1
    for row, night, view in zip(rows, ["", "unknown", "True"], ["Sideways", "Up", ""], strict=False):
        row["night"], row["view_direction"] = night, view
    for row in rows[3:]:
        row["night"], row["view_direction"] = "false", "forward"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (city,) = read_cities(changed, ["london"])
    assert city.queries.night.tolist() == [False, False, True] + [False] * 7
    assert city.queries.sideways.tolist() == [True] + [False] * 9
    places = triplet_places([city], 10, 25)
    np.testing.assert_array_equal(places.weights, [11, 1, 11] + [1] * 7)
    assert caplog.text.count("WARNING") == 1
    assert "3 of 10 queries have no known night or view_direction" in caplog.text


def test_cities_stand_once() -> None:
    assert [len(MSLS_CITIES[part]) for part in ("train", "val", "test")] == [22, 2, 6]
    assert len({city for cities in MSLS_CITIES.values() for city in cities}) == 30


def test_training_places_join_cities(msls: Path) -> None:
    cities = read_cities(msls, ["trondheim", "london"])
    places = triplet_places(cities, 10, 25)
    assert places.num_database == 18 + 15
    names = [path.parent.parent.name for path in places.paths]
    assert set(names[: places.num_queries]) == {"query"} and set(names[places.num_queries :]) == {"database"}
    for query in range(places.num_queries):
        assert len(places.positives[query]) and set(places.positives[query]) <= set(places.near[query])
        city = places.paths[query].parts[-4]
        assert {places.paths[row].parts[-4] for row in places.near[query]} == {city}


def test_sampling_weights_by_hand() -> None:
    night, sideways = np.array([1, 0, 0, 0], bool), np.array([1, 1, 0, 0], bool)
    np.testing.assert_allclose(sampling_weights(night, sideways), [1 + 4 + 2, 1 + 2, 1, 1])
    np.testing.assert_allclose(sampling_weights(np.zeros(3, bool), np.zeros(3, bool)), [1, 1, 1])


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("query/raw.csv", "pano", "panorama", r"london/query/raw\.csv: has no column pano: found key"),
        ("query/postprocessed.csv", "easting", "east", r"postprocessed\.csv: has no column easting"),
        ("database/postprocessed.csv", ",500", ",x500", r"line \d+: easting = 'x500.*expected a number"),
        ("database/postprocessed.csv", "easting", "Northing", r"postprocessed\.csv: two columns are called northing"),
        ("database/raw.csv", "False", "maybe", r"database/raw\.csv: line 2: pano = 'maybe': expected True or False"),
        ("query/seq_info.csv", "frame_number", "frame", r"seq_info\.csv: has no column frame_number: found key"),
    ],
)
def test_wrong_files_are_named(changed: Path, file: str, old: str, new: str, message: str) -> None:
    rewrite(changed / "train_val/london" / file, old, new)
    with pytest.raises(UserError, match=message):
        read_cities(changed, ["london"], "seq2im")


def test_a_wrong_subtask_index_is_named(changed: Path) -> None:
    rewrite(changed / "train_val/cph/query/subtask_index.csv", ",True", ",")
    with pytest.raises(UserError, match=r"subtask_index\.csv: line 2: all = '': expected True or False"):
        read_cities(changed, ["cph"])


def test_pictures_that_take_part_need_a_position(changed: Path) -> None:
    path = changed / "train_val/london/database/postprocessed.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def without(row: int) -> None:
        changed_rows = [dict(values) for values in rows]
        changed_rows[row]["easting"] = ""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(changed_rows)

    without(-1)  # a panorama
    assert len(read_cities(changed, ["london"])[0].database) == 15
    without(0)
    message = rf"postprocessed\.csv: 1 pictures have no easting and northing, the first is {rows[0]['key']}"
    with pytest.raises(UserError, match=message):
        read_cities(changed, ["london"])


def test_rows_that_do_not_belong_together(changed: Path) -> None:
    raw = changed / "train_val/london/query/raw.csv"
    lines = raw.read_text().splitlines(keepends=True)
    raw.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"postprocessed\.csv: 10 rows, but raw\.csv has 9"):
        read_cities(changed, ["london"])
    raw.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(UserError, match=r"postprocessed\.csv: line 2: key .*, but raw\.csv has"):
        read_cities(changed, ["london"])
    raw.write_text("".join(lines))
    frames = changed / "train_val/london/query/seq_info.csv"
    rows = frames.read_text().splitlines(keepends=True)
    frames.write_text("".join(rows[:-1]))
    with pytest.raises(UserError, match=r"seq_info\.csv: 9 rows, but raw\.csv has 10"):
        read_cities(changed, ["london"], "seq2im")
    frames.write_text("".join([rows[0], rows[2], rows[1], *rows[3:]]))
    with pytest.raises(UserError, match=r"seq_info\.csv: line 2: key .*, but raw\.csv has"):
        read_cities(changed, ["london"], "seq2im")
    raw.write_text("".join(lines)[:-3])
    with pytest.raises(UserError, match=r"raw\.csv: line 11: "):
        read_cities(changed, ["london"])


def test_missing_city_and_file(changed: Path) -> None:
    with pytest.raises(UserError, match=r"boston: no such folder, for city boston \(cities there: cph, london"):
        read_cities(changed, ["boston"])
    (changed / "train_val/london/query/seq_info.csv").unlink()
    with pytest.raises(UserError, match=r"london/query/seq_info\.csv: no such file"):
        read_cities(changed, ["london"], "seq2im")
    (changed / "train_val/london/query/postprocessed.csv").unlink()
    with pytest.raises(UserError, match=r"london/query/postprocessed\.csv: no such file"):
        read_cities(changed, ["london"])
    with pytest.raises(UserError, match="not the root of MSLS"):
        read_cities(changed / "nowhere", ["london"])


@pytest.mark.parametrize(("task", "length"), [("seq2seq", 4), ("seq2im", 1), ("im2video", 3)])
def test_wrong_tasks(msls: Path, task: str, length: int) -> None:
    with pytest.raises(UserError, match="expected"):
        read_cities(msls, ["london"], task, length)


def test_a_city_without_positives(changed: Path) -> None:
    path = changed / "train_val/london/query/postprocessed.csv"
    path.write_text(re.sub(r",5[78]\d{5}\.\d{3}", ",100.0", path.read_text()))
    with pytest.raises(UserError, match="none of the 10 queries of london has a database picture within 10 m"):
        triplet_places(read_cities(changed, ["london"]), 10, 25)


def test_sequences_do_not_train(msls: Path) -> None:
    with pytest.raises(UserError, match="task im2im"):
        triplet_places(read_cities(msls, ["trondheim"], "seq2im"), 10, 25)


def test_bad_pictures_stop_or_are_skipped(changed: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = sorted((changed / "train_val/london/query/images").iterdir())
    images[0].unlink()
    whole = images[1].read_bytes()
    images[1].write_bytes(whole[: len(whole) // 2])
    data = TrainingData(read_cities(changed, ["london"]), ())
    with pytest.raises(UserError, match=r"2 of 25 pictures cannot be used: .*no such file; .*cannot be decoded"):
        data.checked(ONE_PROCESS, decode=True, skip=False, workers=1, progress=False)
    with pytest.raises(UserError, match=f"1 of 25 pictures cannot be used: {images[0]}: no such file"):
        data.checked(ONE_PROCESS, decode=False, skip=False, workers=1, progress=False)
    checked = data.checked(ONE_PROCESS, decode=True, skip=True, workers=1, progress=False)
    queries = checked.train[0].queries
    assert len(queries) == 8 and not {images[0], images[1]} & set(queries.paths)
    assert f"2 of 25 pictures are left out: {images[0]}: no such file" in caplog.text
    for path in queries.paths:
        Image.open(path).load()
