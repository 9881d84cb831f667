"""Datasets whose picture names or files carry the place: frame numbers (Nordland), @easting@northing@, EXIF GPS."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from patchnetvlad.csv_table import check_geographic
from patchnetvlad.datasets.dataset import Dataset, Pictures
from patchnetvlad.errors import UserError
from patchnetvlad.files import some_of
from patchnetvlad.image_lists import list_folder
from patchnetvlad.localization.coordinates import (
    Zone,
    band_zone,
    common_zone,
    in_one_zone,
    look_swapped,
    outside_zone,
    to_utm,
)

_EASTINGS, _NORTHINGS = (100_000, 900_000), (0, 10_000_000)  # metres that occur in UTM, with a margin below


def listed_below(root: Path, folder: str) -> list[str]:
    """Names of the pictures in a folder and those within, relative to the root above it."""
    return [(PurePosixPath(folder) / name).as_posix() for name in list_folder(root / folder, recursive=True)]


def nordland(
    root: Path, queries: str = "winter", database: str = "summer", radius: float | None = None, published: bool = False
) -> list[Dataset]:
    """Season folders ROOT/SEASON or ROOT/nordland/SEASON, a picture a frame, its number last in the name.

    The coordinate is the frame's number, so that a radius of 10 means 10 frames; a frame that only one season has is
    counted. published: row i gets (i, i) as in the published ground truth, where a radius of 10 means 7 frames; both
    seasons must then have the same frames.
    """
    base = "nordland/" if (root / "nordland" / queries).is_dir() else ""
    listed = [listed_below(root, base + season) for season in (queries, database)]
    dataset = _by_frames("nordland", listed, 10 if radius is None else radius)
    numbers = [_frame_numbers(names) for names in listed]
    only = [np.setdiff1d(numbers[0], numbers[1]), np.setdiff1d(numbers[1], numbers[0])]
    for season, other, missing in ((queries, database, only[0]), (database, queries, only[1])):
        if len(missing):
            message = (
                f"{len(missing)} frames of {season} are missing in {other}: {some_of(missing.astype(str).tolist())}"
            )
            if published:
                raise UserError(
                    f"{root}: {message}; the published form numbers the rows, so both need the same (incomplete copy?)"
                )
            dataset = dataset.noted(message)
    if not published:
        return [dataset]
    rows = np.arange(len(listed[0]))
    coordinates = np.stack([rows, rows], axis=1)
    return [
        Dataset(
            "nordland",
            Pictures(tuple(listed[0]), coordinates),
            Pictures(tuple(listed[1]), coordinates),
            dataset.radius,
            "steps of (i, i)",
            notes=(f"as published: row i has (i, i), so {dataset.radius:g} is {int(dataset.radius / 2**0.5)} frames",),
        )
    ]


def frames(
    root: Path, queries: str, database: str, radius: float | None = None, name: str = "frames", offset: int = 0
) -> list[Dataset]:
    """Two folders of frames along one way; the last number in a picture's name is its place.

    Frame N of the queries shows the place of frame N + offset of the database.
    """
    listed = [listed_below(root, folder) for folder in (queries, database)]
    return [_by_frames(name, listed, 2 if radius is None else radius, offset)]


def folders(root: Path, queries: str, database: str, name: str = "dataset") -> list[Dataset]:
    """Two folders of pictures without positions."""
    sides = [Pictures(tuple(listed_below(root, folder))) for folder in (queries, database)]
    return [Dataset(name, sides[0], sides[1], 0)]


def kind_of_positions(root: Path, queries: str, database: str) -> tuple[str, str]:
    """The maker that takes its positions from these two folders' pictures, "folders" where none can; and why."""
    names = [name for folder in (queries, database) for name in listed_below(root, folder)]
    if all(_at_position(name) for name in names):
        return "at_names", "the names carry @easting@northing@"
    for place, name in enumerate(names):
        if _gps(root / name) is None:
            complaint = f"{name} carries no GPS position" + (", others do" if place else "")
            return "folders", f"names carry no @easting@northing@, and {complaint}"
    return "exif", "all pictures carry a GPS position"


