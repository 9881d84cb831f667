"""Camera poses: read from Kapture, COLMAP and hloc, compared with a ground truth, written for the benchmark's server.

A pose turns world coordinates into a camera's: x_camera = R(quaternion) x_world + translation, in metres. This module
is the only one that knows the files of poses.
"""

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import UserError
from patchnetvlad.files import read_text, told, write_text
from patchnetvlad.result_files import read_lines

THRESHOLDS = ((0.25, 2.0), (0.5, 5.0), (5.0, 10.0))  # metres and degrees of the visual localisation benchmark
_RECORDS = "sensors/records_data/"  # Kapture's folder of pictures, below which it counts names
_COLMAP_POSE = struct.Struct("<i7di")  # picture, quaternion, translation, camera


@dataclass(frozen=True, eq=False)
class Pose:
    """quaternion: (4,) unit, w x y z; translation: (3,)."""

    quaternion: NDArray[np.float64]
    translation: NDArray[np.float64]

    @property
    def center(self) -> NDArray[np.float64]:
        """The camera's place in the world, (3,)."""
        return -rotate(conjugate(self.quaternion), self.translation)

    def after(self, first: "Pose") -> "Pose":
        """This pose applied to the outcome of another."""
        turned = rotate(self.quaternion, first.translation)
        return Pose(multiply(self.quaternion, first.quaternion), turned + self.translation)


@dataclass(frozen=True)
class PoseScore:
    """Percentages of queries within each of THRESHOLDS; num_localized of num_queries had an estimate at all.

    medians: of metres and degrees over queries with an estimate, NaN if there is none.
    """

    percentages: tuple[float, ...]
    num_queries: int
    num_localized: int
    medians: tuple[float, float]


def multiply(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Product of two quaternions: b's rotation, then a's."""
    w, v = a[0] * b[0] - a[1:] @ b[1:], a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.concatenate([[w], v])


def conjugate(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """The opposite rotation."""
    return quaternion * np.array([1.0, -1.0, -1.0, -1.0])


def rotate(quaternion: NDArray[np.float64], vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """A vector (3,) turned by a unit quaternion."""
    cross = np.cross(quaternion[1:], vector)
    return vector + 2 * (quaternion[0] * cross + np.cross(quaternion[1:], cross))


def pose_errors(estimate: Pose, truth: Pose) -> tuple[float, float]:
    """Metres between the cameras' places and degrees between their directions."""
    relative = multiply(estimate.quaternion, conjugate(truth.quaternion))
    angle = 2 * np.arctan2(np.linalg.norm(relative[1:]), abs(relative[0]))
    return float(np.linalg.norm(estimate.center - truth.center)), float(np.degrees(angle))


def score_poses(estimates: Mapping[str, Pose], truths: Mapping[str, Pose]) -> PoseScore:
    """Compare by name; a query of the truth without an estimate counts as not within any threshold."""
    errors = np.array([pose_errors(estimates[name], truths[name]) for name in truths if name in estimates])
    within = [
        int(((errors[:, 0] <= metres) & (errors[:, 1] <= degrees)).sum()) if len(errors) else 0
        for metres, degrees in THRESHOLDS
    ]
    percentages = tuple(100 * count / len(truths) if truths else float("nan") for count in within)
    medians = (float(np.median(errors[:, 0])), float(np.median(errors[:, 1]))) if len(errors) else (np.nan, np.nan)
    return PoseScore(percentages, len(truths), len(errors), medians)


def by_condition(names: Sequence[str], pattern: str = r"^([^/]+)/") -> dict[str, list[str]]:
    """Names by what the pattern's first group finds in them, such as night/rear/1.jpg by night; sorted by condition."""
    try:
        expression = re.compile(pattern)
        if not expression.groups:
            raise re.error("no group", pattern)
    except re.error as error:
        raise UserError(f"--condition_pattern {pattern}: expected a regular expression with one group") from error
    grouped: dict[str, list[str]] = {}
    for name in names:
        match = expression.search(name)
        grouped.setdefault(match[1] if match and match[1] else "(none)", []).append(name)
    return dict(sorted(grouped.items()))


def record_name(name: str) -> str:
    """A picture's name as Kapture counts it, below sensors/records_data; others unchanged."""
    return name.split(_RECORDS, 1)[1] if _RECORDS in name else name


def read_poses(path: Path) -> dict[str, Pose]:
    """Poses by picture name: a Kapture folder, a COLMAP model's folder or images.txt / .bin, or lines NAME qw qx qy qz
    tx ty tz. Raises UserError for anything else, a repeated name and a quaternion of length 0."""
    if path.is_dir():
        if (path / "sensors" / "records_camera.txt").is_file():
            return {name: pose for name, pose in read_kapture(path).items() if pose is not None}
        model = next((path / file for file in ("images.bin", "images.txt") if (path / file).is_file()), None)
        if model is None:
            raise UserError(
                f"{path}: neither a Kapture folder (sensors/records_camera.txt) nor a COLMAP model (images.txt)"
            )
        path = model
    if path.name == "images.bin":
        return _read_colmap_binary(path)
    if path.name == "images.txt":
        return _read_colmap_text(path)
    poses: dict[str, Pose] = {}
    for number, line in read_lines(path):
        fields = line.split()
        _add(poses, path, number, fields[0], fields[1:])
    return poses


def read_kapture(folder: Path) -> dict[str, Pose | None]:
    """All pictures of a Kapture folder in the order of records_camera.txt, with their poses where there are any."""
    sensors = folder / "sensors"
    rigs: dict[str, dict[str, Pose]] = {}
    if (sensors / "rigs.txt").is_file():
        for number, fields in _kapture_rows(sensors / "rigs.txt", 9):
            rigs.setdefault(fields[0], {})[fields[1]] = _pose(sensors / "rigs.txt", number, fields[2:])
    placed: dict[tuple[str, str], Pose] = {}
    if (sensors / "trajectories.txt").is_file():
        for number, fields in _kapture_rows(sensors / "trajectories.txt", 9):
            if all(fields[2:]):  # a pose may be known in part only
                _place(placed, rigs, fields[0], fields[1], _pose(sensors / "trajectories.txt", number, fields[2:]))
    poses: dict[str, Pose | None] = {}
    for number, (timestamp, device, name) in _kapture_rows(sensors / "records_camera.txt", 3):
        if name in poses:
            raise UserError(f"{sensors / 'records_camera.txt'}: line {number}: {name} appears a second time")
        poses[name] = placed.get((timestamp, device))
    return poses


def write_submission(
    path: Path, estimates: Mapping[str, Pose], rename: Callable[[str], str] = lambda name: name
) -> None:
    """Lines NAME qw qx qy qz tx ty tz, as the visual localisation benchmark takes them.

    rename: what the benchmark calls a picture, see SUBMISSION_NAMES. Raises UserError when two would have one name.
    """
    lines: dict[str, str] = {}
    for name, pose in estimates.items():
        called = rename(name)
        if called in lines or called.split() != [called]:
            raise UserError(f"{path}: picture {name}: {called!r} is not a name of one picture (other --names?)")
        numbers = " ".join(f"{value:.17g}" for value in (*pose.quaternion, *pose.translation))
        lines[called] = f"{called} {numbers}\n"
    write_text(path, lines.values())


SUBMISSION_NAMES: dict[str, Callable[[str], str]] = {  # what the benchmark's datasets call their pictures
    "full": record_name,
    "robotcar": lambda name: "/".join(PurePosixPath(name).parts[-2:]),  # rear/1417178398999999.jpg
    "cmu": lambda name: PurePosixPath(name).name,
}


def _place(
    placed: dict[tuple[str, str], Pose], rigs: dict[str, dict[str, Pose]], timestamp: str, device: str, pose: Pose
) -> None:
    """Keep a device's pose; a rig's is handed on to its sensors, which may be rigs themselves."""
    placed[timestamp, device] = pose
    for sensor, mounted in rigs.get(device, {}).items():
        _place(placed, rigs, timestamp, sensor, mounted.after(pose))


def _read_colmap_text(path: Path) -> dict[str, Pose]:
    poses: dict[str, Pose] = {}
    text = read_text(path, "COLMAP's images.txt")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if not line.startswith("#")]
    for number, line in lines[::2]:  # every second line holds the picture's points, and may be empty
        if not line.strip():
            break
        fields = line.split(maxsplit=9)
        if len(fields) != 10:
            raise UserError(f"{path}: line {number}: expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME")
        _add(poses, path, number, fields[9].strip(), fields[1:8])
    return poses


