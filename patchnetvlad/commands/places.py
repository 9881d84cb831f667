"""Matches become camera poses and positions on the map."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.errors import UserError, counted
from patchnetvlad.ground_truth import UNKNOWN_UNIT, ground_truth_lengths, read_ground_truth, read_zone, with_unit
from patchnetvlad.image_lists import ImageList, read_image_list
from patchnetvlad.judging_files import write_json
from patchnetvlad.localization.coordinates import parse_zone
from patchnetvlad.localization.pose_approximation import (
    Weighting,
    approximate_poses,
    barycentric_weights,
    equal_weights,
    similarity_weights,
)
from patchnetvlad.localization.poses import (
    SUBMISSION_NAMES,
    THRESHOLDS,
    Pose,
    PoseScore,
    by_condition,
    read_poses,
    record_name,
    score_poses,
    write_submission,
)
from patchnetvlad.localization.position import LIMITS, score_positions
from patchnetvlad.paths import require_file
from patchnetvlad.result_files import read_predictions

if TYPE_CHECKING:
    from patchnetvlad.localization.locating import Located

_WEIGHTINGS = ("best", "equal", "barycentric", "similarity")


def evaluate_poses(arguments: Sequence[str] | None = None) -> int:
    """Poses of queries from their matches, scored, and as a submission to the visual localisation benchmark."""
    parser = Parser(
        "Give every query a camera pose from the poses of its matches; score it, and write a submission.",
        "evaluate_poses.py",
    )
    parser.add_argument("--predictions", required=True, metavar="FILE", help="Kapture or hloc pairs, or .npy of rows")
    parser.add_argument("--query_file_path", required=True, metavar="LIST", help="list of query pictures")
    parser.add_argument("--index_file_path", required=True, metavar="LIST", help="list of database pictures")
    parser.add_argument(
        "--dataset_root_dir", default="", metavar="DIR", help="folder that names in the lists start from"
    )
    parser.add_argument(
        "--database_poses",
        required=True,
        nargs="+",
        type=Path,
        metavar="PATH",
        help="Kapture folders, COLMAP models or files of NAME qw qx qy qz tx ty tz",
    )
    parser.add_argument(
        "--query_poses", nargs="+", type=Path, default=[], metavar="PATH", help="the same, of the queries: true poses"
    )
    parser.add_argument(
        "--approximation",
        default="best",
        choices=_WEIGHTINGS,
        help="pose of the best match, or mean of --top_k: equal (EWB), barycentric descriptors (BDI), similarity (CSI)",
    )
    parser.add_argument("--top_k", type=int, default=10, metavar="K", help="matches in a mean")
    parser.add_argument("--alpha", type=float, default=8.0, help="power of the similarity")
    parser.add_argument("--query_input_features_dir", type=Path, metavar="DIR", help="needed by descriptors' weights")
    parser.add_argument("--index_input_features_dir", type=Path, metavar="DIR", help="needed by descriptors' weights")
    _add_pose_outputs(parser)
    return command_line.run(parser, _evaluate_poses, arguments)


def _add_pose_outputs(parser: Parser) -> None:
    parser.add_argument(
        "--condition_pattern", default=r"^([^/]+)/", metavar="REGEX", help="its group is a query's condition"
    )
    parser.add_argument("--submission", type=Path, metavar="FILE", help="write the poses here")
    parser.add_argument("--names", default="full", choices=list(SUBMISSION_NAMES), help="names in the submission")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the percentages here")


def _evaluate_poses(args: argparse.Namespace) -> None:
    if args.top_k < 1:
        raise UserError(f"--top_k {args.top_k}: expected 1 or more")
    if args.json and not args.query_poses:
        raise UserError("--json: needs --query_poses, to score against")
    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    queries, database = (
        read_image_list(require_file(path, "dataset_imagenames"), root)
        for path in (args.query_file_path, args.index_file_path)
    )
    predicted = read_predictions(Path(args.predictions), queries.names, database.names).indices
    placed = _poses_of(database, _read_all(args.database_poses), args.database_poses)
    weighting, descriptors = _weighting(args, queries, database)
    top_k = 1 if args.approximation == "best" else args.top_k
    poses = approximate_poses(predicted, placed, top_k, weighting, *descriptors)
    estimates = {record_name(name): pose for name, pose in zip(queries.names, poses, strict=True) if pose is not None}
    print(f"{len(estimates)} of {counted(len(queries), 'query', 'queries')} with a pose ({args.approximation})")
    if args.query_poses:
        truths = _truths(queries, args.query_poses)
        scores = {
            condition: score_poses(estimates, true_poses)
            for condition, true_poses in _truths_of_conditions(truths, args).items()
        }
        print("\n".join(_pose_lines(scores)))
        if args.json:
            write_json(args.json, {condition: vars(score) for condition, score in scores.items()})
    if args.submission:
        write_submission(args.submission, estimates, SUBMISSION_NAMES[args.names])
        print(f"submission in {args.submission}")


def locate(arguments: Sequence[str] | None = None) -> int:
    """Where pictures were taken: all queries of a matching run, or single pictures."""
    parser = Parser(
        "Say where pictures were taken, with a radius of uncertainty: all queries of a matching run (--results), or "
        "single pictures (--picture) against the features of a database.",
        "locate.py",
    )
    queries = parser.add_mutually_exclusive_group(required=True)
    queries.add_argument("--results", type=Path, metavar="DIR", help="folder of a matching run with scores.npz")
    queries.add_argument("--picture", nargs="+", type=Path, metavar="PICTURE", help="pictures to locate")
    parser.add_argument(
        "--ground_truth_path", required=True, metavar="NPZ", help="utmDb, and utmQ to score a run; posDistThr"
    )
    parser.add_argument(
        "--zone", metavar="ZONE", help="UTM zone of the coordinates, such as 17N, where the file has none"
    )
    parser.add_argument("--positions", type=Path, metavar="CSV", help="write the positions here")
    parser.add_config_options("performance.ini", recorded=True)
    parser.add_argument("--index_file_path", metavar="LIST", help="list of database pictures, with --picture")
    parser.add_argument("--index_input_features_dir", type=Path, metavar="DIR", help="their features, with --picture")
    parser.add_argument("--dataset_root_dir", default="", metavar="DIR", help="folder that the names start from")
    parser.add_device_options()
    return command_line.run(parser, _locate, arguments)


def _locate(args: argparse.Namespace) -> None:
    truth_path = require_file(args.ground_truth_path, "dataset_gt_files")
    kept = args.zone or read_zone(truth_path)
    zone = parse_zone(kept, "--zone") if kept else None
    unit = read_ground_truth(truth_path, *ground_truth_lengths(truth_path)).unit
    if zone and unit == UNKNOWN_UNIT:
        unit = "m"
    if zone and unit != "m":
        raise UserError(f"--zone {kept}: {truth_path} is in {unit}, and a zone is for metres (leave it out)")
    located = _located_run(args, truth_path) if args.results else _located_pictures(args, truth_path)
    from patchnetvlad.localization.locating import position_lines, write_positions

    if args.picture or not args.positions:
        print("\n".join(position_lines(located, zone, unit)))
    if args.results:
        print("\n".join(_score_lines(located, truth_path, unit)))
    if args.positions:
        write_positions(args.positions, located, zone, unit)
        print(f"positions in {args.positions}")


def _read_all(paths: Sequence[Path]) -> dict[str, Pose]:
    poses: dict[str, Pose] = {}
    for path in paths:
        file_poses = read_poses(path)
        twice = poses.keys() & file_poses.keys()
        if twice:
            raise UserError(
                f"{path}: {counted(len(twice), 'picture has', 'pictures have')} a pose elsewhere too, such as "
                f"{min(twice)}"
            )
        poses |= file_poses
    return poses


def _poses_of(pictures: ImageList, poses: Mapping[str, Pose], sources: Sequence[Path]) -> list[Pose | None]:
    """The poses of a list's pictures; at least one must have one."""
    listed_poses = [poses.get(record_name(name), poses.get(name)) for name in pictures.names]
    if all(pose is None for pose in listed_poses):
        raise UserError(
            f"{pictures.source}: no picture has a pose in {', '.join(map(str, sources))} (names differ, such as "
            f"{pictures.names[0]} and {next(iter(poses), 'none')}?)"
        )
    return listed_poses