def at_names(
    root: Path, queries: str, database: str, radius: float | None = None, name: str = "dataset"
) -> list[Dataset]:
    """Folders of pictures named @easting@northing@…; zones, where they follow, become one."""
    listed = [listed_below(root, folder) for folder in (queries, database)]
    parsed = [[_at_position(file) for file in names] for names in listed]
    unpositioned = [
        file
        for names, positions in zip(listed, parsed, strict=True)
        for file, position in zip(names, positions, strict=True)
        if position is None
    ]
    if unpositioned:
        raise UserError(
            f"{root}: {len(unpositioned)} names carry no @easting@northing@ in metres of UTM (easting 100,000 to "
            f"900,000, northing up to 10,000,000; swapped?): {some_of(unpositioned)}"
        )
    positioned = [position for positions in parsed for position in positions if position is not None]
    utm = np.array([position[:2] for position in positioned], dtype=np.float64)
    their_zones = [position[2] for position in positioned]
    zone, notes = None, []
    zones = [zone for zone in their_zones if zone is not None]
    if zones and len(zones) == len(their_zones):
        utm, zone, moved = in_one_zone(utm, zones)
        if moved:
            notes.append(f"{moved} positions of other zones are expressed in zone {zone}")
    elif zones:
        notes.append(f"{len(their_zones) - len(zones)} of {len(their_zones)} names give no zone: no zone is kept")
        if len(set(zones)) > 1:
            raise UserError(
                f"{root}: names of several zones ({some_of(sorted(map(str, set(zones))))}) and some without"
            )
    pictures = _split(listed, utm)
    return [Dataset(name, *pictures, 25 if radius is None else radius, zone=zone, notes=tuple(notes))]


def exif(
    root: Path,
    queries: str,
    database: str,
    radius: float | None = None,
    name: str = "dataset",
    incomplete: str = "error",
    progress: bool = False,
) -> list[Dataset]:
    """Folders of pictures with GPS positions in their EXIF; those without are an error, or are left out and counted."""
    listed = [listed_below(root, folder) for folder in (queries, database)]
    gps = [
        [_gps(root / file) for file in tqdm(names, "Reading EXIF", unit="img", disable=not progress)]
        for names in listed
    ]
    unlocated = [
        file
        for names, positions in zip(listed, gps, strict=True)
        for file, position in zip(names, positions, strict=True)
        if position is None
    ]
    total = sum(map(len, listed))
    if unlocated and (incomplete != "leave_out" or len(unlocated) == total):
        hint = "" if len(unlocated) == total else "; --incomplete leave_out goes on without them"
        raise UserError(
            f"{root}: {len(unlocated)} of {total} pictures carry no GPS position in their EXIF: {some_of(unlocated)}"
            f"{hint}"
        )
    kept = [
        [file for file, position in zip(names, positions, strict=True) if position is not None]
        for names, positions in zip(listed, gps, strict=True)
    ]
    geographic = [
        np.array([position for position in positions if position is not None], dtype=np.float64).reshape(-1, 2)
        for positions in gps
    ]
    for names, positions in zip(kept, geographic, strict=True):
        check_geographic(positions, names, str(root))
    notes = []
    if unlocated:
        notes.append(f"left out: {len(unlocated)} of {total} pictures without a GPS position: {some_of(unlocated)}")
    return [from_geographic(name, kept, geographic, 25 if radius is None else radius, str(root)).noted(*notes)]