def _read_colmap_binary(path: Path) -> dict[str, Pose]:
    poses: dict[str, Pose] = {}
    with told(path, "cannot be read"):
        content = path.read_bytes()
    try:
        (count,) = struct.unpack_from("<Q", content)
        place = 8
        for number in range(count):
            _, *values, _ = _COLMAP_POSE.unpack_from(content, place)
            end = content.index(b"\0", place + _COLMAP_POSE.size)
            name = content[place + _COLMAP_POSE.size : end].decode("utf-8")
            (points,) = struct.unpack_from("<Q", content, end + 1)
            place = end + 9 + 24 * points  # x, y and the point's number
            _add(poses, path, number + 1, name, values)
        if place != len(content):
            raise ValueError(f"{place} bytes expected, {len(content)} found")
    except (struct.error, ValueError) as error:
        raise UserError(f"{path}: not COLMAP's images.bin, or damaged ({error})") from error
    return poses


def _kapture_rows(path: Path, columns: int) -> list[tuple[int, list[str]]]:
    rows = [(number, [field.strip() for field in line.split(",")]) for number, line in read_lines(path)]
    for number, fields in rows:
        if len(fields) != columns:
            raise UserError(f"{path}: line {number}: expected {columns} columns, not {len(fields)}")
    return rows


def _add(poses: dict[str, Pose], path: Path, number: int, name: str, values: Sequence[str | float]) -> None:
    if name in poses:
        raise UserError(f"{path}: line {number}: {name} appears a second time")
    poses[name] = _pose(path, number, values)


def _pose(path: Path, number: int, values: Sequence[str | float]) -> Pose:
    try:
        numbers = np.array([float(value) for value in values], dtype=np.float64)
        if len(numbers) != 7 or not np.isfinite(numbers).all() or np.linalg.norm(numbers[:4]) <= 1e-6:
            raise ValueError(numbers)
    except ValueError as error:
        raise UserError(f"{path}: line {number}: expected qw qx qy qz tx ty tz, seven numbers") from error
    return Pose(numbers[:4] / np.linalg.norm(numbers[:4]), numbers[4:])