def _truths(queries: ImageList, sources: Sequence[Path]) -> dict[str, Pose]:
    poses = _poses_of(queries, _read_all(sources), sources)
    return {record_name(name): pose for name, pose in zip(queries.names, poses, strict=True) if pose is not None}


def _truths_of_conditions(truths: Mapping[str, Pose], args: argparse.Namespace) -> dict[str, dict[str, Pose]]:
    conditions = by_condition(list(truths), args.condition_pattern)
    return {
        **{condition: {name: truths[name] for name in names} for condition, names in conditions.items()},
        "all": dict(truths),
    }


def _weighting(
    args: argparse.Namespace, queries: ImageList, database: ImageList
) -> tuple[Weighting, tuple[NDArray[np.float32], NDArray[np.float32]] | tuple[()]]:
    if args.approximation in ("best", "equal"):
        return equal_weights, ()
    folders = (args.query_input_features_dir, args.index_input_features_dir)
    if None in folders:
        raise UserError(
            f"--approximation {args.approximation}: needs --query_input_features_dir and --index_input_features_dir"
        )
    from patchnetvlad.store.reading.feature_store import FeatureStore

    vectors = []
    for pictures, folder in zip((queries, database), folders, strict=True):
        with FeatureStore.open(folder, pictures) as store:
            vectors.append(store.global_)
    weighting = barycentric_weights if args.approximation == "barycentric" else similarity_weights(args.alpha)
    return weighting, (vectors[0], vectors[1])


