"""The bundled learned model, made again in one command: from pictures by the package's own training."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.commands.examples import render_msls
from patchnetvlad.commands.models import combine_models
from patchnetvlad.commands.training import add_pca, train
from patchnetvlad.csv_table import read_table, write_table
from patchnetvlad.errors import UserError
from patchnetvlad.files import make_folder
from patchnetvlad.paths import check_new_checkpoint, find_checkpoint, require_file

CONFIG = "learn_builtin.ini"
PATCHES = "rootsift_WPCA512.pth.tar"
METRES_A_FRAME = 8  # so that the frames beside one are within [train] positive_radius, and three are negative_radius
METRES_A_VIDEO = 10_000
JUDGED_BY = ("floor3", "floor15")  # floors that training does not learn from, but is watched on
PLACES = "4"  # times those of the small tree of rendered cities
EPOCHS = "3"
DIMENSIONS = 352  # of both kinds of descriptors: as many as fit into a file of 10 MB


def make_bundled_model(arguments: Sequence[str] | None = None) -> int:
    """Make the bundled learned model again."""
    parser = Parser(
        "Train the bundled model's encoder and NetVLAD on frames of videos and on rendered cities, whiten its "
        f"descriptors against changes of view and light, and join them with the patches of {PATCHES}.",
        "make_bundled_model.py",
    )
    parser.add_argument(
        "--dataset_root_dir",
        required=True,
        metavar="DIR",
        help="pictures of the IE Tower's training floors: images.csv with image_path, video_id, frame, label",
    )
    parser.add_argument("--work_dir", required=True, metavar="DIR", help="folder for the cities, tables and runs")
    parser.add_argument("--output_path", required=True, metavar="FILE", help="checkpoint to write (.pth.tar)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of training and fitting")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint of that name")
    parser.add_device_options()
    return command_line.run(parser, _make, arguments)


def _make(args: argparse.Namespace) -> None:
    root, work = command_line.folder(args.dataset_root_dir, "--dataset_root_dir"), Path(args.work_dir)
    table = root / "images.csv"
    if not table.exists():
        raise UserError(f"{table}: no such file (expected the frames' videos, numbers and floors)")
    if args.seed < 0:
        raise UserError(f"--seed: {args.seed}: expected a whole number of 0 or more")
    from patchnetvlad.training_csv import COLUMNS

    patches = find_checkpoint(PATCHES, 0) or require_file(PATCHES, "pretrained_models")
    check_new_checkpoint(Path(args.output_path), DIMENSIONS, args.overwrite)
    make_folder(work)
    frames, cities = work / "frames.csv", work / "cities"
    write_table(frames, COLUMNS, frames_table(table))
    quiet = ["-q"] if args.quiet else []
    device = ["--device", args.device, *(["--nocuda"] if args.nocuda else []), *quiet]
    if not cities.exists():
        _run(render_msls, ["--output_dir", f"{cities}", "--places", PLACES, *quiet])
    pictures = ["--dataset_root_dir", f"{root}", f"{cities}", "--dataset_csv", f"{frames}", "-"]
    settings = ["--config_path", CONFIG, "--set", f"train.seed={args.seed}"]
    name = f"seed{args.seed}"
    _run(train, [*settings, *pictures, "--save_path", f"{work}", "--identifier", name, "--nEpochs", EPOCHS, *device])
    run = max(work.glob(f"*_{name}"), key=lambda folder: folder.stat().st_mtime)
    last = run / "checkpoints" / "checkpoint.pth.tar"
    _run(add_pca, [*settings, *pictures, "--resume_path", f"{last}", "--overwrite", *device])
    both = ["--global_path", f"{last.parent / 'checkpoint_WPCA512.pth.tar'}", "--patches_path", f"{patches}"]
    _run(
        combine_models,
        [*both, "--num_pcs", f"{DIMENSIONS}", "--output_path", args.output_path, "--overwrite", *quiet],
    )


def frames_table(table: Path) -> list[tuple[object, ...]]:
    """Frames of videos as rows to train with, from a table with image_path, video_id, frame and label (the floor).

    Frames of one video lie METRES_A_FRAME metres apart, videos far from each other; every other frame is a query.
    Raises UserError naming what the table lacks.
    """
    frames = read_table(table)
    rows: list[tuple[object, ...]] = []
    columns = (frames.text("image_path"), frames.whole_numbers("video_id"), frames.whole_numbers("frame"))
    for path, video, frame, floor in zip(*columns, frames.text("label"), strict=True):
        judged = floor in JUDGED_BY
        role = ("val_" if judged else "train_") + ("query" if frame % 2 else "database")
        rows.append((path, METRES_A_FRAME * frame, METRES_A_VIDEO * video, role, floor if judged else "floors"))
    return rows


def _run(command: Callable[[Sequence[str]], int], arguments: list[str]) -> None:
    """One of the steps; ends when it fails, which it has said."""
    status = command(arguments)
    if status:
        raise SystemExit(status)
