"""The table of dataset makers: a dataset as its authors distribute it → lists and ground truth."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from patchnetvlad.datasets.camera_poses import kapture_folders, pose_files
from patchnetvlad.datasets.csv_files import csv_tables, msls, pairs
from patchnetvlad.datasets.dataset import (
    Dataset,
    DatasetFiles,
    check_names,
    check_pictures,
    with_matches_only,
    write_dataset,
)
from patchnetvlad.datasets.matlab import pittsburgh, tokyo247
from patchnetvlad.datasets.picture_names import at_names, exif, folders, frames, nordland
from patchnetvlad.mapillary import SUBTASKS


@dataclass(frozen=True)
class Option:
    """One option of a maker: its name on the command line, and argparse's settings for it."""

    flag: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Maker:
    """help: one line; make: called with the root and the options by name; options: what it takes."""

    help: str
    make: Callable[..., list[Dataset]]
    options: tuple[Option, ...] = ()
    reads_pictures: bool = False  # takes progress too


_MAT = Option("--mat", {"type": Path, "metavar": "FILE", "help": "the .mat file; without it, searched for below ROOT"})
_SPLIT = Option("--split", {"default": "test", "choices": ("train", "val", "test"), "help": "which pictures"})
_RADIUS = Option("--radius", {"type": float, "metavar": "DISTANCE", "help": "true match up to this distance"})
_NAME = Option("--name", {"default": "dataset", "metavar": "NAME", "help": "of the files written"})
_INCOMPLETE = Option(
    "--incomplete",
    {"default": "error", "choices": ("error", "leave_out"), "help": "pictures without file or position"},
)


def _part(flag: str, help_: str, **settings: Any) -> Option:
    return Option(flag, {"metavar": "PATH", "help": f"{help_}, below ROOT", **settings})


_FOLDERS = (
    _part("--queries", "folder of the query pictures", default="queries"),
    _part("--database", "folder of the database pictures", default="database"),
)
_SLICES = (
    _part("--mappings", "Kapture folders of the database", nargs="+", default=["mapping"]),
    _part("--queries", "Kapture folders of the queries", nargs="+", default=["query"]),
    _RADIUS,
    Option("--only_posed", {"action": "store_true", "help": "leave out pictures without a pose"}),
)
_SEASONS = ("spring", "summer", "fall", "winter")

MAKERS: dict[str, Maker] = {
    "pitts30k": Maker("Pittsburgh 30k, from pitts30k_SPLIT.mat", partial(pittsburgh, size="30k"), (_MAT, _SPLIT)),
    "pitts250k": Maker("Pittsburgh 250k, from pitts250k_SPLIT.mat", partial(pittsburgh, size="250k"), (_MAT, _SPLIT)),
    "tokyo247": Maker("Tokyo 24/7, from tokyo247.mat", tokyo247, (_MAT,)),
    "nordland": Maker(
        "Nordland, from season folders of frames",
        nordland,
        (
            Option("--queries", {"default": "winter", "metavar": "SEASON", "help": f"such as {', '.join(_SEASONS)}"}),
            Option("--database", {"default": "summer", "metavar": "SEASON", "help": "the other season"}),
            _RADIUS,
            Option("--published", {"action": "store_true", "help": "coordinates (i, i) as in the published file"}),
        ),
    ),
    "msls": Maker(
        "Mapillary Street-Level Sequences, a dataset for each city",
        msls,
        (
            Option(
                "--cities",
                {"nargs": "+", "default": ["val"], "metavar": "CITY", "help": "cities, or train, val, test"},
            ),
            _RADIUS,
            Option("--subtask", {"default": "all", "choices": SUBTASKS, "help": "day to night: d2n, and so on"}),
            Option("--include_panoramas", {"action": "store_true", "help": "keep panoramas"}),
        ),
    ),
    "robotcar": Maker("RobotCar Seasons v2, from Kapture folders", partial(kapture_folders, name="robotcar"), _SLICES),
    "extended_cmu": Maker(
        "Extended CMU Seasons, from Kapture folders", partial(kapture_folders, name="extended_cmu"), _SLICES
    ),
    "kapture": Maker("any dataset in Kapture folders", kapture_folders, (*_SLICES, _NAME)),
    "at_names": Maker("folders of pictures named @easting@northing@…", at_names, (*_FOLDERS, _RADIUS, _NAME)),
    "csv": Maker(
        "CSV files with latitude and longitude, or easting and northing; the former count where there are both",
        csv_tables,
        (
            _part("--queries", "CSV file of the queries", default="queries.csv"),
            _part("--database", "CSV file of the database", default="database.csv"),
            _RADIUS,
            _NAME,
            _part("--query_folder", "folder that names of the queries start from", default=""),
            _part("--database_folder", "folder that names of the database start from", default=""),
            Option("--zone", {"metavar": "ZONE", "help": "UTM zone, such as 17N; without it, most pictures' own"}),
            _INCOMPLETE,
        ),
    ),
    "exif": Maker("folders of pictures with GPS positions", exif, (*_FOLDERS, _RADIUS, _NAME, _INCOMPLETE), True),
    "frames": Maker(
        "folders of frames, numbered along one way: frame N shows the same place in both",
        frames,
        (
            *_FOLDERS,
            _RADIUS,
            _NAME,
            Option(
                "--offset",
                {
                    "type": int,
                    "default": 0,
                    "metavar": "FRAMES",
                    "help": "frame N of the queries is where frame N + FRAMES of the database is",
                },
            ),
        ),
    ),
    "pairs": Maker(
        "two drives and a CSV file of pictures that show one place, in columns query and database",
        pairs,
        (
            *_FOLDERS,
            Option("--pairs_csv", {"type": Path, "required": True, "metavar": "CSV", "help": "the pairs, by name"}),
            _RADIUS,
            _NAME,
            Option("--interpolate", {"action": "store_true", "help": "place queries between two of the file"}),
            _INCOMPLETE,
        ),
    ),
    "folders": Maker("folders of pictures without positions: lists only", folders, (*_FOLDERS, _NAME)),
    "poses": Maker(
        "COLMAP models or files of poses (NAME qw qx qy qz tx ty tz)",
        pose_files,
        (
            _part("--queries", "model or file of the queries", required=True),
            _part("--database", "model or file of the database", required=True),
            _part("--images", "folder that the names start from", default=""),
            _RADIUS,
            _NAME,
        ),
    ),
}


def finish(
    dataset: Dataset,
    root: Path,
    lists: Path,
    ground_truths: Path,
    leave_out: bool = False,
    only_with_match: bool = False,
    pictures: bool = True,
    progress: bool = False,
) -> tuple[Dataset, DatasetFiles]:
    """Check what a maker found and write it.

    leave_out: absent pictures are counted, not an error; only_with_match: leave out queries without a match;
    pictures: look for the picture files (not needed to evaluate another method's predictions).
    """
    check_names(dataset)
    if pictures:
        dataset = check_pictures(dataset, root, leave_out, lists / f"{dataset.name}_missing.txt", progress)
    if only_with_match:
        dataset = with_matches_only(dataset)
    return dataset, write_dataset(dataset, lists, ground_truths)
