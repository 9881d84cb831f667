"""A dataset as makers hand it on: names and coordinates of queries and database; checked, summed up and written."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.errors import UserError, by_number, counted
from patchnetvlad.files import some_of, write_text
from patchnetvlad.ground_truth import GroundTruth, with_unit, write_ground_truth
from patchnetvlad.image_lists import PICTURE_EXTENSIONS, list_file_name, write_image_list
from patchnetvlad.localization.coordinates import Zone

_NAMED = 20  # in a message; a file names the others


@dataclass(frozen=True, eq=False)
class Pictures:
    """names: relative to the dataset's root; coordinates: numbers n×c, row i of picture i, None where not known."""

    names: tuple[str, ...]
    coordinates: NDArray[np.number] | None = None

    def __post_init__(self) -> None:
        if self.coordinates is not None and len(self.coordinates) != len(self.names):
            raise ValueError(f"{len(self.coordinates)} coordinates for {counted(len(self.names), 'picture')}")

    def __len__(self) -> int:
        return len(self.names)

    def keep(self, rows: NDArray[np.int64]) -> "Pictures":
        """The pictures of these rows."""
        coordinates = None if self.coordinates is None else self.coordinates[rows]
        return Pictures(tuple(self.names[row] for row in rows), coordinates)


@dataclass(frozen=True, eq=False)
class Dataset:
    """What a maker found. name: of the lists; radius: a true match lies within it, in the coordinates' unit;
    ground_truth_name: of the .npz file, where it is not the lists'; zone: of UTM coordinates; notes: what the user
    should know, counted; panorama_cutouts: database pictures in a row that show one panorama."""

    name: str
    queries: Pictures
    database: Pictures
    radius: float
    unit: str = "m"
    zone: Zone | None = None
    ground_truth_name: str | None = None
    notes: tuple[str, ...] = ()
    panorama_cutouts: int = 1

    def ground_truth(self) -> GroundTruth | None:
        """None when some coordinates are not known."""
        if self.queries.coordinates is None or self.database.coordinates is None:
            return None
        return GroundTruth(
            self.queries.coordinates.astype(np.float64),
            self.database.coordinates.astype(np.float64),
            self.radius,
            self.unit,
        )

    def noted(self, *notes: str) -> "Dataset":
        """With further notes."""
        return replace(self, notes=(*self.notes, *notes))


@dataclass(frozen=True)
class DatasetFiles:
    """Where the lists and the ground truth (None: coordinates not known) of a dataset are."""

    queries: Path
    database: Path
    ground_truth: Path | None


