"""Which database pictures truly show the place of a query: ground-truth files and the radius around a query."""

import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import UserError, counted
from patchnetvlad.files import told, writing
from patchnetvlad.image_lists import hash_names

UNKNOWN_UNIT = "units of the ground truth"

Listed: TypeAlias = Sequence[str] | int
"""The names of a picture list, or how many they are where they are not at hand."""

_LIST_KEYS = ("listQ", "listDb")


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Coordinates of all pictures and the distance within which two show one place.

    utm_query: float64 nQ×c and utm_database: float64 M×c, row i belongs to line i of the list. c ≥ 2, usually easting
    and northing in metres, or frame numbers; radius: in the same unit; unit: what that is called, in the plural (m,
    frames); lists: digests of the query and the database list, by `hash_names`, None where not known.
    """

    utm_query: NDArray[np.float64]
    utm_database: NDArray[np.float64]
    radius: float
    unit: str = UNKNOWN_UNIT
    lists: tuple[str | None, str | None] = (None, None)

    def positives(self) -> list[NDArray[np.int64]]:
        """Rows of the database within the radius of each query, ascending; a distance equal to it counts.

        Whole-number coordinates are decided exactly. With others, as much is added to the radius as the rounding of
        the coordinates themselves can change a distance (some nanometres for UTM).
        """
        if len(self.utm_query) == 0 or len(self.utm_database) == 0:
            return [np.empty(0, dtype=np.int64) for _ in self.utm_query]
        from scipy.spatial import KDTree  # commands start and answer about arguments without it

        magnitude = max(np.abs(self.utm_query).max(), np.abs(self.utm_database).max(), self.radius)
        limit = self.radius + 4 * np.finfo(np.float64).eps * magnitude
        near = KDTree(self.utm_database).query_ball_point(self.utm_query, limit * (1 + 1e-9), return_sorted=True)
        return [
            _within(query, self.utm_database, np.array(rows, dtype=np.int64), limit)
            for query, rows in zip(self.utm_query, near, strict=True)
        ]


def with_unit(value: float, unit: str) -> str:
    """A distance for people: 25 m, 1 frame, 2 frames."""
    return f"{value:g} {one_of(unit) if value == 1 else unit}"


def one_of(unit: str) -> str:
    """A unit in the singular: frame, unit of the ground truth."""
    return re.sub(r"(?<=[a-z]{2})s\b", "", unit, count=1)


def read_ground_truth(
    path: Path, queries: Listed, database_list: Listed, radius: float | None = None, unit: str | None = None
) -> GroundTruth:
    """Read utmQ, utmDb and posDistThr from an .npz file; radius and unit take the place of the file's.

    queries, database_list: the lists that the coordinates belong to. The makers' files have a digest of each, by
    which another list of the same length is refused; published files have none, nor a unit.
    Raises UserError for a file, key, shape, length, type or value that cannot be right.
    """
    num_queries, num_database = (names if isinstance(names, int) else len(names) for names in (queries, database_list))
    arrays = _read_arrays(path, ("utmQ", "utmDb") if radius is not None else ("utmQ", "utmDb", "posDistThr"))
    query = _coordinates(path, "utmQ", arrays["utmQ"])
    database = _coordinates(path, "utmDb", arrays["utmDb"])
    if query.shape[1] != database.shape[1]:
        raise UserError(
            f"{path}: utmQ has {query.shape[1]} columns and utmDb {database.shape[1]}: expected the same coordinates"
        )
    if (len(query), len(database)) == (num_database, num_queries) and num_queries != num_database:
        raise UserError(
            f"{path}: utmQ has {counted(len(query), 'row')} for {counted(num_queries, 'query', 'queries')} and utmDb "
            f"{len(database)} for {counted(num_database, 'database picture')} (are the query and index lists swapped?)"
        )
    for key, rows, expected, whose in (
        ("utmQ", query, num_queries, "query"),
        ("utmDb", database, num_database, "index"),
    ):
        if len(rows) != expected:
            raise UserError(
                f"{path}: {key} has {counted(len(rows), 'row')} but the {whose} list {counted(expected, 'picture')}: "
                "row i belongs to line i (ground truth of another list?)"
            )
    if radius is None:
        threshold = arrays["posDistThr"]
        if threshold.size != 1 or threshold.dtype.kind not in "iuf":
            raise UserError(f"{path}: posDistThr: expected one number, not {_describe(threshold)}")
        radius = float(threshold.reshape(()))
        place = f"{path}: posDistThr = {radius}"
    else:
        place = f"--posDistThr {radius}"
    if not (np.isfinite(radius) and radius >= 0):
        raise UserError(f"{place}: expected a distance of 0 or more")
    texts = [_text(path, key) for key in ("unit", *_LIST_KEYS)]
    truth = GroundTruth(query, database, float(radius), unit or texts[0] or UNKNOWN_UNIT, (texts[1], texts[2]))
    check_lists(path, truth, queries, database_list)
    return truth


def check_lists(path: Path, truth: GroundTruth, queries: Listed, database: Listed) -> None:
    """Raises UserError when names that are at hand are not those that a ground truth was made for."""
    for whose, digest, names in (("query", truth.lists[0], queries), ("index", truth.lists[1], database)):
        if digest is not None and not isinstance(names, int) and hash_names(names) != digest:
            raise UserError(
                f"{path}: was made for another {whose} list, of other names or in another order: row i belongs to "
                "line i (give the list that was written with it, or make the ground truth again)"
            )


def write_ground_truth(
    path: Path,
    query: NDArray[np.number],
    database: NDArray[np.number],
    radius: float,
    unit: str,
    lists: tuple[Sequence[str], Sequence[str]],
    zone: str | None = None,
) -> None:
    """Write utmQ, utmDb and posDistThr, complete or not at all; beside them unit, and digests of both lists' names.

    zone: also written, as utmZone (such as 17N). Whole numbers stay whole, as in the published files.
    """
    arrays: dict[str, NDArray[np.generic]] = {
        "utmQ": query,
        "utmDb": database,
        "posDistThr": np.array(int(radius) if float(radius).is_integer() else radius),
        "unit": np.array(unit),
        **{key: np.array(hash_names(names)) for key, names in zip(_LIST_KEYS, lists, strict=True)},
    }
    if zone is not None:
        arrays["utmZone"] = np.array(zone)
    with writing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's stubs take the names for its own options


def ground_truth_lengths(path: Path) -> tuple[int, int]:
    """Rows of utmQ and utmDb, for when the lists are not at hand; raises UserError as read_ground_truth."""
    arrays = _read_arrays(path, ("utmQ", "utmDb"))
    return len(np.atleast_1d(arrays["utmQ"])), len(np.atleast_1d(arrays["utmDb"]))


def read_zone(path: Path) -> str | None:
    """The UTM zone (such as 17N) of a ground truth that read_ground_truth reads; None where it keeps none."""
    return _text(path, "utmZone")


def _text(path: Path, key: str) -> str | None:
    """A text of a file that `_read_arrays` reads; None where it has no such key."""
    with np.load(path, allow_pickle=False) as arrays:
        if key not in arrays.files:
            return None
        value = _read_array(path, arrays, key)
        return str(value) if value.size == 1 else None


def _within(
    query: NDArray[np.float64], database: NDArray[np.float64], rows: NDArray[np.int64], limit: float
) -> NDArray[np.int64]:
    """The rows that truly lie within the limit: the tree's own arithmetic is not promised to be exact."""
    return rows[np.sqrt(np.square(database[rows] - query).sum(axis=1)) <= limit]