def from_geographic(
    name: str,
    names: Sequence[Sequence[str]],
    geographic: Sequence[NDArray[np.float64]],
    radius: float,
    where: str,
    zone: Zone | None = None,
) -> Dataset:
    """A dataset from names and checked latitudes and longitudes of queries and database, in one UTM zone."""
    if all(map(len, geographic)) and look_swapped(geographic[0], geographic[1]):
        raise UserError(f"{where}: queries and database lie apart, unless latitude and longitude of one are swapped")
    all_positions = np.concatenate(list(geographic))
    if not len(all_positions):
        raise UserError(f"{where}: no picture has a position")
    chosen = zone or common_zone(all_positions)
    notes = []
    outside = outside_zone(all_positions, chosen)
    if outside:
        notes.append(f"{outside} positions of a neighbouring zone are expressed in zone {chosen}")
    return Dataset(name, *_split(names, to_utm(all_positions, chosen)), radius, zone=chosen, notes=tuple(notes))


def _by_frames(name: str, listed: Sequence[Sequence[str]], radius: float, offset: int = 0) -> Dataset:
    query_numbers, database_numbers = map(_frame_numbers, listed)
    places = (query_numbers + offset, database_numbers)
    coordinates = [np.stack([numbers, np.zeros_like(numbers)], axis=1) for numbers in places]
    queries, database = (Pictures(tuple(names), rows) for names, rows in zip(listed, coordinates, strict=True))
    return Dataset(name, queries, database, radius, "frames")


def _frame_numbers(names: Sequence[str]) -> NDArray[np.int64]:
    digits = [re.findall(r"\d+", PurePosixPath(name).stem) for name in names]
    unnumbered = [name for name, numbers in zip(names, digits, strict=True) if not numbers]
    if unnumbered:
        raise UserError(f"{len(unnumbered)} pictures have no frame number in their name: {some_of(unnumbered)}")
    numbers = np.array([int(numbers[-1]) for numbers in digits], dtype=np.int64)
    _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    if (counts > 1).any():
        example = names[first[np.flatnonzero(counts > 1)[0]]]
        raise UserError(
            f"{int((counts - 1).sum())} pictures have a frame number that another one of the same folder has, such as "
            f"{example} (several videos or cameras in one folder?)"
        )
    return numbers


def _split(names: Sequence[Sequence[str]], utm: NDArray[np.float64]) -> tuple[Pictures, Pictures]:
    count = len(names[0])
    return Pictures(tuple(names[0]), utm[:count]), Pictures(tuple(names[1]), utm[count:])


def _at_position(name: str) -> tuple[float, float, Zone | None] | None:
    """Easting, northing and zone of @easting@northing@zone@band@…; None when there are none."""
    fields = PurePosixPath(name).name.split("@")[1:]
    try:
        east, north = float(fields[0]), float(fields[1])
    except (IndexError, ValueError):
        return None
    if not (_EASTINGS[0] <= east <= _EASTINGS[1] and _NORTHINGS[0] <= north <= _NORTHINGS[1]):
        return None
    if len(fields) >= 4 and fields[2].isdigit() and re.fullmatch("[A-Za-z]", fields[3]):
        return east, north, band_zone(int(fields[2]), fields[3], name)
    return east, north, None


def _gps(path: Path) -> tuple[float, float] | None:
    """Latitude and longitude in degrees from a picture's EXIF."""
    try:
        with Image.open(path) as picture:
            tags = picture.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from error
    try:
        latitude = _degrees(tags[ExifTags.GPS.GPSLatitude])
        longitude = _degrees(tags[ExifTags.GPS.GPSLongitude])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    south = str(tags.get(ExifTags.GPS.GPSLatitudeRef, "N")).upper().startswith("S")
    west = str(tags.get(ExifTags.GPS.GPSLongitudeRef, "E")).upper().startswith("W")
    position = (-latitude if south else latitude, -longitude if west else longitude)
    return position if np.isfinite(position).all() else None


def _degrees(angle: Sequence[float]) -> float:
    degrees, minutes, seconds = (float(number) for number in angle)
    return degrees + minutes / 60 + seconds / 3600
