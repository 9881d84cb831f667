"""The commands users know by name: each parses, reads the configuration, makes one call and says where results are."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad import command_line
from patchnetvlad.command_line import Parser
from patchnetvlad.errors import UserError
from patchnetvlad.evaluation import FORMATS, Sources, add_city, evaluate
from patchnetvlad.extraction import extract
from patchnetvlad.figures import match_figure, save_figure
from patchnetvlad.locations import download_folder, require_file, shipped_folder
from patchnetvlad.pair_comparison import compare_files
from patchnetvlad.realtime import follow, frames, window
from patchnetvlad.recognizer import PlaceRecognizer
from patchnetvlad.weights import PUBLISHED, download

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

    def command(args: argparse.Namespace) -> None:
        folder = Path(args.output_features_dir)
        with command_line.log_file(folder / "extract.log"):
            done = extract(
                command_line.configuration(args),
                require_file(args.dataset_file_path, "dataset_imagenames"),
                command_line.folder(args.dataset_root_dir, "--dataset_root_dir"),
                folder,
                command_line.device(args),
                command_line.progress(args),
                args.overwrite,
            )
        print(f"{done.pictures} pictures described in {done.folder}")

    return command_line.run(parser, command, arguments)


def feature_match(arguments: Sequence[str] | None = None) -> int:
    """feature_match.py: rank database pictures for every query."""
    parser = Parser("Rank the database pictures for every query, from stored descriptors.", "feature_match.py")
    parser.add_config_options("performance.ini")
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
    parser.add_device_options()

    def command(args: argparse.Namespace) -> None:
        results = Path(args.result_save_folder)
        truth = args.ground_truth_path
        if truth in (None, "None", ""):
            if args.posDistThr is not None:
                raise UserError("--posDistThr: needs --ground_truth_path, whose distance it takes the place of")
            truth = None
        with command_line.log_file(results / "match.log"):
            evaluation = evaluate(
                command_line.configuration(args),
                Sources(
                    Path(args.dataset_root_dir),
                    require_file(args.query_file_path, "dataset_imagenames"),
                    require_file(args.index_file_path, "dataset_imagenames"),
                    Path(args.query_input_features_dir),
                    Path(args.index_input_features_dir),
                    require_file(truth, "dataset_gt_files") if truth is not None else None,
                    args.posDistThr,
                ),
                results,
                command_line.device(args),
                args.formats,
                command_line.progress(args),
            )
            for line in evaluation.lines(details=True):
                logger.debug(line)
            if args.msls_predictions is not None:
                add_city(evaluation, Path(args.msls_predictions))
        print("\n".join([*evaluation.lines(args.details), f"results in {results}"]))

    return command_line.run(parser, command, arguments)


def match_two(arguments: Sequence[str] | None = None) -> int:
    """match_two.py: compare two pictures."""
    parser = Parser("Compare two pictures and draw their matches.", "match_two.py")
    parser.add_config_options("performance.ini")
    examples = shipped_folder("example_images")
    parser.add_argument(
        "--first_im_path", default=str(examples / "queries" / "query03_0.jpg"), metavar="PICTURE", help="the query"
    )
    parser.add_argument(
        "--second_im_path",
        default=str(examples / "database" / "place03_0.jpg"),
        metavar="PICTURE",
        help="the reference",
    )
    parser.add_argument("--plot_save_path", default="results", metavar="DIR", help="folder for patchMatchings.png")
    parser.add_argument("--outlines", action="store_true", help="draw the inliers' patches as squares")
    parser.add_device_options()

    def command(args: argparse.Namespace) -> None:
        recognizer = PlaceRecognizer.load(command_line.configuration(args), command_line.device(args))
        first = require_file(args.first_im_path, "example_images")
        second = require_file(args.second_im_path, "example_images")
        matched, comparison = compare_files(recognizer, first, second)
        print(
            f"Similarity score between the two images is: {comparison.score:.5f}. "
            "Larger scores indicate better matches."
        )
        path = Path(args.plot_save_path) / "patchMatchings.png"
        save_figure(match_figure(matched, comparison.score, outlines=args.outlines), path)
        print(f"figure in {path}")

    return command_line.run(parser, command, arguments)


def match_realtime(arguments: Sequence[str] | None = None) -> int:
    """match_realtime.py: compare a camera's frames with a reference frame."""
    parser = Parser(
        "Compare a camera's frames with a reference frame; key n makes the present frame the reference, q ends.",
        "match_realtime.py",
    )
    parser.add_config_options("speed.ini")
    parser.add_argument("--video", default="0", metavar="SOURCE", help="number of a camera, or a video file")
    parser.add_device_options()

    def command(args: argparse.Namespace) -> None:
        recognizer = PlaceRecognizer.load(command_line.configuration(args), command_line.device(args))
        count = follow(recognizer, frames(args.video), window())
        print(f"{count} frames compared")

    return command_line.run(parser, command, arguments)


def download_models(arguments: Sequence[str] | None = None) -> int:
    """download_models.py: fetch the published weights."""
    parser = Parser("Fetch the published checkpoints from the Hugging Face hub.", "download_models.py")
    parser.add_argument("--ask_for_permission", action="store_true", help="ask before each file")
    parser.add_argument(
        "--models", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED), metavar="NAME", help="which ones"
    )

    def command(args: argparse.Namespace) -> None:
        folder = download_folder()
        for name in args.models:
            if (folder / name).exists():
                print(f"{folder / name}: at hand")
            elif not args.ask_for_permission or _agreed(name):
                print(f"{download(name, folder)}: fetched")

    return command_line.run(parser, command, arguments)


def _agreed(name: str) -> bool:
    try:
        return input(f"Fetch {name}? [Y/n] ").strip().lower() in ("", "y", "yes")
    except EOFError as error:
        raise UserError("--ask_for_permission: there is nobody to ask (leave the option out)") from error
