"""Small cities of rendered places: which views make the database and the queries, and their known geometry."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from patchnetvlad.examples.rendered_places import Camera, Condition, Place, Size, facade_homography, render_place
from patchnetvlad.files import replacing, write_text
from patchnetvlad.ground_truth import write_ground_truth
from patchnetvlad.image_lists import list_file_name, write_image_list

MATCH_RADIUS = 25.0  # metres


@dataclass(frozen=True)
class View:
    """A picture to be taken: its file name, of which place, from where, when; east and north in metres."""

    name: str
    place: int
    camera: Camera
    condition: Condition
    east: float
    north: float


@dataclass(frozen=True)
class City:
    """Places, and the views that make a database and its queries."""

    places: tuple[Place, ...]
    database: tuple[View, ...]
    queries: tuple[View, ...]

    def render(self, view: View, size: Size = (640, 480)) -> Image.Image:
        return render_place(self.places[view.place], view.camera, view.condition, size)


def _database_visit(rng: np.random.Generator, turn: int, count: int) -> tuple[Camera, Condition]:
    """By day, from one of ``count`` stretches of 6 m of the street."""
    x = 6 * (turn + 0.5) / count - 3 + rng.uniform(-1, 1)
    camera = Camera(x, rng.uniform(13.5, 16), rng.uniform(1.5, 1.8), -x + rng.uniform(-4, 4), rng.uniform(5.5, 8))
    return camera, Condition(0.0, int(rng.random() < 0.15), 1.0, 0.0, int(rng.integers(1 << 30)))


def _query_visit(rng: np.random.Generator, turn: int) -> tuple[Camera, Condition]:
    """From further aside, nearer or further off: two of three at dusk, the third by day behind more traffic."""
    x, distance = rng.uniform(3, 8.5) * (1 if rng.random() < 0.5 else -1), rng.uniform(11, 17.5)
    yaw = -0.85 * math.degrees(math.atan2(x, distance)) + rng.uniform(-4, 4)
    view = rng.uniform(60, 68)
    camera = Camera(x, distance, rng.uniform(1.5, 1.8), yaw, rng.uniform(5.5, 9), view)
    dusk, occluders = ((0.9, 1), (0.0, 3), (1.0, 2))[turn % 3]
    return camera, Condition(dusk, occluders, rng.uniform(2, 4), rng.uniform(0.4, 0.9), int(rng.integers(1 << 30)))


def make_city(
    places: int = 12,
    database_views: Sequence[int] = (3, 2),
    query_views: Sequence[int] = (1, 2),
    seed: int = 0,
    look_alikes: int = 2,
    scale: float = 64.0,
    spacing: float = 60.0,
) -> City:
    """A city of ``places`` places, ``spacing`` metres apart on a square grid.

    Place i has ``database_views[i % len(database_views)]`` database views, and queries likewise; database views of
    a place are 8 m apart at most. Each of the last ``look_alikes`` places shares its style with one of the first.
    With the default spacing, the views within 25 m of a view are exactly those of its place.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 11]))
    originals = places - look_alikes
    street = math.ceil(math.sqrt(places))
    database: list[View] = []
    queries: list[View] = []

    def add(views: list[View], name: str, place: int, camera: Camera, condition: Condition) -> None:
        east = 500_000 + spacing * (place % street) + camera.x
        north = 5_800_000 + spacing * (place // street) - camera.distance
        views.append(View(name, place, camera, condition, east, north))

    for place in range(places):
        count = database_views[place % len(database_views)]
        for turn in range(count):
            add(database, f"database/place{place:02d}_{turn}.jpg", place, *_database_visit(rng, turn, count))
        for turn in range(query_views[place % len(query_views)]):
            add(queries, f"queries/query{place:02d}_{turn}.jpg", place, *_query_visit(rng, len(queries)))
    first = 1000 * seed
    seeds = [(first + place, first + place % originals if originals else first) for place in range(places)]
    return City(tuple(Place(*pair, scale) for pair in seeds), tuple(database), tuple(queries))


def city_geometry(city: City, size: Size = (640, 480)) -> dict[str, object]:
    """Known geometry of a city's pictures, ready for JSON.

    ``pictures``: per file name its place, place seed and style, east and north, camera, condition, and ``facade``,
    the corners of the middle house's front in pixels from its lower left counter-clockwise (they may lie outside).
    ``pairs``: for each query and database picture of one place, the homography of the facade plane from database
    to query pixels, row by row. Whole pixel numbers are pixel centres, (0, 0) the upper left one.
    """
    pictures: dict[str, object] = {}
    for view in (*city.database, *city.queries):
        place = city.places[view.place]
        left, bottom, right, top = place.facade
        corners = np.array([(left, 0, bottom), (right, 0, bottom), (right, 0, top), (left, 0, top)])
        pictures[view.name] = {
            "place": view.place,
            "seed": place.seed,
            "style": place.style,
            "east": view.east,
            "north": view.north,
            "camera": asdict(view.camera),
            "condition": asdict(view.condition),
            "facade": view.camera.project(corners, size).round(3).tolist(),
        }
    pairs = [
        {
            "query": query.name,
            "database": view.name,
            "homography": facade_homography(view.camera, query.camera, size).tolist(),
        }
        for query in city.queries
        for view in city.database
        if view.place == query.place
    ]
    return {"size": list(size), "pictures": pictures, "pairs": pairs}


def write_city(city: City, root: Path, name: str = "example", size: Size = (640, 480), quality: int = 85) -> Path:
    """Write a city's pictures and geometry.json to root/{name}_images, and its lists and ground truth beside them.

    Returns the folder of the pictures.
    """
    pictures = root / f"{name}_images"
    for view in (*city.database, *city.queries):
        with replacing(pictures / view.name, durable=False) as temporary:
            city.render(view, size).save(temporary, quality=quality, optimize=True)
    geometry = city_geometry(city, size)
    write_text(pictures / "geometry.json", json.dumps(geometry, indent=1) + "\n")
    lists, truth = root / "dataset_imagenames", root / "dataset_gt_files"
    sides = (city.queries, city.database)
    query, database = (np.array([(view.east, view.north) for view in views]) for views in sides)
    names = ([view.name for view in city.queries], [view.name for view in city.database])
    write_image_list(lists / list_file_name(name, "query"), names[0])
    write_image_list(lists / list_file_name(name, "index"), names[1])
    write_ground_truth(truth / f"{name}.npz", query, database, MATCH_RADIUS, "m", names)
    return pictures
