"""Datasets whose places stand in CSV files: anybody's own, and Mapillary Street-Level Sequences (MSLS)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import MSLS_CITIES
from patchnetvlad.csv_table import PICTURES, Table, read_table
from patchnetvlad.datasets.dataset import Dataset, Pictures
from patchnetvlad.datasets.picture_names import from_geographic, listed_below
from patchnetvlad.errors import UserError
from patchnetvlad.files import some_of
from patchnetvlad.localization.coordinates import Zone, in_one_zone, parse_zone
from patchnetvlad.mapillary import SIDES, CitySide, read_side

_KINDS = {True: "latitude and longitude", False: "easting and northing"}  # whether they are geographic
_ZONES = ("zone", "utm_zone")


def csv_tables(
    root: Path,
    queries: str,
    database: str,
    radius: float | None = None,
    name: str = "dataset",
    zone: str | Zone | None = None,
    incomplete: str = "error",
    query_folder: str = "",
    database_folder: str = "",
) -> list[Dataset]:
    """A CSV file each for queries and database: a column with names, and latitude and longitude, or easting and
    northing with a zone for each row, or the one zone given, or none. With both, latitude and longitude count.

    Names are relative to the root, or to the folder below it that is given; pictures there without a row are counted.
    """
    limit = 25 if radius is None else radius
    zone = parse_zone(zone, "zone") if isinstance(zone, str) else zone
    tables = [read_table(_existing(root, file)) for file in (queries, database)]
    given = [table.positions(gaps=True) for table in tables]
    where = f"{queries}, {database}"
    kinds = [_KINDS[positions.geographic] for positions in given]
    if kinds[0] != kinds[1]:
        raise UserError(f"{queries} gives {kinds[0]}, {database} {kinds[1]}: expected the same in both")
    sides = [
        _placed(table, positions.values, incomplete == "leave_out", root, folder)
        for table, positions, folder in zip(tables, given, (query_folder, database_folder), strict=True)
    ]
    notes = [note for side in sides for note in side.notes]
    names = [side.names for side in sides]
    if given[0].geographic:
        geographic = [side.positions for side in sides]
        return [from_geographic(name, names, geographic, limit, where, zone).noted(*notes)]
    utm, zone, moved = _in_metres(sides, zone, where)
    if moved:
        notes.append(f"{moved} positions of other zones are expressed in zone {zone}")
    count = len(names[0])
    pictures = Pictures(tuple(names[0]), utm[:count]), Pictures(tuple(names[1]), utm[count:])
    return [Dataset(name, *pictures, limit, zone=zone, notes=tuple(notes))]


def pairs(
    root: Path,
    queries: str,
    database: str,
    pairs_csv: Path,
    radius: float | None = None,
    name: str = "pairs",
    interpolate: bool = False,
    incomplete: str = "error",
) -> list[Dataset]:
    """Two folders of pictures in the order in which they were taken, and a CSV file of pictures that show one place.

    Its columns query and database hold names as listed, or as they are within their folders. The coordinate is the
    picture's place in the database, counted from 0; interpolate places queries between two of the file in proportion.
    Other queries are an error, or are left out and counted.
    """
    listed = [listed_below(root, folder) for folder in (queries, database)]
    table = read_table(pairs_csv)
    asked, shown = (
        _rows_of(table, column, folder, names)
        for column, folder, names in zip(("query", "database"), (queries, database), listed, strict=True)
    )
    order = np.argsort(asked)
    asked, shown = asked[order], shown[order].astype(np.float64)
    rows = np.arange(len(listed[0])) if interpolate else asked
    rows = rows[(rows >= asked[0]) & (rows <= asked[-1])]
    unplaced = [listed[0][row] for row in np.setdiff1d(np.arange(len(listed[0])), rows)]
    notes: tuple[str, ...] = ()
    if unplaced:
        message = f"{len(unplaced)} of {len(listed[0])} queries have no place by {pairs_csv}: {some_of(unplaced)}"
        if incomplete != "leave_out":
            raise UserError(
                f"{message} (--interpolate places those between two others, --incomplete leave_out the rest)"
            )
        notes = (f"left out: {message}",)
    places = [np.interp(rows, asked, shown), np.arange(len(listed[1]), dtype=np.float64)]
    names = [[listed[0][row] for row in rows], listed[1]]
    placed = [
        Pictures(tuple(side_names), np.stack([place, np.zeros_like(place)], axis=1))
        for side_names, place in zip(names, places, strict=True)
    ]
    return [Dataset(name, placed[0], placed[1], 2 if radius is None else radius, "pictures", notes=notes)]


def _rows_of(table: Table, column: str, folder: str, names: Sequence[str]) -> NDArray[np.int64]:
    """Places in a list of the pictures that a column names; a query may stand there once."""
    row_of = {name: row for row, name in enumerate(names)}
    cells = table.unique(column) if column == "query" else table.text(column)
    rows = [row_of.get(cell, row_of.get((PurePosixPath(folder) / cell).as_posix(), -1)) for cell in cells]
    if not rows:
        raise UserError(f"{table.path}: names no pair")
    if -1 in rows:
        place = rows.index(-1)
        raise UserError(
            f"{table.path}: line {table.lines[place]}: {column} {cells[place]} is no picture of {folder} (names are "
            "relative to ROOT or to that folder)"
        )
    return np.array(rows, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class _Placed:
    """Rows of a table that have a position. positions: float64 n×2; zones: text of each row, if the table has them."""

    path: Path
    names: list[str]
    positions: NDArray[np.float64]
    zones: list[str] | None
    notes: list[str]


def _placed(table: Table, positions: NDArray[np.float64], leave_out: bool, root: Path, folder: str) -> _Placed:
    names = [(PurePosixPath(folder) / name).as_posix() if folder else name for name in table.unique(PICTURES)]
    known = ~np.isnan(positions).any(axis=1)
    notes = []
    if not known.all():
        lost = [names[row] for row in np.flatnonzero(~known)]
        message = f"{table.path}: {len(lost)} of {len(names)} rows have no position: {some_of(lost)}"
        if not leave_out or not known.any():
            raise UserError(f"{message}; --incomplete leave_out goes on without them")
        notes.append(f"left out: {message}")
    if folder and (unnamed := sorted(set(listed_below(root, folder)) - set(names))):
        notes.append(
            f"left out: {len(unnamed)} pictures of {folder} stand in no row of {table.path}: {some_of(unnamed)}"
        )
    rows = np.flatnonzero(known).tolist()
    zones = table.text(_ZONES) if table.find(_ZONES) else None
    return _Placed(
        table.path,
        [names[row] for row in rows],
        positions[known],
        None if zones is None else [zones[row] for row in rows],
        notes,
    )


def _in_metres(sides: Sequence[_Placed], zone: Zone | None, where: str) -> tuple[NDArray[np.float64], Zone | None, int]:
    """Positions of all sides in one zone of UTM, the zone (None: any metres), and how many were of another."""
    metres, moved = np.concatenate([side.positions for side in sides]), 0
    with_zones = [side for side in sides if side.zones is not None]
    if with_zones and len(with_zones) < len(sides):
        raise UserError(f"{where}: only one of them has a column zone: expected it in both or in none")
    if with_zones:
        zones = [parse_zone(text, str(side.path)) for side in sides for text in side.zones or ()]
        metres, zone, moved = in_one_zone(metres, zones, zone)
    _check_utm(metres, [name for side in sides for name in side.names], where, zone)
    return metres, zone, moved


def msls(
    root: Path,
    cities: Sequence[str] = ("val",),
    radius: float | None = None,
    subtask: str = "all",
    include_panoramas: bool = False,
) -> list[Dataset]:
    """A dataset for each city: train, val and test stand for theirs; the database is the city's own.

    As the official protocol has it, queries and database pictures are those of the subtask that are no panoramas, in
    the order of the tables; dropping queries without a match is up to the caller. Training cities give all their
    pictures but panoramas, test cities have no coordinates.
    """
    limit = 25 if radius is None else radius
    chosen = [city for group in cities for city in MSLS_CITIES.get(group, (group,))]
    datasets = []
    for city in chosen:
        sides = [read_side(root, city, side, subtask) for side in SIDES]
        queries, database = (_msls_pictures(root, side, include_panoramas) for side in sides)
        notes = [note for side in sides for note in _msls_notes(side, subtask, include_panoramas)]
        datasets.append(Dataset(f"mapillary{city}", queries, database, limit, notes=tuple(notes)))
    return datasets


def _msls_pictures(root: Path, side: CitySide, include_panoramas: bool) -> Pictures:
    rows = side.units(1, include_panoramas)[:, 0]
    side.require_positions(rows)
    names = [side.picture(side.keys[row]).relative_to(root).as_posix() for row in rows]
    return Pictures(tuple(names), None if side.positions is None else side.positions[rows])


def _msls_notes(side: CitySide, subtask: str, include_panoramas: bool) -> list[str]:
    name, outside = side.folder.name, int((~side.selected).sum())
    notes = [f"{name}: {outside} of {len(side.keys)} pictures are not in subtask {subtask}"] if outside else []
    panoramas = int((side.selected & side.panorama).sum())
    return notes + ([f"{name}: {panoramas} panoramas left out"] if panoramas and not include_panoramas else [])


def _existing(root: Path, file: str) -> Path:
    return root / file if (root / file).is_file() else Path(file)


def _check_utm(utm: NDArray[np.float64], names: Sequence[str], where: str, zone: Zone | None) -> None:
    if zone is None:
        return  # any metric coordinates
    impossible = (np.abs(utm[:, 0] - 500_000) > 2_300_000) | (np.abs(utm[:, 1]) > 10_100_000)
    if impossible.any():
        rows = np.flatnonzero(impossible).tolist()
        examples = some_of([f"{names[row]} ({utm[row, 0]:g}, {utm[row, 1]:g})" for row in rows])
        raise UserError(f"{where}: {int(impossible.sum())} positions cannot be UTM metres of zone {zone}: {examples}")
