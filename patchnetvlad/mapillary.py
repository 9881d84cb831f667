"""Mapillary Street-Level Sequences (MSLS): its tree of cities, tasks and subtasks (Warburg et al. 2020).

The subtask selects pictures of validation and test cities; training cities give every row of their tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import MSLS_CITIES
from patchnetvlad.csv_table import Table, read_table
from patchnetvlad.errors import UserError

SIDES = ("query", "database")
TASKS = ("im2im", "im2seq", "seq2im", "seq2seq")  # queries to database, single pictures or sequences
SUBTASKS = ("all", "s2w", "w2s", "o2n", "n2o", "d2n", "n2d")  # changes of season, of years, of day and night
_VIEWS = {"forward": False, "backward": False, "sideways": True}  # view_direction: whether it is sideways


@dataclass(frozen=True, eq=False)
class CitySide:
    """Queries or database of a city, all rows of its tables.

    keys: of the pictures, in the order of the tables; key_table: name of the one that they are from; positions:
    float64 n×2, easting and northing in metres, NaN where a cell is empty, None where they are secret; selected: bool
    n, of the subtask; panorama, night, sideways: bool n; unlabelled: bool n, those whose night or view_direction is
    not told, which count as day and forward.
    """

    folder: Path
    keys: tuple[str, ...]
    key_table: str
    positions: NDArray[np.float64] | None
    selected: NDArray[np.bool_]
    panorama: NDArray[np.bool_]
    night: NDArray[np.bool_]
    sideways: NDArray[np.bool_]
    unlabelled: NDArray[np.bool_]

    def units(self, length: int, include_panoramas: bool) -> NDArray[np.int64]:
        """Rows of the pictures of every unit that is matched, u×length: single pictures, or runs of consecutive frames.

        A run belongs to the subtask when its middle picture does. Without ``include_panoramas`` no picture is one.
        Raises UserError for runs when seq_info.csv is missing or does not fit the tables beside it.
        """
        rows = np.arange(len(self.keys), dtype=np.int64)[:, None] if length == 1 else self._runs(length)
        rows = rows[self.selected[rows[:, length // 2]]]
        return rows if include_panoramas else rows[~self.panorama[rows].any(axis=1)]

    def _runs(self, length: int) -> NDArray[np.int64]:
        table = read_table(self.folder / "seq_info.csv")
        _check_same_pictures(table, self.keys, self.key_table)
        frames = table.whole_numbers("frame_number")
        rows_of: dict[str, list[int]] = {}
        for row, key in enumerate(table.text("sequence_key")):
            rows_of.setdefault(key, []).append(row)
        runs = []
        for rows in rows_of.values():
            ordered = sorted(rows, key=lambda row: frames[row])
            windows = (ordered[start : start + length] for start in range(len(ordered) - length + 1))
            runs += [window for window in windows if (np.diff(frames[window]) == 1).all()]
        return np.array(runs, dtype=np.int64).reshape(-1, length)

    def require_positions(self, rows: NDArray[np.int64]) -> None:
        """Raises UserError when one of the pictures in these rows has no position that could be known."""
        if self.positions is None:
            return
        lost = rows[np.isnan(self.positions[rows]).any(axis=1)]
        if len(lost):
            raise UserError(
                f"{self.folder / 'postprocessed.csv'}: {len(lost)} pictures have no easting and northing, the first is "
                f"{self.keys[lost[0]]} (cut off?)"
            )

    def picture(self, key: str) -> Path:
        """File of a picture."""
        return self.folder / "images" / f"{key}.jpg"


def read_side(root: Path, city: str, side: str, subtask: str = "all") -> CitySide:
    """Queries or database of a city, below the tree's root or the folder that holds the root.

    Files of a folder belong together row by row. A test city needs only subtask_index.csv; panoramas are not told
    apart there, since its evaluation asks for every picture of the subtask.
    """
    if subtask not in SUBTASKS:
        raise UserError(f"subtask {subtask}: expected one of {', '.join(SUBTASKS)}")
    is_test, is_training = city in MSLS_CITIES["test"], _is_training(city)
    if is_training and subtask != "all":
        raise UserError(f"subtask {subtask}: selects pictures of validation and test cities, and {city} is neither")
    folder = _city_folder(root, city) / side
    tables = {} if is_training else {"subtask_index.csv": read_table(folder / "subtask_index.csv")}
    for name in ("raw.csv", "postprocessed.csv"):
        if not is_test or (folder / name).exists():
            tables[name] = read_table(folder / name)
    keys, key_table = _common_keys(folder, tables)
    nowhere = np.zeros(len(keys), dtype=bool)
    details = tables.get("postprocessed.csv")
    positions = None
    if details is not None and (not is_test or details.find("easting")):
        positions = np.column_stack([details.numbers(name, gaps=True) for name in ("easting", "northing")])
    night, sideways, unlabelled = _labels(details) if details is not None else (nowhere, nowhere, ~nowhere)
    return CitySide(
        folder,
        keys,
        key_table,
        positions,
        ~nowhere if is_training else tables["subtask_index.csv"].flags(subtask),
        nowhere if is_test else tables["raw.csv"].flags("pano"),
        night,
        sideways,
        unlabelled,
    )


def _is_training(city: str) -> bool:
    return city not in MSLS_CITIES["val"] and city not in MSLS_CITIES["test"]


def _city_folder(root: Path, city: str) -> Path:
    bases = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    base = next((path for path in bases if (path / "train_val").is_dir() or (path / "test").is_dir()), None)
    if base is None:
        raise UserError(f"{root}: holds no folder train_val or test, nor does a folder in it (not the root of MSLS?)")
    parent = base / ("test" if city in MSLS_CITIES["test"] else "train_val")
    if not (parent / city).is_dir():
        cities = ", ".join(sorted(path.name for path in parent.glob("*") if path.is_dir())) or "none"
        raise UserError(f"{parent / city}: no such folder, for city {city} (cities there: {cities}; not downloaded?)")
    return parent / city


def _common_keys(folder: Path, tables: dict[str, Table]) -> tuple[tuple[str, ...], str]:
    """The pictures' keys, and the table that has them; each table has as many rows, and the same keys if it has any."""
    keyed = next((table for table in tables.values() if table.find("key")), None)
    if keyed is None:
        keyed = read_table(folder / "seq_info.csv")
    keys = keyed.unique("key")
    if not keys:
        raise UserError(f"{keyed.path}: lists no picture")
    for line, key in zip(keyed.lines, keys, strict=True):
        if "/" in key or "\\" in key:
            raise UserError(f"{keyed.path}: line {line}: key {key}: expected a plain name, not a path (edited?)")
    for table in tables.values():
        _check_same_pictures(table, keys, keyed.path.name)
    return tuple(keys), keyed.path.name


def _check_same_pictures(table: Table, keys: Sequence[str], key_table: str) -> None:
    """Raises UserError unless a table has a row for each of the keys of another, in their order."""
    if len(table) != len(keys):
        raise UserError(
            f"{table.path}: {len(table)} rows, but {key_table} has {len(keys)} (cut off, or of another version of the "
            "dataset?)"
        )
    if table.find("key"):
        for line, key, expected in zip(table.lines, table.text("key"), keys, strict=True):
            if key != expected:
                raise UserError(f"{table.path}: line {line}: key {key}, but {key_table} has {expected}")


def _labels(details: Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Night, sideways, and which rows lack one of the two."""
    nowhere = np.zeros(len(details), dtype=bool)
    night, night_known = details.known_flags("night") if details.find("night") else (nowhere, nowhere)
    sideways, view_known = nowhere, nowhere
    if details.find("view_direction"):
        sideways, view_known = details.known_flags("view_direction", _VIEWS)
    return night, sideways, ~(night_known & view_known)
