"""Datasets whose places stand in CSV files: anybody's own, and Mapillary Street-Level Sequences (MSLS)."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.dataset import Dataset, Pictures
from patchnetvlad.datasets.picture_names import from_geographic
from patchnetvlad.errors import UserError
from patchnetvlad.files import some_of
from patchnetvlad.localization.coordinates import Zone, in_one_zone, parse_zone

MSLS_CITIES = {
    "train": [
        *("trondheim", "london", "boston", "melbourne", "amsterdam", "helsinki", "tokyo", "toronto"),
        *("saopaulo", "moscow", "zurich", "paris", "bangkok", "budapest", "austin", "berlin"),
        *("ottawa", "phoenix", "goa", "amman", "nairobi", "manila"),
    ],
    "val": ["cph", "sf"],
    "test": ["miami", "athens", "buenosaires", "stockholm", "bengaluru", "kampala"],
}
MSLS_SUBTASKS = ("all", "s2w", "w2s", "o2n", "n2o", "d2n", "n2d")
_NAMES = ("name", "path", "image", "filename", "file")  # columns, in any case; the first that is there counts
_LATITUDES, _LONGITUDES = ("latitude", "lat"), ("longitude", "lon", "lng")
_EASTINGS, _NORTHINGS = ("easting", "utm_east", "utm_easting", "x"), ("northing", "utm_north", "utm_northing", "y")
_ZONES = ("zone", "utm_zone")


def csv_tables(
    root: Path,
    queries: str,
    database: str,
    radius: float | None = None,
    name: str = "dataset",
    zone: str | Zone | None = None,
    incomplete: str = "error",
) -> list[Dataset]:
    """A CSV file each for queries and database: a column with names relative to the root, and latitude and longitude,
    or easting and northing with a zone for each row, or the one zone given, or none."""
    limit = 25 if radius is None else radius
    zone = parse_zone(zone, "zone") if isinstance(zone, str) else zone
    tables = [_Table(_existing(root, file)) for file in (queries, database)]
    kinds = [_kind(table) for table in tables]
    if kinds[0] != kinds[1]:
        raise UserError(f"{queries} gives {kinds[0]}, {database} {kinds[1]}: expected the same in both")
    columns = (_LATITUDES, _LONGITUDES) if kinds[0] == "latitude and longitude" else (_EASTINGS, _NORTHINGS)
    names: list[list[str]] = []
    positions: list[NDArray[np.float64]] = []
    rows_kept: list[list[int]] = []
    notes: list[str] = []
    for table in tables:
        listed = table.names()
        values = np.stack([table.numbers(_column(table, choice)) for choice in columns], axis=1)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            message = (
                f"{table.path}: {len(bad)} of {len(listed)} rows have no position: {some_of([listed[i] for i in bad])}"
            )
            if incomplete != "leave_out" or len(bad) == len(listed):
                raise UserError(f"{message}; --incomplete leave_out goes on without them")
            notes.append(f"left out: {message}")
        rows = [row for row in range(len(listed)) if row not in set(bad.tolist())]
        names.append([listed[row] for row in rows])
        positions.append(values[rows])
        rows_kept.append(rows)
    if kinds[0] == "latitude and longitude":
        return [from_geographic(name, names, positions, limit, f"{queries}, {database}", zone).noted(*notes)]
    utm, chosen = np.concatenate(positions), zone
    if all(table.column(_ZONES) for table in tables):
        given = [
            parse_zone(table.values(_column(table, _ZONES))[row], str(table.path))
            for table, rows in zip(tables, rows_kept, strict=True)
            for row in rows
        ]
        utm, chosen, moved = in_one_zone(utm, given, zone)
        if moved:
            notes.append(f"{moved} positions of other zones are expressed in zone {chosen}")
    elif any(table.column(_ZONES) for table in tables):
        raise UserError(f"{queries}, {database}: only one of them has a column zone: expected it in both or in none")
    _check_utm(utm, [file for part in names for file in part], f"{queries}, {database}", chosen)
    count = len(names[0])
    parts = Pictures(tuple(names[0]), utm[:count]), Pictures(tuple(names[1]), utm[count:])
    return [Dataset(name, *parts, limit, zone=chosen, notes=tuple(notes))]


def msls(
    root: Path,
    cities: Sequence[str] = ("val",),
    radius: float | None = None,
    subtask: str = "all",
    include_panoramas: bool = False,
) -> list[Dataset]:
    """A dataset for each city: train, val and test stand for theirs; the database is the city's own.

    As the official protocol has it, queries and database pictures are those of the subtask that are no panoramas, in
    the order of the tables; dropping queries without a match is up to the caller. Test cities have no coordinates.
    """
    base = _msls_base(root)
    wanted = [city for entry in cities for city in MSLS_CITIES.get(entry, [entry])]
    return [
        _msls_city(root, base, city, 25 if radius is None else radius, subtask, include_panoramas) for city in wanted
    ]


class _Table:
    """A CSV file: its columns by lower-case name, every row as long as the head."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = [row for row in csv.reader(file) if row]
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from error
        if not rows:
            raise UserError(f"{path}: is empty: expected a head line with the columns' names")
        self.head = [column.strip().lower() for column in rows[0]]
        short = [number for number, row in enumerate(rows, start=1) if len(row) != len(self.head)]
        if short:
            raise UserError(f"{path}: {len(short)} rows have not {len(self.head)} columns, the first is row {short[0]}")
        self.rows = rows[1:]

    def column(self, choices: Sequence[str]) -> str | None:
        return next((choice for choice in choices if choice in self.head), None)

    def values(self, column: str) -> list[str]:
        if column not in self.head:
            raise UserError(f"{self.path}: no column {column}: found {', '.join(filter(None, self.head))} (renamed?)")
        place = self.head.index(column)
        return [row[place].strip() for row in self.rows]

    def numbers(self, column: str) -> NDArray[np.float64]:
        """NaN for an empty cell; raises UserError for one that holds anything else but a number."""
        values = self.values(column)
        numbers = np.full(len(values), np.nan)
        for row, value in enumerate(values):
            if value:
                try:
                    numbers[row] = float(value)
                except ValueError as error:
                    raise UserError(f"{self.path}: row {row + 2}: {column} {value!r}: expected a number") from error
        return numbers

    def flags(self, column: str) -> NDArray[np.bool_]:
        values = [value.lower() for value in self.values(column)]
        unknown = set(values) - {"true", "false", "1", "0"}
        if unknown:
            raise UserError(f"{self.path}: {column}: expected True or False, found {some_of(sorted(unknown))}")
        return np.array([value in ("true", "1") for value in values], dtype=bool)

    def names(self, choices: Sequence[str] = _NAMES) -> list[str]:
        values = self.values(_column(self, choices))
        empty = [row for row, value in enumerate(values, start=2) if not value]
        if empty:
            raise UserError(f"{self.path}: {len(empty)} rows name no picture, the first is row {empty[0]}")
        twice = [value for value, uses in Counter(values).items() if uses > 1]
        if twice:
            raise UserError(f"{self.path}: {len(twice)} keys appear more than once: {some_of(twice)}")
        return values