def _pose_lines(scores: Mapping[str, PoseScore]) -> list[str]:
    wide = max(12, *(len(condition) + 2 for condition in scores))
    heads = [f"{metres:g} m, {degrees:g}°" for metres, degrees in THRESHOLDS]
    lines = [f"{'% within':<{wide}}{'queries':>8}" + "".join(f"{head:>13}" for head in heads) + f"{'median':>18}"]
    for condition, score in scores.items():
        values = "".join(f"{value:13.1f}" for value in score.percentages)
        median = f"{score.medians[0]:.2f} m, {score.medians[1]:.2f}°"
        lines.append(f"{condition:<{wide}}{score.num_queries:>8}{values}{median:>18}")
    return lines


def _located_run(args: argparse.Namespace, truth_path: Path) -> list[Located]:
    command_line.folder(args.results, "--results")
    truth = read_ground_truth(truth_path, *ground_truth_lengths(truth_path))
    from patchnetvlad.localization.locating import locate_run

    return locate_run(args.results / "scores.npz", truth_path, truth)


def _located_pictures(args: argparse.Namespace, truth_path: Path) -> list[Located]:
    if args.index_file_path is None or args.index_input_features_dir is None:
        raise UserError("--picture: needs --index_file_path and --index_input_features_dir, the database")
    features = command_line.folder(args.index_input_features_dir, "--index_input_features_dir", "feature_extract.py")
    config = command_line.configuration(args, features)
    config.check_matching()
    config.check_own_candidates("single pictures (give the results of feature_match)")
    config.check_one_process("locating")
    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    database = read_image_list(require_file(args.index_file_path, "dataset_imagenames"), root)
    pictures = [_picture(path, root) for path in args.picture]
    truth = read_ground_truth(truth_path, ground_truth_lengths(truth_path)[0], database.names)
    command_line.require_checkpoint(config)
    from patchnetvlad.localization.locating import locate_pictures

    device = command_line.device(args)
    return locate_pictures(config, pictures, database, features, truth.utm_database, truth.radius, device)


def _picture(path: Path, root: Path) -> Path:
    """A picture as named from the current folder, or else from the folder that names in lists start from."""
    places = [path] if path.is_absolute() else [path, root / path]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"--picture {path}: no such file, searched in {', '.join(str(place.parent) for place in places)}")


def _score_lines(located: Sequence[Located], truth_path: Path, unit: str) -> list[str]:
    lengths = ground_truth_lengths(truth_path)
    of_run = counted(len(located), "query", "queries")
    if lengths[0] != len(located):
        return [f"{truth_path}: utmQ has {counted(lengths[0], 'row')} for {of_run}: positions are not scored"]
    truth = read_ground_truth(truth_path, [estimate.query for estimate in located], lengths[1])
    score = score_positions([estimate.position for estimate in located], truth.utm_query)
    unmatched = sum(not len(rows) for rows in truth.positives())
    shares = ", ".join(
        f"{100 * share:.1f} % within {with_unit(limit, unit)}"
        for limit, share in zip(LIMITS, score.within, strict=True)
    )
    return [
        f"{of_run}: median error {score.median_error:.2f} {unit}, {shares}; "
        f"the radius of uncertainty holds the true place of {100 * score.covered:.1f} %",
        *(
            [
                f"{counted(unmatched, 'query has', 'queries have')} no database picture within "
                f"{with_unit(truth.radius, unit)}, and cannot be located as near as that"
            ]
            if unmatched
            else []
        ),
    ]
