"""The two steps of a run: describe the pictures of a list, and rank a database for every query."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.errors import UserError
from patchnetvlad.paths import require_file
from patchnetvlad.result_files import FORMATS

logger = logging.getLogger(__name__)


def feature_extract(arguments: Sequence[str] | None = None) -> int:
    """feature_extract.py: describe the pictures of a list."""
    parser = Parser("Describe the pictures of a list and store global and patch descriptors.", "feature_extract.py")
    parser.add_config_options("performance.ini")
    parser.add_argument("--dataset_file_path", required=True, metavar="LIST", help="text file, one picture a line")
    parser.add_argument(
        "--dataset_root_dir", default="", metavar="DIR", help="folder that the names in the list start from"
    )
    parser.add_argument(
        "--output_features_dir", default="output_features", metavar="DIR", help="folder for the descriptors"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other features in that folder")
    parser.add_device_options()
    return command_line.run(parser, _extract, arguments)


def _extract(args: argparse.Namespace) -> None:
    config = command_line.configuration(args)
    listed = require_file(args.dataset_file_path, "dataset_imagenames")
    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    config.require_checkpoint()
    from patchnetvlad.extraction import extract

    folder = Path(args.output_features_dir)
    with command_line.log_file(folder / "extract.log"):
        done = extract(
            config,
            listed,
            root,
            folder,
            command_line.device(args),
            command_line.progress(args),
            args.overwrite,
        )
    print(f"{done.pictures} pictures described in {done.folder}")


def feature_match(arguments: Sequence[str] | None = None) -> int:
    """feature_match.py: rank database pictures for every query."""
    parser = Parser("Rank the database pictures for every query, from stored descriptors.", "feature_match.py")
    parser.add_config_options("performance.ini", recorded=True)
    parser.add_argument(
        "--dataset_root_dir", default="", metavar="DIR", help="folder that the names in the lists start from"
    )
    parser.add_argument("--query_file_path", required=True, metavar="LIST", help="list of query pictures")
    parser.add_argument("--index_file_path", required=True, metavar="LIST", help="list of database pictures")
    parser.add_argument("--query_input_features_dir", required=True, metavar="DIR", help="descriptors of the queries")
    parser.add_argument("--index_input_features_dir", required=True, metavar="DIR", help="descriptors of the database")
    parser.add_argument(
        "--ground_truth_path", metavar="NPZ", help="utmQ, utmDb and posDistThr; with it recalls are reported"
    )
    parser.add_argument(
        "--posDistThr", type=float, metavar="DISTANCE", help="true match up to this distance, not the file's"
    )
    _add_result_options(parser)
    parser.add_device_options()
    return command_line.run(parser, _match, arguments)


def _add_result_options(parser: Parser) -> None:
    parser.add_argument("--result_save_folder", default="results", metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["kapture"],
        choices=list(FORMATS),
        metavar="FORMAT",
        help=f"prediction files to write: {', '.join(FORMATS)}",
    )
    parser.add_argument(
        "--details", action="store_true", help="print confidence intervals, mAP@N and precision against recall too"
    )
    parser.add_argument(
        "--msls_predictions", metavar="FILE", help="add the final rankings to this file for the MSLS evaluator"
    )
    parser.add_argument(
        "--report", action="store_true", help="write report.html too: curves, a map, every query with its candidates"
    )
    parser.add_argument(
        "--distance_unit", default="m", metavar="UNIT", help="of the ground truth's coordinates, for the report"
    )


def _match(args: argparse.Namespace) -> None:
    truth = None if args.ground_truth_path in (None, "None", "") else args.ground_truth_path
    if truth is None and args.posDistThr is not None:
        raise UserError("--posDistThr: needs --ground_truth_path, whose distance it takes the place of")
    query_features = command_line.folder(args.query_input_features_dir, "--query_input_features_dir")
    index_features = command_line.folder(args.index_input_features_dir, "--index_input_features_dir")
    config = command_line.configuration(args, index_features)
    config.check_matching()
    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    query_list = require_file(args.query_file_path, "dataset_imagenames")
    index_list = require_file(args.index_file_path, "dataset_imagenames")
    truth_path = None if truth is None else require_file(truth, "dataset_gt_files")
    if config.feature_match.local_features == "on_demand":
        config.require_checkpoint()
    if config.feature_match.pred_input_path is not None:
        require_file(config.feature_match.pred_input_path, "dataset_gt_files", config.path)
    from patchnetvlad.evaluation import Sources, add_city, evaluate

    results = Path(args.result_save_folder)
    with command_line.log_file(results / "match.log"):
        evaluation = evaluate(
            config,
            Sources(root, query_list, index_list, query_features, index_features, truth_path, args.posDistThr),
            results,
            command_line.device(args),
            args.formats,
            command_line.progress(args),
            args.distance_unit if args.report else None,
        )
        for line in evaluation.lines(details=True):
            logger.debug(line)
        if args.msls_predictions is not None:
            add_city(evaluation, Path(args.msls_predictions))
    print("\n".join([*evaluation.lines(args.details), f"results in {results}"]))
