"""A small Mapillary Street-Level Sequences tree of rendered places: complete, and with known answers.

Streets of a city are driven several times; drive k of a side is one sequence and passes the places in order.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from patchnetvlad.config import MSLS_CITIES
from patchnetvlad.csv_table import write_table
from patchnetvlad.examples.rendered_city import City, View, make_city
from patchnetvlad.examples.rendered_places import Size
from patchnetvlad.files import replacing
from patchnetvlad.mapillary import SUBTASKS

PANORAMA_EVERY = 5  # of the database's pictures, one is a panorama as well
SIDEWAYS_YAW = 15.0  # degrees of yaw from which a picture counts as sideways
OLD, NEW = "2015-07-01", "2019-01-15"  # days of even drives (summer, older) and of odd ones (winter, newer)
NIGHT_DRIVE = 2  # drive of the database that is by night
NIGHT = 0.5  # dusk from which a picture counts as taken by night


@dataclass(frozen=True)
class RenderedCity:
    """Name of the city in the tree, and how many places of it are drawn, from which seed."""

    name: str
    places: int
    seed: int


SMALL_TREE = (
    RenderedCity("trondheim", 8, 11),
    RenderedCity("london", 8, 12),
    RenderedCity("cph", 6, 13),
    RenderedCity("sf", 6, 14),
    RenderedCity("miami", 4, 15),
)


def write_msls(
    root: Path,
    cities: Sequence[RenderedCity] = SMALL_TREE,
    size: Size = (640, 480),
    database_views: int = 3,
    query_views: int = 2,
    panoramas: bool = True,
) -> int:
    """Write cities below root/train_val, those with the name of a test city below root/test; returns the pictures.

    Test cities have no coordinates. Database pictures are from several stretches of the street, by day but for one
    drive; most queries are by night, from aside. Panoramas repeat some database pictures, twice as wide.
    """
    count = 0
    for rendered in cities:
        city = make_city(
            rendered.places, (database_views,), (query_views,), rendered.seed, look_alikes=0, scale=size[0] / 10
        )
        split = "test" if rendered.name in MSLS_CITIES["test"] else "train_val"
        folder = root / split / rendered.name
        database = [_by_night(view) if _drive(view) == NIGHT_DRIVE else view for view in city.database]
        for side, views in (("query", city.queries), ("database", database)):
            extra = [_panorama(view) for view in database[::PANORAMA_EVERY]] if side == "database" and panoramas else []
            _write_side(folder / side, rendered.name, city, (*views, *extra), len(extra), size, split == "test")
            count += len(views) + len(extra)
    return count


def _drive(view: View) -> int:
    return int(Path(view.name).stem.split("_")[1])


def _by_night(view: View) -> View:
    return replace(view, condition=replace(view.condition, dusk=1.0))


def _panorama(view: View) -> View:
    camera = replace(view.camera, field_of_view=120.0)
    return replace(view, name=view.name.replace(".jpg", "_pano.jpg"), camera=camera)


def _write_side(
    folder: Path, name: str, city: City, views: Sequence[View], panoramas: int, size: Size, secret: bool
) -> None:
    keys = [hashlib.sha256(f"{name}/{view.name}".encode()).hexdigest()[:22] for view in views]
    for number, (key, view) in enumerate(zip(keys, views, strict=True)):
        wide = number >= len(views) - panoramas
        with replacing(folder / "images" / f"{key}.jpg", durable=False) as temporary:
            city.render(view, (2 * size[0], size[1]) if wide else size).save(temporary, quality=85)
    drives = [_drive(view) for view in views]
    night = [view.condition.dusk > NIGHT for view in views]
    pano = [number >= len(views) - panoramas for number in range(len(views))]
    _write_csv(
        folder / "raw.csv",
        ["key", "ca", "captured_at", "pano"],
        (
            (key, f"{view.camera.yaw % 360:.1f}", OLD if drive % 2 == 0 else NEW, wide)
            for key, view, drive, wide in zip(keys, views, drives, pano, strict=True)
        ),
    )
    _write_csv(
        folder / "seq_info.csv",
        ["key", "sequence_key", "frame_number"],
        (
            (key, f"{name}-{folder.name}-{drive}{'-pano' if wide else ''}", view.place)
            for key, drive, view, wide in zip(keys, drives, views, pano, strict=True)
        ),
    )
    columns = ["key", "unique_cluster", "night", "control_panel", "view_direction"]
    rows: list[list[object]] = [
        [key, view.place, dark, False, "Sideways" if abs(view.camera.yaw) > SIDEWAYS_YAW else "Forward"]
        for key, dark, view in zip(keys, night, views, strict=True)
    ]
    if not secret:
        columns += ["easting", "northing"]
        for row, view in zip(rows, views, strict=True):
            row += [f"{view.east:.3f}", f"{view.north:.3f}"]
    _write_csv(folder / "postprocessed.csv", columns, rows)
    _write_csv(
        folder / "subtask_index.csv",
        ["key", *SUBTASKS],
        ([key, *_subtasks(folder.name == "query", n, d)] for key, n, d in zip(keys, night, drives, strict=True)),
    )


def _subtasks(is_query: bool, night: bool, drive: int) -> list[bool]:
    """Flags in the order of SUBTASKS: queries of "s2w" are of summer and its database of winter, and so on."""
    early = drive % 2 == 0
    first = [early, early, not night]  # whether the picture is of the first of summer/winter, old/new, day/night
    flags = [True]
    for is_first in first:
        flags += [is_first == is_query, is_first != is_query]
    return flags


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """With the index that tables of MSLS have as their first column, without a name."""
    write_table(path, ["", *columns], ([index, *row] for index, row in enumerate(rows)))
