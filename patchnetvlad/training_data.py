"""What training learns from and is judged by: the pictures of cities, where each was taken, and who matches whom."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.distributed import Processes
from patchnetvlad.errors import UserError
from patchnetvlad.files import some_of
from patchnetvlad.ground_truth import GroundTruth
from patchnetvlad.images import check_images
from patchnetvlad.mapillary import SIDES, TASKS, CitySide, read_side

logger = logging.getLogger(__name__)


Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Pictures of one side of a city, queries or database.

    keys and paths: one for each picture; positions: float64 n×c in metres (c = 2, or 3 for earth-centred ones), None
    where they are secret; night, sideways: bool n; unlabelled: bool n, those of which the source does not tell one of
    the two; units: int64 u×L, the pictures of each unit that is matched: one picture (L = 1) or the L pictures of a
    sequence; source: where the set came from, for messages.
    """

    source: Path
    keys: tuple[str, ...]
    paths: tuple[Path, ...]
    positions: NDArray[np.float64] | None
    night: NDArray[np.bool_]
    sideways: NDArray[np.bool_]
    unlabelled: NDArray[np.bool_]
    units: Rows

    def __len__(self) -> int:
        return len(self.keys)

    def kept(self, keep: NDArray[np.bool_]) -> "PictureSet":
        """The set of the pictures where ``keep`` (bool n) is true; a unit that loses one of its pictures goes."""
        units = self.units[keep[self.units].all(axis=1)]
        used = np.unique(units)
        new_row = np.full(len(self), -1, dtype=np.int64)
        new_row[used] = np.arange(len(used))
        return replace(
            self,
            keys=tuple(self.keys[row] for row in used),
            paths=tuple(self.paths[row] for row in used),
            positions=None if self.positions is None else self.positions[used],
            night=self.night[used],
            sideways=self.sideways[used],
            unlabelled=self.unlabelled[used],
            units=new_row[units],
        )


@dataclass(frozen=True, eq=False)
class CityPictures:
    """One city: its queries and the database that they are searched in."""

    name: str
    queries: PictureSet
    database: PictureSet

    def positives(self, radius: float) -> list[Rows]:
        """Database units within the radius (inclusive) of each query unit, ascending.

        Two sequences match when any picture of one is that near to any picture of the other.
        Raises UserError for a city whose positions are secret.
        """
        if self.queries.positions is None or self.database.positions is None:
            side = self.queries if self.queries.positions is None else self.database
            raise UserError(f"{side.source}: has no easting and northing (a test city? its positions are secret)")
        pairs = GroundTruth(self.queries.positions, self.database.positions, radius).positives()
        units_of: list[list[int]] = [[] for _ in range(len(self.database))]
        for unit, rows in enumerate(self.database.units.tolist()):
            for row in rows:
                units_of[row].append(unit)
        return [
            np.array(sorted({unit for row in rows for near in pairs[row] for unit in units_of[near]}), dtype=np.int64)
            for rows in self.queries.units.tolist()
        ]


def read_cities(
    root: Path,
    cities: Sequence[str],
    task: str = "im2im",
    sequence_length: int = 3,
    subtask: str = "all",
    include_panoramas: bool = False,
) -> tuple[CityPictures, ...]:
    """Read cities of an MSLS tree for training and validation, each CSV file once.

    sequence_length: odd number of pictures of a sequence, for the sides of the task that have sequences. A sequence
    is a run of consecutive frames; it belongs to a subtask when its middle picture does, and is left out when one of
    its pictures is.
    Raises UserError naming city, file, line and column. Pictures themselves are not looked at.
    """
    if task not in TASKS:
        raise UserError(f"task {task}: expected one of {', '.join(TASKS)}")
    if "seq" in task and (sequence_length < 3 or sequence_length % 2 == 0):
        raise UserError(f"sequence length {sequence_length}: expected an odd number of 3 or more")
    lengths = [sequence_length if side == "seq" else 1 for side in task.split("2")]
    city_pictures = []
    for city in cities:
        queries, database = (
            _picture_set(read_side(root, city, side, subtask), length, subtask, include_panoramas)
            for side, length in zip(SIDES, lengths, strict=True)
        )
        city_pictures.append(CityPictures(city, queries, database))
    return tuple(city_pictures)


