"""Mapillary Street-Level Sequences (MSLS): its tree of cities, tasks and subtasks (Warburg et al. 2020)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patchnetvlad.csv_table import Table, read_table
from patchnetvlad.errors import UserError
from patchnetvlad.training_data import CityPictures, PictureSet, Rows, require_unique_keys

TEST_CITIES = ("miami", "athens", "buenosaires", "stockholm", "bengaluru", "kampala")
TASKS = ("im2im", "im2seq", "seq2im", "seq2seq")  # queries to database, single pictures or sequences
SUBTASKS = ("all", "s2w", "w2s", "o2n", "n2o", "d2n", "n2d")  # changes of season, of years, of day and night
_VIEWS = ("Forward", "Backward", "Sideways")


def read_cities(
    root: Path,
    cities: Sequence[str],
    task: str = "im2im",
    sequence_length: int = 3,
    subtask: str = "all",
    include_panoramas: bool = False,
) -> tuple[CityPictures, ...]:
    """Read cities of an MSLS tree, each CSV file once.

    sequence_length: odd number of pictures of a sequence, for the sides of the task that have sequences. A sequence
    is a run of consecutive frames; it belongs to a subtask when its middle picture does, and is left out when one of
    its pictures is.
    Raises UserError naming city, file, line and column. Pictures themselves are not looked at.
    """
    if task not in TASKS:
        raise UserError(f"task {task}: expected one of {', '.join(TASKS)}")
    if subtask not in SUBTASKS:
        raise UserError(f"subtask {subtask}: expected one of {', '.join(SUBTASKS)}")
    if "seq" in task and (sequence_length < 3 or sequence_length % 2 == 0):
        raise UserError(f"sequence length {sequence_length}: expected an odd number of 3 or more")
    lengths = [sequence_length if side == "seq" else 1 for side in task.split("2")]
    found = []
    for city in cities:
        folder = _city_folder(root, city)
        queries, database = (
            _read_side(folder / side, length, subtask, include_panoramas)
            for side, length in zip(("query", "database"), lengths, strict=True)
        )
        found.append(CityPictures(city, queries, database))
    return tuple(found)


def _city_folder(root: Path, city: str) -> Path:
    part = "test" if city in TEST_CITIES else "train_val"
    folder = root / part / city
    if not folder.is_dir():
        there = sorted(path.name for path in (root / part).glob("*") if path.is_dir())
        hint = f"cities there: {', '.join(there)}" if there else "not the root of an MSLS tree?"
        raise UserError(f"{folder}: no such folder, for city {city} ({hint}; [train] cities chooses)")
    return folder


def _read_side(folder: Path, length: int, subtask: str, include_panoramas: bool) -> PictureSet:
    sequences = read_table(folder / "seq_info.csv")
    raw = read_table(folder / "raw.csv")
    subtasks = read_table(folder / "subtask_index.csv")
    keys = sequences.text("key")
    if not keys:
        raise UserError(f"{folder / 'seq_info.csv'}: lists no picture")
    require_unique_keys(folder / "seq_info.csv", keys)
    count = len(keys)
    positions = None
    night = sideways = np.zeros(count, dtype=bool)
    if (folder / "postprocessed.csv").exists() or folder.parent.name not in TEST_CITIES:
        details = read_table(folder / "postprocessed.csv")
        _check_same_pictures(sequences, details)
        if details.has("easting") or folder.parent.name not in TEST_CITIES:
            positions = np.column_stack([details.numbers("easting"), details.numbers("northing")])
        night = details.flags("night")
        sideways = np.array([view == "Sideways" for view in details.choices("view_direction", _VIEWS)], dtype=bool)
    _check_same_pictures(sequences, raw)
    _check_same_pictures(sequences, subtasks)
    panorama = raw.flags("pano")
    units = _units(sequences, length)
    units = units[subtasks.flags(subtask)[units[:, length // 2]]]
    pictures = PictureSet(
        folder, tuple(keys), tuple(folder / "images" / f"{key}.jpg" for key in keys), positions, night, sideways, units
    )
    kept = pictures.kept(np.ones(count, dtype=bool) if include_panoramas else ~panorama)
    if not len(kept.units):
        raise UserError(
            f"{folder}: no {'picture' if length == 1 else f'sequence of {length} pictures'} is left of {count} "
            f"pictures (panoramas: {panorama.sum()}, includepanos = {include_panoramas}; subtask {subtask})"
        )
    return kept


def _check_same_pictures(sequences: Table, other: Table) -> None:
    """Rows of the files of a folder belong together: the same number, and the same keys where both have them."""
    if len(other) != len(sequences):
        raise UserError(
            f"{other.path}: {len(other)} rows, but {sequences.path.name} has {len(sequences)} (cut off, or of another "
            "version of the dataset?)"
        )
    if other.has("key"):
        for row, (key, expected) in enumerate(zip(other.text("key"), sequences.text("key"), strict=True)):
            if key != expected:
                raise UserError(f"{other.path}: line {row + 2}: key {key}, but {sequences.path.name} has {expected}")


def _units(sequences: Table, length: int) -> Rows:
    """Rows of the pictures of every unit, u×length: single pictures, or all runs of that many consecutive frames."""
    if length == 1:
        return np.arange(len(sequences), dtype=np.int64)[:, None]
    frames = sequences.whole_numbers("frame_number")
    rows_of: dict[str, list[int]] = {}
    for row, key in enumerate(sequences.text("sequence_key")):
        rows_of.setdefault(key, []).append(row)
    units = []
    for rows in rows_of.values():
        ordered = sorted(rows, key=lambda row: frames[row])
        units += [ordered[start : start + length] for start in range(len(ordered) - length + 1)]
    return np.array(units, dtype=np.int64).reshape(-1, length)
