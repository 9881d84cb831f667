"""Pictures other than MSLS as training data: one CSV file that says of each where it was taken and what it is for.

Columns, in any case: ``image`` (path, relative to the dataset's root, or absolute); ``easting`` and ``northing`` in
metres, or ``latitude`` and ``longitude`` in degrees, which count where there are both; ``role``, one of ROLES.
Optional: ``city`` (queries are only compared with the database of their city), and the flags ``night``, ``sideways``,
``panorama``.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer

from patchnetvlad.csv_table import PICTURES, read_table, write_table
from patchnetvlad.errors import UserError
from patchnetvlad.ground_truth import UNKNOWN_UNIT, GroundTruth
from patchnetvlad.image_lists import ImageList
from patchnetvlad.training_data import CityPictures, PictureSet, TrainingData

ROLES = ("train_query", "train_database", "val_query", "val_database")
COLUMNS = ("image", "easting", "northing", "role", "city")  # of the tables written here


def read_training_csv(path: Path, root: Path, include_panoramas: bool = False, complete: bool = True) -> TrainingData:
    """Read a CSV file of pictures; raises UserError naming line and column, or the city that lacks a role.

    complete: also when there is nothing to learn from, or to be judged by; another source may have it.
    """
    table = read_table(path)
    images = table.text(PICTURES)
    roles = table.choices("role", ROLES)
    if not images:
        raise UserError(f"{path}: lists no picture")
    if "" in images:
        raise UserError(f"{path}: line {table.lines[images.index('')]}: names no picture")
    positions, geographic = table.positions()
    if geographic:
        positions = earth_centred(*positions.T)
    cities = table.text("city") if table.find("city") else ["all"] * len(images)
    night, sideways, panorama = (
        table.flags(column) if table.find(column) else np.zeros(len(images), dtype=bool)
        for column in ("night", "sideways", "panorama")
    )
    wanted = np.ones(len(images), dtype=bool) if include_panoramas else ~panorama

    def side(city: str, role: str) -> PictureSet:
        rows = [row for row in range(len(images)) if wanted[row] and (cities[row], roles[row]) == (city, role)]
        return PictureSet(
            path,
            tuple(images[row] for row in rows),
            tuple(root / images[row] for row in rows),
            positions[rows],
            night[rows],
            sideways[rows],
            np.zeros(len(rows), dtype=bool),
            np.arange(len(rows), dtype=np.int64)[:, None],
        )

    def cities_for(split: str) -> tuple[CityPictures, ...]:
        city_pictures = []
        for city in dict.fromkeys(cities):
            queries, database = side(city, f"{split}_query"), side(city, f"{split}_database")
            if (len(queries) and not len(database)) or (len(database) and not len(queries)):
                lacking = "database" if len(queries) else "query"
                raise UserError(f"{path}: city {city} has no picture of role {split}_{lacking}")
            if len(queries):
                city_pictures.append(CityPictures(city, queries, database))
        if complete and not city_pictures:
            raise UserError(f"{path}: no picture has the roles {split}_query and {split}_database")
        return tuple(city_pictures)

    return TrainingData(cities_for("train"), cities_for("val"))


def write_training_csv(
    path: Path, split: str, city: str, queries: ImageList, database: ImageList, truth: GroundTruth
) -> None:
    """Write the lists and ground truth of a dataset as such a file.

    split: train or val, what its pictures are for; city: what the dataset is called beside others.
    Raises UserError for coordinates other than easting and northing in metres; published ones are taken for these.
    """
    if truth.unit not in ("m", UNKNOWN_UNIT) or truth.utm_query.shape[1] != 2:
        raise UserError(
            f"{path}: the ground truth has {truth.utm_query.shape[1]} coordinates in {truth.unit}, and training needs "
            "easting and northing in metres"
        )
    rows = [
        (name, easting, northing, f"{split}_{side}", city)
        for pictures, positions, side in (
            (queries, truth.utm_query, "query"),
            (database, truth.utm_database, "database"),
        )
        for name, (easting, northing) in zip(pictures.names, positions.tolist(), strict=True)
    ]
    write_table(path, COLUMNS, rows)


def earth_centred(latitude: NDArray[np.float64], longitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metres from the earth's centre, n×3, of degrees on the WGS 84 ellipsoid: true distances, anywhere."""
    to_metres = Transformer.from_crs("EPSG:4979", "EPSG:4978")
    return np.column_stack(to_metres.transform(latitude, longitude, np.zeros_like(latitude)))
