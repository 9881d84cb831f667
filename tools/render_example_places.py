"""Renders the example pictures with their lists, ground truth and geometry (patchnetvlad/rendered_city.py)."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patchnetvlad.rendered_city import City, city_geometry, make_city
from patchnetvlad.rendered_places import Size

MATCH_RADIUS = 25.0  # metres


def write_city(city: City, root: Path, name: str = "example", size: Size = (640, 480), quality: int = 85) -> None:
    """Write a city's pictures and geometry.json to root/{name}_images, and its lists and ground truth beside them."""
    pictures = root / f"{name}_images"
    for view in (*city.database, *city.queries):
        path = pictures / view.name
        path.parent.mkdir(parents=True, exist_ok=True)
        city.render(view, size).save(path, quality=quality, optimize=True)
    geometry = city_geometry(city, size)
    (pictures / "geometry.json").write_text(json.dumps(geometry, indent=1) + "\n", encoding="utf-8")
    lists, truth = root / "dataset_imagenames", root / "dataset_gt_files"
    lists.mkdir(exist_ok=True)
    truth.mkdir(exist_ok=True)
    for kind, views in (("index", city.database), ("query", city.queries)):
        lines = "".join(f"{view.name}\n" for view in views)
        (lists / f"{name}_imageNames_{kind}.txt").write_text(lines, encoding="utf-8")
    positions = [np.array([(v.east, v.north) for v in views]) for views in (city.queries, city.database)]
    np.savez(truth / f"{name}.npz", utmQ=positions[0], utmDb=positions[1], posDistThr=MATCH_RADIUS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--root", type=Path, default=Path(), help="folder that gets NAME_images and the dataset_* folders"
    )
    parser.add_argument("--name", default="example", help="name of the set")
    parser.add_argument("--places", type=int, default=12, help="number of places")
    parser.add_argument("--seed", type=int, default=0, help="another number is another city")
    parser.add_argument("--width", type=int, default=640, help="picture width in pixels")
    parser.add_argument("--height", type=int, default=480, help="picture height in pixels")
    parser.add_argument("--quality", type=int, default=85, help="JPEG quality, 1 to 95")
    options = parser.parse_args(arguments)
    size = (options.width, options.height)
    city = make_city(options.places, seed=options.seed, scale=options.width / 10)
    write_city(city, options.root, options.name, size, options.quality)
    pictures = options.root / f"{options.name}_images"
    print(f"{len(city.database)} database pictures and {len(city.queries)} queries are in {pictures}.")


if __name__ == "__main__":
    main()
