"""The commands users know by name: each parses, reads the configuration, makes one call and says where results are."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.errors import UserError
from patchnetvlad.evaluation import FORMATS, Sources, add_city, evaluate, open_run, write_results
from patchnetvlad.extraction import extract
from patchnetvlad.figures import match_figure, save_figure
from patchnetvlad.pair_comparison import compare_files, comparison_record
from patchnetvlad.paths import download_folder, require_file, shipped_folder
from patchnetvlad.realtime import ComparedFrame, best_frame, follow, frames, window
from patchnetvlad.recognizer import PlaceRecognizer
from patchnetvlad.report.page import write_report
from patchnetvlad.report.run_content import run_content
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
    parser.add_argument(
        "--report", action="store_true", help="write report.html too: curves, a map, every query with its candidates"
    )
    parser.add_argument(
        "--distance_unit", default="m", metavar="UNIT", help="of the ground truth's coordinates, for the report"
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
            sources = Sources(
                Path(args.dataset_root_dir),
                require_file(args.query_file_path, "dataset_imagenames"),
                require_file(args.index_file_path, "dataset_imagenames"),
                Path(args.query_input_features_dir),
                Path(args.index_input_features_dir),
                require_file(truth, "dataset_gt_files") if truth is not None else None,
                args.posDistThr,
            )
            progress = command_line.progress(args)
            with open_run(command_line.configuration(args), sources, command_line.device(args), progress) as run:
                evaluation = evaluate(run, progress)
                write_results(evaluation, results, args.formats)
                if args.report:
                    page = results / "report.html"
                    size = write_report(page, run_content(run, evaluation, args.distance_unit), progress)
                    logger.info("report: %s (%.1f MB)", page, size / 1e6)
            for line in evaluation.lines(details=True):
                logger.debug(line)
            if args.msls_predictions is not None:
                add_city(evaluation, Path(args.msls_predictions))
        print("\n".join([*evaluation.lines(args.details), f"results in {results}"]))

    return command_line.run(parser, command, arguments)


def match_two(arguments: Sequence[str] | None = None) -> int:
    """match_two.py: compare two pictures, or a video's frames with one."""
    parser = Parser(
        "Compare two pictures and draw their matches. Exit status: 0, or with --threshold 1 for a lower score; 2 for "
        "an error.",
        "match_two.py",
    )
    parser.add_config_options("performance.ini")
    parser.add_argument("--first_im_path", metavar="PICTURE", help="the query; an example without both pictures")
    parser.add_argument("--second_im_path", metavar="PICTURE", help="the reference")
    parser.add_argument(
        "--video",
        metavar="SOURCE",
        help="compare the frames of a video file, or of the camera of that number, with --second_im_path or else the "
        "first frame; the figure shows the best one",
    )
    parser.add_argument("--plot_save_path", default="results", metavar="DIR", help="folder for patchMatchings.png")
    parser.add_argument(
        "--formats", nargs="+", default=["png"], choices=["png", "pdf", "svg"], metavar="FORMAT", help="png, pdf, svg"
    )
    parser.add_argument("--width", type=_inches, default=10.0, help="of the figure in inches; 3.4 for a paper's column")
    parser.add_argument("--outlines", action="store_true", help="draw the inliers' patches as squares")
    parser.add_argument("--json", action="store_true", help="print scores, matches, inliers and homographies as JSON")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="lowest score of one place")
    parser.add_device_options()

    def command(args: argparse.Namespace) -> int:
        if args.video is None:
            first, second = _picture_paths(args.first_im_path, args.second_im_path)
        elif args.first_im_path is not None:
            raise UserError("--first_im_path: the frames of --video take its place (name the reference by the second)")
        recognizer = PlaceRecognizer.load(command_line.configuration(args), command_line.device(args))
        if args.video is None:
            matched, comparison = compare_files(recognizer, first, second)
            if args.json:
                print(json.dumps(comparison_record(recognizer, matched, comparison)))
            else:
                print(
                    f"Similarity score between the two images is: {comparison.score:.5f}. "
                    "Larger scores indicate better matches."
                )
        else:
            reference = require_file(args.second_im_path, "example_images") if args.second_im_path else None
            matched, comparison = best_frame(
                recognizer, args.video, reference, lambda frame: print(_frame_line(recognizer, frame, args.json))
            )
        for ending in args.formats:
            path = Path(args.plot_save_path) / f"patchMatchings.{ending}"
            save_figure(match_figure(matched, comparison.score, args.width, args.outlines), path)
            print(f"figure in {path}", file=sys.stderr if args.json else sys.stdout)
        return int(args.threshold is not None and comparison.score < args.threshold)

    return command_line.run(parser, command, arguments)


def _picture_paths(first: str | None, second: str | None) -> tuple[Path, Path]:
    if (first is None) != (second is None):
        raise UserError("--first_im_path and --second_im_path: name both pictures, or none for an example")
    if first is None or second is None:
        examples = shipped_folder("example_images")
        return examples / "queries" / "query00_0.jpg", examples / "database" / "place00_0.jpg"
    return require_file(first, "example_images"), require_file(second, "example_images")


def _frame_line(recognizer: PlaceRecognizer, frame: ComparedFrame, as_json: bool) -> str:
    if not as_json:
        return f"frame {frame.number}: {frame.comparison.score:.5f}"
    record = comparison_record(recognizer, frame.matched, frame.comparison)
    return json.dumps({"frame": frame.number, **record})


def _inches(text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 1 <= width <= 60:
        raise argparse.ArgumentTypeError(f"{text}: expected a width of 1 to 60 inches")
    return width


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
