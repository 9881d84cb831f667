"""Datasets whose places are camera poses: RobotCar Seasons v2, Extended CMU Seasons, any Kapture, COLMAP or hloc."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patchnetvlad.datasets.dataset import Dataset, Pictures
from patchnetvlad.errors import UserError, counted
from patchnetvlad.localization.poses import Pose, read_kapture, read_poses

_RECORDS = Path("sensors") / "records_data"


def kapture_folders(
    root: Path,
    mappings: Sequence[str] = ("mapping",),
    queries: Sequence[str] = ("query",),
    radius: float | None = None,
    name: str = "dataset",
    only_posed: bool = False,
) -> list[Dataset]:
    """Kapture folders below the root, several of each where a dataset comes in slices (Extended CMU Seasons).

    Coordinates are the cameras' places (3). The benchmarks keep most query poses to themselves: such queries stay in
    the list and there is no ground truth, or, with only_posed, they are left out and counted.
    """
    database, notes = _kapture_side(root, mappings, True)
    asked, query_notes = _kapture_side(root, queries, only_posed)
    return [Dataset(name, asked, database, 5 if radius is None else radius, notes=(*notes, *query_notes))]


def pose_files(
    root: Path, queries: str, database: str, images: str = "", radius: float | None = None, name: str = "dataset"
) -> list[Dataset]:
    """A COLMAP model or a file of lines NAME qw qx qy qz tx ty tz (hloc) each for queries and database.

    images: the folder below the root that the names start from.
    """
    sides = []
    for given in (queries, database):
        poses = read_poses(root / given if (root / given).exists() else Path(given))
        if not poses:
            raise UserError(f"{given}: holds no pose")
        sides.append(_pictures({(Path(images) / name).as_posix(): pose for name, pose in poses.items()}))
    return [Dataset(name, sides[0], sides[1], 5 if radius is None else radius, "model units")]


def _kapture_side(root: Path, folders: Sequence[str], only_posed: bool) -> tuple[Pictures, tuple[str, ...]]:
    poses: dict[str, Pose | None] = {}
    for folder in folders:
        folder_poses = read_kapture(root / folder)
        poses |= {(Path(folder) / _RECORDS / name).as_posix(): pose for name, pose in folder_poses.items()}
    unposed = [name for name, pose in poses.items() if pose is None]
    if not unposed:
        return _pictures({name: pose for name, pose in poses.items() if pose is not None}), ()
    without = f"{len(unposed)} of {counted(len(poses), 'picture')} of {', '.join(folders)} without a pose"
    if only_posed and len(unposed) < len(poses):
        note = f"left out: {without}"
        return _pictures({name: pose for name, pose in poses.items() if pose is not None}), (note,)
    note = without
    if only_posed:
        raise UserError(f"{root}: {note} (are the trajectories of another download?)")
    return Pictures(tuple(poses)), (note,)


def _pictures(poses: dict[str, Pose]) -> Pictures:
    return Pictures(tuple(poses), np.stack([pose.center for pose in poses.values()]))