def _read_arrays(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray[np.generic]]:
    with told(path, "cannot be read"), path.open("rb") as file:
        return _read_open_file(path, file, keys)


def _read_open_file(path: Path, file: BinaryIO, keys: tuple[str, ...]) -> dict[str, NDArray[np.generic]]:
    try:
        archive = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an .npz file, or damaged: expected one with {', '.join(keys)}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: holds a single array: expected an .npz file with {', '.join(keys)}")
    missing = [key for key in keys if key not in archive.files]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing: found {', '.join(archive.files) or 'nothing'}")
    return {key: _read_array(path, archive, key) for key in keys}


def _read_array(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = archive[key]
    except (ValueError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            reason = "holds Python objects, which are not read for safety: save it as plain numbers"
        elif isinstance(error, MemoryError):
            reason = "claims more numbers than memory can hold (damaged?)"
        else:
            reason = "is damaged (incomplete download?)"
        raise UserError(f"{path}: {key} {reason}") from error
    return array


def _coordinates(path: Path, key: str, values: NDArray[np.generic]) -> NDArray[np.float64]:
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: {key}: expected numbers, one row a picture, 2 or more columns, not {_describe(values)}"
        )
    coordinates = values.astype(np.float64)
    not_finite = np.flatnonzero(~np.isfinite(coordinates).all(axis=1))
    if len(not_finite):
        raise UserError(
            f"{path}: {key}: {counted(len(not_finite), 'row')} with NaN or infinity, the first is row {not_finite[0]} "
            "(pictures without a position?)"
        )
    return coordinates


def _describe(values: NDArray[np.generic]) -> str:
    return f"{values.dtype} of shape {values.shape}"