def check_names(dataset: Dataset) -> None:
    """Raises UserError where queries or database are empty, and for a picture that one list holds twice."""
    for side, pictures in (("query", dataset.queries), ("database", dataset.database)):
        if not len(pictures):
            raise UserError(f"{dataset.name}: no {side} picture found (is the dataset's folder right?)")
        seen: set[str] = set()
        twice = [name for name in pictures.names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        if twice:
            named = some_of(twice, _NAMED)
            raise UserError(
                f"{dataset.name}: listed twice {by_number(len(twice), 'is', 'are')} "
                f"{counted(len(twice), f'{side} picture')} (duplicate keys?): {named}"
            )


def check_pictures(
    dataset: Dataset, root: Path, leave_out: bool = False, report: Path | None = None, progress: bool = False
) -> Dataset:
    """The dataset with every picture found below the root.

    A picture whose file has another extension (Tokyo 24/7 lists .jpg, its files are .png) is taken under the name
    of its file. Absent ones are an error that counts and names them, in the file ``report`` where they are many; with
    leave_out they are left out, with the other cut-outs of their panorama, and notes count them.
    """
    notes: list[str] = []
    absent: list[str] = []
    sides = []
    for pictures, block in ((dataset.queries, 1), (dataset.database, dataset.panorama_cutouts)):
        listed = tqdm(pictures.names, f"Looking for pictures of {dataset.name}", unit="img", disable=not progress)
        names = [_find(root, name) for name in listed]
        renamed = sum(new not in (None, old) for new, old in zip(names, pictures.names, strict=True))
        if renamed:
            notes.append(f"listed under another extension, that of the file: {counted(renamed, 'picture')}")
        absent += [old for new, old in zip(names, pictures.names, strict=True) if new is None]
        with_file_names = Pictures(
            tuple(new or old for new, old in zip(names, pictures.names, strict=True)), pictures.coordinates
        )
        present = np.array([name is not None for name in names], dtype=bool)
        kept = _whole_blocks(present, block)
        if (broken := int(present.sum() - kept.sum())) > 0:
            notes.append(f"left out: {counted(broken, 'cut-out')} at hand of panoramas that are not complete")
        sides.append(with_file_names.keep(np.flatnonzero(kept)))
    if absent:
        total = len(dataset.queries) + len(dataset.database)
        where = ""
        if len(absent) > _NAMED and report is not None:
            write_text(report, (f"{name}\n" for name in absent))
            where = f"; all are named in {report}"
        named = f"{some_of(absent, _NAMED)}{where}"
        message = f"{len(absent)} of {counted(total, 'listed picture')} not found below {root}: {named}"
        enough = all(len(side) for side in sides)
        if not leave_out or not enough:
            hint = "; --incomplete leave_out goes on without them" if enough else ", too few are left (another root?)"
            raise UserError(f"{dataset.name}: {message}{hint}")
        notes.append(f"left out: {message}")
    return replace(dataset, queries=sides[0], database=sides[1]).noted(*notes)


def with_matches_only(dataset: Dataset) -> Dataset:
    """The dataset without queries that have no true match, as the official MSLS protocol has it."""
    truth = dataset.ground_truth()
    if truth is None:
        raise UserError(f"{dataset.name}: --only_queries_with_match: there are no coordinates to tell them by")
    rows = np.flatnonzero([len(rows) > 0 for rows in truth.positives()])
    dropped = len(dataset.queries) - len(rows)
    if not len(rows):
        raise UserError(f"{dataset.name}: no query has a match within {with_unit(dataset.radius, dataset.unit)}")
    return replace(dataset, queries=dataset.queries.keep(rows)).noted(
        f"left out: {counted(dropped, 'query', 'queries')} without a match"
    )


def write_dataset(dataset: Dataset, lists: Path, ground_truths: Path) -> DatasetFiles:
    """Write the list of the queries, that of the database, and NAME.npz."""
    files = DatasetFiles(
        lists / list_file_name(dataset.name, "query"),
        lists / list_file_name(dataset.name, "index"),
        ground_truths / f"{dataset.ground_truth_name or dataset.name}.npz" if dataset.ground_truth() else None,
    )
    write_image_list(files.queries, dataset.queries.names)
    write_image_list(files.database, dataset.database.names)
    if files.ground_truth is not None:
        assert dataset.queries.coordinates is not None and dataset.database.coordinates is not None
        write_ground_truth(
            files.ground_truth,
            dataset.queries.coordinates,
            dataset.database.coordinates,
            dataset.radius,
            dataset.unit,
            (dataset.queries.names, dataset.database.names),
            str(dataset.zone) if dataset.zone else None,
        )
    return files


def summary(dataset: Dataset) -> list[str]:
    """What was found, line by line."""
    counts = counted(len(dataset.queries), "query", "queries"), counted(len(dataset.database), "database picture")
    lines = [f"{dataset.name}: {', '.join(counts)}"]
    truth = dataset.ground_truth()
    if truth is None:
        lines.append("  not all pictures have coordinates: lists only, no ground truth")
    else:
        unmatched = sum(len(rows) == 0 for rows in truth.positives())
        without = counted(unmatched, "query has", "queries have")
        lines.append(f"  a match lies within {with_unit(dataset.radius, dataset.unit)}; {without} none")
        coordinates = np.concatenate([truth.utm_query, truth.utm_database])
        if dataset.unit in ("frames", "pictures"):
            coordinates = coordinates[:, :1]  # places in a row have a 0 beside them
        extent = ", ".join(
            f"{low:.12g} to {high:.12g}"
            for low, high in zip(coordinates.min(0).round(1), coordinates.max(0).round(1), strict=True)
        )
        lines.append(
            f"  coordinates: {extent} ({dataset.unit})" + (f", UTM zone {dataset.zone}" if dataset.zone else "")
        )
        if unmatched == len(dataset.queries):
            lines.append("  warning: no query has a match (coordinates of different origin or unit?)")
    return lines + [f"  note: {note}" for note in dataset.notes]


def _whole_blocks(present: NDArray[np.bool_], block: int) -> NDArray[np.bool_]:
    """Which of n pictures are in a block, of so many in a row, that is complete; the last may be shorter."""
    number = np.arange(len(present)) // block
    incomplete = np.zeros(len(present), dtype=bool)
    incomplete[number[~present]] = True
    return ~incomplete[number]


def _find(root: Path, name: str) -> str | None:
    path = root / name
    if path.is_file():
        return name
    for extension in sorted(PICTURE_EXTENSIONS):
        if path.with_suffix(extension).is_file():
            return str(Path(name).with_suffix(extension).as_posix())
    return None