def _column(table: _Table, choices: Sequence[str]) -> str:
    found = table.column(choices)
    if found is None:
        raise UserError(f"{table.path}: no column {' or '.join(choices)}: found {', '.join(filter(None, table.head))}")
    return found


def _kind(table: _Table) -> str:
    if table.column(_LATITUDES) and table.column(_LONGITUDES):
        return "latitude and longitude"
    if table.column(_EASTINGS) and table.column(_NORTHINGS):
        return "easting and northing"
    raise UserError(
        f"{table.path}: expected columns latitude and longitude, or easting and northing: found "
        f"{', '.join(filter(None, table.head))}"
    )


def _existing(root: Path, file: str) -> Path:
    return root / file if (root / file).is_file() else Path(file)


def _check_utm(utm: NDArray[np.float64], names: Sequence[str], where: str, zone: Zone | None) -> None:
    if zone is None:
        return  # any metric coordinates
    bad = (np.abs(utm[:, 0] - 500_000) > 2_300_000) | (np.abs(utm[:, 1]) > 10_100_000)
    if bad.any():
        rows = np.flatnonzero(bad).tolist()
        examples = some_of([f"{names[row]} ({utm[row, 0]:g}, {utm[row, 1]:g})" for row in rows])
        raise UserError(f"{where}: {int(bad.sum())} positions cannot be UTM metres of zone {zone}: {examples}")


def _msls_base(root: Path) -> Path:
    bases = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    base = next((path for path in bases if (path / "train_val").is_dir() or (path / "test").is_dir()), None)
    if base is None:
        raise UserError(f"{root}: holds no folder train_val or test, nor does a folder in it (not the MSLS root?)")
    return base


def _msls_city(root: Path, base: Path, city: str, radius: float, subtask: str, include_panoramas: bool) -> Dataset:
    test = city in MSLS_CITIES["test"]
    folder = base / ("test" if test else "train_val") / city
    if not folder.is_dir():
        known = ", ".join(f"{split} ({len(names)} cities)" for split, names in MSLS_CITIES.items())
        raise UserError(f"{folder}: no such folder (not downloaded? cities are named singly, or by {known})")
    parts, notes = {}, []
    for part in ("query", "database"):
        table = _Table(folder / part / ("subtask_index.csv" if test else "postprocessed.csv"))
        keys = table.names(("key",))
        keep = np.ones(len(keys), dtype=bool)
        index_path = folder / part / "subtask_index.csv"
        if test or city in MSLS_CITIES["val"] or subtask != "all":
            index = table if test else _same_keys(_Table(index_path), keys)
            keep &= index.flags(subtask)
            notes.append(f"{part}: {int((~keep).sum())} of {len(keys)} pictures are not in subtask {subtask}")
        if not test and not include_panoramas:
            panoramas = _same_keys(_Table(folder / part / "raw.csv"), keys).flags("pano")
            notes.append(f"{part}: {int((keep & panoramas).sum())} panoramas left out")
            keep &= ~panoramas
        rows = np.flatnonzero(keep)
        pictures = (folder / part / "images").relative_to(root)
        names = tuple((pictures / f"{keys[row]}.jpg").as_posix() for row in rows)
        coordinates = None
        if not test:
            coordinates = np.stack([table.numbers("easting"), table.numbers("northing")], axis=1)[rows]
            bad = int((~np.isfinite(coordinates)).any(axis=1).sum())
            if bad:
                raise UserError(f"{table.path}: {bad} pictures have no easting and northing")
        parts[part] = Pictures(names, coordinates)
    return Dataset(f"mapillary{city}", parts["query"], parts["database"], radius, notes=tuple(notes))


def _same_keys(table: _Table, keys: Sequence[str]) -> _Table:
    found = table.names(("key",))
    if found != list(keys):
        different = len(set(found) ^ set(keys))
        raise UserError(
            f"{table.path}: its {len(found)} keys are not the {len(keys)} of postprocessed.csv in the same order "
            f"({different} are in one of them only; files of different releases?)"
        )
    return table
