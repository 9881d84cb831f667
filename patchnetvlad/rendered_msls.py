"""A small Mapillary Street-Level Sequences tree of rendered places: complete, and with known answers.

Streets of a city are driven several times; drive k of a side is one sequence and passes the places in order.
"""

import csv
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patchnetvlad.mapillary import SUBTASKS, TEST_CITIES
from patchnetvlad.rendered_city import City, View, make_city
from patchnetvlad.rendered_places import Size

PANORAMA_EVERY = 5  # of the database's pictures, one is a panorama as well
SIDEWAYS_YAW = 15.0  # degrees of yaw from which a picture counts as sideways
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

    Test cities have no coordinates. Database pictures are by day, from several stretches of the street; most queries
    are by night, from aside. A panorama is twice as wide and from a place between others.
    """
    count = 0
    for rendered in cities:
        city = make_city(
            rendered.places, (database_views,), (query_views,), rendered.seed, look_alikes=0, scale=size[0] / 10
        )
        part = "test" if rendered.name in TEST_CITIES else "train_val"
        folder = root / part / rendered.name
        for side, views in (("query", city.queries), ("database", city.database)):
            extra = [_panorama(view) for view in city.database[::PANORAMA_EVERY]]
            extra = extra if panoramas and side == "database" else []
            _write_side(folder / side, rendered.name, city, (*views, *extra), len(extra), size, part == "test")
            count += len(views) + len(extra)
    return count


def _panorama(view: View) -> View:
    camera = replace(view.camera, field_of_view=120.0)
    return replace(view, name=view.name.replace(".jpg", "_pano.jpg"), camera=camera)


def _write_side(
    folder: Path, name: str, city: City, views: Sequence[View], panoramas: int, size: Size, secret: bool
) -> None:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    keys = [hashlib.sha256(f"{name}/{view.name}".encode()).hexdigest()[:22] for view in views]
    for number, (key, view) in enumerate(zip(keys, views, strict=True)):
        wide = number >= len(views) - panoramas
        city.render(view, (2 * size[0], size[1]) if wide else size).save(images / f"{key}.jpg", quality=85)
    drives = [int(Path(view.name).stem.split("_")[1]) for view in views]
    night = [view.condition.dusk > NIGHT for view in views]
    pano = [number >= len(views) - panoramas for number in range(len(views))]
    _write_csv(folder / "raw.csv", ["key", "captured_at", "pano"], zip(keys, _dates(views), pano, strict=True))
    _write_csv(
        folder / "seq_info.csv",
        ["key", "sequence_key", "frame_number"],
        (
            (key, f"{name}-{folder.name}-{drive}{'-pano' if wide else ''}", view.place)
            for key, drive, view, wide in zip(keys, drives, views, pano, strict=True)
        ),
    )
    detail = [
        [key, n, "Sideways" if abs(v.camera.yaw) > SIDEWAYS_YAW else "Forward"]
        for key, n, v in zip(keys, night, views, strict=True)
    ]
    columns = ["key", "night", "view_direction"]
    if not secret:
        columns += ["easting", "northing"]
        detail = [[*row, f"{view.east:.3f}", f"{view.north:.3f}"] for row, view in zip(detail, views, strict=True)]
    _write_csv(folder / "postprocessed.csv", columns, detail)
    _write_csv(
        folder / "subtask_index.csv",
        ["key", *SUBTASKS],
        ([key, *_subtasks(folder.name == "query", n, d)] for key, n, d in zip(keys, night, drives, strict=True)),
    )


def _subtasks(is_query: bool, night: bool, drive: int) -> list[bool]:
    """Flags in the order of SUBTASKS: even drives are the older ones, in summer."""
    early = drive % 2 == 0
    first = [early, early, not night]  # whether the picture is of the first of summer/winter, old/new, day/night
    flags = [True]
    for is_first in first:
        flags += [is_first == is_query, is_first != is_query]
    return flags


def _dates(views: Sequence[View]) -> list[str]:
    days = np.datetime64("2017-06-01") + np.array([31 * view.place for view in views])
    return [str(day) for day in days]


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *columns])
        writer.writerows([index, *row] for index, row in enumerate(rows))
