"""Pittsburgh 30k / 250k and Tokyo 24/7 from the dbStruct of their .mat files."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray
from scipy.io.matlab import MatReadError

from patchnetvlad.datasets.dataset import Dataset, Pictures
from patchnetvlad.errors import UserError, counted
from patchnetvlad.localization.coordinates import Zone

FIELDS = (
    "whichSet",
    "dbImageFns",
    "utmDb",
    "qImageFns",
    "utmQ",
    "numImages",
    "numQueries",
    "posDistThr",
    "posDistSqThr",
    "nonTrivPosDistSqThr",
)  # in the order of the published struct

_CUTOUTS = 12  # of each panorama in Tokyo 24/7


def pittsburgh(root: Path, mat: Path | None, split: str, size: str) -> list[Dataset]:
    """size 30k or 250k, split train, val or test; pictures in ROOT/Pittsburgh250k/000/… and …/queries_real/000/….

    The test split takes the published names: lists pitts30k, ground truth pitts30k_test.
    """
    name = f"pitts{size}"
    path = mat or find_mat(root, f"{name}_{split}.mat")
    dataset = from_struct(
        path, name, Path("Pittsburgh250k"), Path("Pittsburgh250k/queries_real"), Zone(17), expected_set=split
    )
    if split == "test":
        return [replace(dataset, ground_truth_name=f"{name}_test")]
    return [replace(dataset, name=f"{name}_{split}")]


def tokyo247(root: Path, mat: Path | None) -> list[Dataset]:
    """Pictures in ROOT/247_Tokyo_GSV_Perspective/03811/… and …/247query_v3/."""
    folder = Path("247_Tokyo_GSV_Perspective")
    path = mat or find_mat(root, "tokyo247.mat")
    dataset = from_struct(path, "tokyo247", folder, folder / "247query_v3", Zone(54))
    note = f"{_CUTOUTS} cut-outs a panorama: match with --set feature_match.panorama_cutouts={_CUTOUTS}"
    return [replace(dataset, panorama_cutouts=_CUTOUTS).noted(note)]


def find_mat(root: Path, name: str) -> Path:
    """The struct's file below the root, in the folder of datasets or beside it; raises UserError naming the places."""
    places = [root / name, root / "datasets" / name, root.parent / name, root.parent / "datasets" / name]
    file = next((path for path in places if path.is_file()), None) or next(iter(sorted(root.glob(f"*/{name}"))), None)
    if file is None:
        raise UserError(
            f"{name}: not found in {', '.join(sorted({str(path.parent) for path in places}))} (it is part of NetVLAD's "
            "dataset specifications; name its place with --mat)"
        )
    return file


def from_struct(
    path: Path, name: str, database_folder: Path, query_folder: Path, zone: Zone | None, expected_set: str | None = None
) -> Dataset:
    """Read a dbStruct: all its fields must be there and agree with each other, or UserError says which do not."""
    fields = _read_struct(path)
    which = "".join(np.asarray(fields["whichSet"]).astype(str).ravel().tolist()).strip()
    if expected_set is not None and which.lower() != expected_set:
        raise UserError(f"{path}: whichSet is {which!r}, expected {expected_set!r} (the file of another split?)")
    pictures = {}
    for key, coordinates_key, count_key, folder in (
        ("qImageFns", "utmQ", "numQueries", query_folder),
        ("dbImageFns", "utmDb", "numImages", database_folder),
    ):
        names = _names(path, key, fields[key])
        coordinates = _coordinates(path, coordinates_key, fields[coordinates_key], key, len(names))
        count = _number(path, count_key, fields[count_key])
        if count != len(names):
            raise UserError(f"{path}: {count_key} is {count:g} but {key} has {counted(len(names), 'name')}")
        pictures[key] = Pictures(tuple((folder / file).as_posix() for file in names), coordinates)
    radius = _number(path, "posDistThr", fields["posDistThr"])
    if not (np.isfinite(radius) and radius >= 0):
        raise UserError(f"{path}: posDistThr is {radius:g}, expected a distance in metres")
    squared = _number(path, "posDistSqThr", fields["posDistSqThr"])
    if not np.isclose(squared, radius**2):
        raise UserError(f"{path}: posDistSqThr is {squared:g}, not the square of posDistThr, {radius:g}")
    return Dataset(name, pictures["qImageFns"], pictures["dbImageFns"], radius, zone=zone)


def _read_struct(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        content = scipy.io.loadmat(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError, NotImplementedError, TypeError, IndexError, zlib.error, MatReadError) as error:
        raise UserError(f"{path}: not a MATLAB file that can be read ({error}; version 7.3 is not read)") from error
    if "dbStruct" not in content:
        variables = ", ".join(key for key in content if not key.startswith("__")) or "nothing"
        raise UserError(f"{path}: holds no dbStruct: found {variables} (another .mat file?)")
    struct = content["dbStruct"]
    if struct.dtype.names is None:  # saved as an object
        raise UserError(f"{path}: dbStruct is no struct with fields {', '.join(FIELDS)}")
    if struct.size != 1:
        raise UserError(
            f"{path}: dbStruct is {counted(struct.size, 'struct')}, expected one (several splits in a file?)"
        )
    missing = [field for field in FIELDS if field not in struct.dtype.names]
    if missing:
        raise UserError(
            f"{path}: dbStruct lacks {', '.join(missing)}: found {', '.join(struct.dtype.names)} (renamed?)"
        )
    return {field: np.asarray(struct[field].ravel()[0]) for field in FIELDS}


def _names(path: Path, key: str, cells: NDArray[np.generic]) -> list[str]:
    kinds = {np.asarray(cell).dtype.kind for cell in cells.ravel().tolist()}
    if not kinds <= {"U"}:
        raise UserError(f"{path}: {key}: expected texts, the names of pictures, one a cell")
    names = ["".join(np.asarray(cell).astype(str).ravel().tolist()).strip() for cell in cells.ravel().tolist()]
    if not all(names):
        raise UserError(f"{path}: {key} holds {counted(sum(not name for name in names), 'empty name')}")
    return names


def _coordinates(path: Path, key: str, values: NDArray[np.generic], names_key: str, count: int) -> NDArray[np.float64]:
    if values.ndim != 2 or 2 not in values.shape or values.dtype.kind not in "iuf":
        raise UserError(f"{path}: {key}: expected numbers 2×n, not {values.dtype} of shape {values.shape}")
    rows = values.T if values.shape[0] == 2 else values  # published as 2×n
    if len(rows) != count:
        counts = counted(len(rows), "position"), counted(count, "name")
        raise UserError(f"{path}: {key} has {counts[0]} but {names_key} has {counts[1]}")
    coordinates = np.ascontiguousarray(rows, dtype=np.float64)
    if not np.isfinite(coordinates).all():
        infinite = int((~np.isfinite(coordinates).all(axis=1)).sum())
        raise UserError(f"{path}: {key} holds {counted(infinite, 'position')} not finite")
    return coordinates


def _number(path: Path, key: str, value: NDArray[np.generic]) -> float:
    if value.size != 1 or value.dtype.kind not in "iuf":
        raise UserError(f"{path}: {key}: expected one number, not {value.dtype} of shape {value.shape}")
    return float(value.ravel()[0])
