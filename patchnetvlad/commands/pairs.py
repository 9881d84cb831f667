"""Two pictures compared, or the frames of a video or camera with one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.errors import UserError, counted
from patchnetvlad.paths import require_file, shipped_folder

if TYPE_CHECKING:
    from patchnetvlad.realtime import ComparedFrame
    from patchnetvlad.recognizer import Comparison, PlaceRecognizer


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
    parser.add_argument(
        "--plot_save_path",
        metavar="DIR",
        help="folder for patchMatchings.png (default: results; with --json none is drawn unless this is given)",
    )
    parser.add_argument(
        "--formats", nargs="+", choices=["png", "pdf", "svg"], metavar="FORMAT", help="png (the default), pdf, svg"
    )
    parser.add_argument(
        "--width", type=_inches, help="of the figure in inches (default: 10.0); 3.4 for a paper's column"
    )
    parser.add_argument("--outlines", action="store_true", help="draw the inliers' patches as squares")
    parser.add_argument("--json", action="store_true", help="print scores, matches, inliers and homographies as JSON")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="lowest score of one place")
    parser.add_device_options()
    return command_line.run(parser, _match_two, arguments)


def _match_two(args: argparse.Namespace) -> int:
    query, reference = _picture_paths(args)
    figures = _figure_paths(args)
    recognizer = _recognizer(args)
    if query is not None and reference is not None:
        comparison = _compare(recognizer, query, reference, args.json)
    else:
        comparison = _best_frame(recognizer, args.video, reference, args.json)
    from patchnetvlad.figures import save_figure

    for path in figures:
        save_figure(comparison.figure(args.width or 10.0, args.outlines), path)
        print(f"figure in {path}", file=sys.stderr if args.json else sys.stdout)
    return int(args.threshold is not None and comparison.score < args.threshold)


def _figure_paths(args: argparse.Namespace) -> list[Path]:
    """The figures to write; with --json none, unless a folder is named for them."""
    if args.json and args.plot_save_path is None:
        for option, given in (("--formats", args.formats), ("--width", args.width), ("--outlines", args.outlines)):
            if given:
                raise UserError(f"{option}: with --json a figure is drawn only where --plot_save_path is given too")
        return []
    folder = Path("results" if args.plot_save_path is None else args.plot_save_path)
    return [folder / f"patchMatchings.{ending}" for ending in args.formats or ["png"]]


def match_realtime(arguments: Sequence[str] | None = None) -> int:
    """match_realtime.py: compare a camera's frames with a reference frame."""
    parser = Parser(
        "Compare a camera's frames with a reference frame; key n makes the present frame the reference, q ends.",
        "match_realtime.py",
    )
    parser.add_config_options("speed.ini")
    parser.add_argument("--video", default="0", metavar="SOURCE", help="number of a camera, or a video file")
    parser.add_device_options()
    return command_line.run(parser, _match_realtime, arguments)


def _match_realtime(args: argparse.Namespace) -> None:
    _require_video(args.video)
    recognizer = _recognizer(args)
    from patchnetvlad import realtime

    count = realtime.follow(recognizer, realtime.frames(args.video), realtime.window())
    print(f"{counted(count, 'frame')} compared")


def _picture_paths(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The query, None where frames of a video take its place, and the reference, None for a video's first frame."""
    first, second = args.first_im_path, args.second_im_path
    if args.video is not None:
        if first is not None:
            raise UserError("--first_im_path: the frames of --video take its place (name the reference by the second)")
        _require_video(args.video)
        return None, require_file(second, "example_images") if second else None
    if (first is None) != (second is None):
        raise UserError("--first_im_path and --second_im_path: name both pictures, or none for an example")
    if first is None:
        examples = shipped_folder("example_images")
        return examples / "queries" / "query00_0.jpg", examples / "database" / "place00_0.jpg"
    return require_file(first, "example_images"), require_file(second, "example_images")


def _require_video(source: str) -> None:
    if not source.isdecimal() and "://" not in source and not Path(source).exists():
        raise UserError(f"--video {source}: no such file (a camera is named by its number)")


def _recognizer(args: argparse.Namespace) -> PlaceRecognizer:
    config = command_line.configuration(args)
    config.check_matching()
    config.check_one_process("a comparison")
    command_line.require_checkpoint(config)
    from patchnetvlad.recognizer import PlaceRecognizer

    return PlaceRecognizer.load(config, command_line.device(args))


def _compare(recognizer: PlaceRecognizer, query: Path, reference: Path, as_json: bool) -> Comparison:
    comparison = recognizer.compare(*recognizer.describe([query, reference]))
    if as_json:
        print(json.dumps(comparison.record()))
    else:
        print(
            f"Similarity score between the two images is: {comparison.score:.5f}. "
            "Larger scores indicate better matches."
        )
    return comparison


def _best_frame(recognizer: PlaceRecognizer, video: str, reference: Path | None, as_json: bool) -> Comparison:
    from patchnetvlad.realtime import best_frame

    def report(frame: ComparedFrame) -> None:
        if as_json:
            print(json.dumps({"frame": frame.number, **frame.comparison.record()}))
        else:
            print(f"frame {frame.number}: {frame.comparison.score:.5f}")

    return best_frame(recognizer, video, reference, report)


def _inches(text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 1 <= width <= 60:
        raise argparse.ArgumentTypeError(f"{text}: expected a width of 1 to 60 inches")
    return width