def _picture_set(side: CitySide, length: int, subtask: str, include_panoramas: bool) -> PictureSet:
    units = side.units(length, include_panoramas)
    if not len(units):
        raise UserError(
            f"{side.folder}: no {'picture' if length == 1 else f'sequence of {length} pictures'} is left of "
            f"{len(side.keys)} pictures (panoramas: {side.panorama.sum()}, includepanos = {include_panoramas}; subtask "
            f"{subtask})"
        )
    side.require_positions(np.unique(units))
    whole = PictureSet(
        side.folder,
        side.keys,
        tuple(map(side.picture, side.keys)),
        side.positions,
        side.night,
        side.sideways,
        side.unlabelled,
        units,
    )
    return whole.kept(np.ones(len(side.keys), dtype=bool))


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Cities to learn from and cities to be judged by."""

    train: tuple[CityPictures, ...]
    validation: tuple[CityPictures, ...]

    def checked(self, processes: Processes, decode: bool, skip: bool, workers: int, progress: bool) -> "TrainingData":
        """The data without doubt about its files: all are there, and with ``decode`` every picture can be read.

        Decoding is shared among the processes, each with so many ``workers``; all of them find the same.
        Raises UserError naming the first bad files, or with ``skip`` leaves those pictures out and says so.
        """
        sides = [side for city in (*self.train, *self.validation) for side in (city.queries, city.database)]
        problems = _missing_files(sides)
        if decode:
            there = list(dict.fromkeys(path for side in sides for path in side.paths if path not in problems))
            shares = processes.gathered(check_images(processes.share(there), workers, progress))
            unreadable = {path: problem for share in shares for path, problem in share.items()}
            problems |= {path: unreadable[path] for path in there if path in unreadable}
        if problems:
            shown = some_of(list(problems.values()), separator="; ")
            total = sum(map(len, sides))
            if not skip:
                raise UserError(
                    f"{len(problems)} of {total} pictures cannot be used: {shown} (restore them, or leave them "
                    "out with --skip_unreadable)"
                )
            logger.warning("%d of %d pictures are left out: %s", len(problems), total, shown)

        def cleaned(side: PictureSet) -> PictureSet:
            keep = np.array([path not in problems for path in side.paths], dtype=bool)
            return side if keep.all() else side.kept(keep)

        def clean(cities: Sequence[CityPictures]) -> tuple[CityPictures, ...]:
            return tuple(CityPictures(city.name, cleaned(city.queries), cleaned(city.database)) for city in cities)

        return TrainingData(clean(self.train), clean(self.validation))


@dataclass(frozen=True, eq=False)
class TripletPlaces:
    """All training cities as one: what mining draws from.

    paths: all queries, then all database pictures; a picture's number is its place there. num_queries: how many are
    queries, each of which has a positive. positives: numbers of the database pictures that show a query's place;
    near: those that are too near to be its negatives, positives included; weights: chance of each query to be drawn.
    """

    paths: tuple[Path, ...]
    num_queries: int
    positives: tuple[Rows, ...]
    near: tuple[Rows, ...]
    weights: NDArray[np.float64]

    @property
    def num_database(self) -> int:
        return len(self.paths) - self.num_queries


def triplet_places(cities: Sequence[CityPictures], positive_radius: float, negative_radius: float) -> TripletPlaces:
    """Join cities of single pictures; queries without a positive are left out.

    Raises UserError when a city has none at all, or when its units are sequences.
    """
    queries: list[Path] = []
    database: list[Path] = []
    positives: list[Rows] = []
    near: list[Rows] = []
    labels: list[NDArray[np.bool_]] = []  # night, sideways, unlabelled: 3×queries of each city
    for city in cities:
        if city.queries.units.shape[1] != 1 or city.database.units.shape[1] != 1:
            raise UserError(f"{city.queries.source}: training learns from single pictures (task im2im)")
        positives_here = city.positives(positive_radius)
        near_here = city.positives(negative_radius)
        used = [row for row, rows in enumerate(positives_here) if len(rows)]
        if not used:
            raise UserError(
                f"{city.queries.source}: none of the {len(city.queries)} queries of {city.name} has a database picture "
                f"within {positive_radius:g} m, nor can anything be learned there (leave the city out?)"
            )
        queries += [city.queries.paths[row] for row in used]
        positives += [positives_here[row] + len(database) for row in used]
        near += [near_here[row] + len(database) for row in used]
        labels.append(np.stack([city.queries.night, city.queries.sideways, city.queries.unlabelled])[:, used])
        database += city.database.paths
        logger.info(
            "training: %s: %d queries of %d have a positive, %d database pictures",
            city.name,
            len(used),
            len(city.queries),
            len(city.database),
        )
    night, sideways, unlabelled = np.concatenate(labels, axis=1)
    if unlabelled.any():
        logger.warning(
            "training: %d of %d queries have no known night or view_direction, and count as taken by day, looking "
            "forward, where it is not told",
            unlabelled.sum(),
            len(queries),
        )
    offset = len(queries)
    return TripletPlaces(
        (*queries, *database),
        offset,
        tuple(rows + offset for rows in positives),
        tuple(rows + offset for rows in near),
        sampling_weights(night, sideways),
    )


def sampling_weights(night: NDArray[np.bool_], sideways: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weight 1, and N/#night more for a night query, N/#sideways more for a sideways one (bool N each)."""
    weights = np.ones(len(night))
    for rare in (night, sideways):
        if rare.any():
            weights[rare] += len(rare) / rare.sum()
    return weights


def _missing_files(sides: Sequence[PictureSet]) -> dict[Path, str]:
    """What is wrong with each picture that is not there; one listing a folder instead of a look at each file."""
    folders: dict[Path, frozenset[str]] = {}
    problems: dict[Path, str] = {}
    for side in sides:
        for path in side.paths:
            if path.parent not in folders:
                exists = path.parent.is_dir()
                folders[path.parent] = (
                    frozenset(entry.name for entry in path.parent.iterdir()) if exists else frozenset()
                )
            if path.name not in folders[path.parent]:
                problems[path] = f"{path}: no such file"
    return problems
