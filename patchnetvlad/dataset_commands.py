"""The commands around datasets: make lists, measure, poses, positions, known results."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from patchnetvlad import command_line
from patchnetvlad.command_line import Parser
from patchnetvlad.dataset_makers import MAKERS, finish
from patchnetvlad.datasets import summary
from patchnetvlad.locations import shipped_folder

logger = logging.getLogger(__name__)


def make_dataset(arguments: Sequence[str] | None = None) -> int:
    """Write lists and ground truth of a dataset as its authors distribute it, or of your own."""
    parser = Parser(
        "Write image lists and ground truth of a dataset as its authors distribute it, or of your own pictures.",
        "make_dataset.py",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, maker in MAKERS.items():
        options = kinds.add_parser(kind, help=maker.help, description=maker.help)
        options.add_argument("root", type=Path, metavar="ROOT", help="folder that the names in the lists start from")
        for option in maker.options:
            options.add_argument(option.flag, **option.settings)
        if "--incomplete" not in [option.flag for option in maker.options]:
            options.add_argument(
                "--incomplete", default="error", choices=("error", "leave_out"), help="pictures that are absent"
            )
        options.add_argument("--only_queries_with_match", action="store_true", help="leave out the other queries")
        options.add_argument("--no_picture_check", action="store_true", help="do not look for the picture files")
        options.add_argument(
            "--lists_dir", type=Path, default=shipped_folder("dataset_imagenames"), metavar="DIR", help="for the lists"
        )
        options.add_argument(
            "--ground_truth_dir",
            type=Path,
            default=shipped_folder("dataset_gt_files"),
            metavar="DIR",
            help="for the ground truth",
        )

    def command(args: argparse.Namespace) -> None:
        maker = MAKERS[args.kind]
        command_line.folder(str(args.root), "ROOT")
        names = [option.flag.lstrip("-") for option in maker.options]
        datasets = maker.make(args.root, **{name: getattr(args, name) for name in names})
        for dataset in tqdm(datasets, "Datasets", disable=not command_line.progress(args) or len(datasets) == 1):
            made, files = finish(
                dataset,
                args.root,
                args.lists_dir,
                args.ground_truth_dir,
                args.incomplete == "leave_out",
                args.only_queries_with_match,
                not args.no_picture_check,
            )
            print("\n".join(summary(made)))
            print(f"  written: {', '.join(str(path) for path in vars(files).values() if path is not None)}")

    return command_line.run(parser, command, arguments)
