"""The bundled learned model, made again in one command: from pictures by the package's own training."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.commands.examples import render_msls
from patchnetvlad.commands.models import fit_model
from patchnetvlad.commands.training import train
from patchnetvlad.config import Config
from patchnetvlad.csv_table import read_table, write_table
from patchnetvlad.errors import UserError
from patchnetvlad.image_lists import write_image_list
from patchnetvlad.ini import load_config
from patchnetvlad.paths import check_new_checkpoint, require_file

CONFIG = "learn_builtin.ini"
# What is fitted to whole pictures: the encoder that learned at half their size, fewer clusters
FITTED = ("global_params.backbone=efficientnet_lite0", "train.num_clusters=16")
METRES_A_FRAME = 8  # so that the frames beside one are within [train] positive_radius, and three are negative_radius
METRES_A_VIDEO = 10_000
JUDGED_BY = ("floor3", "floor15")  # floors that training does not learn from, but is watched on
PLACES = "4"  # times those of the small tree of rendered cities
EPOCHS = "3"


def make_bundled_model(arguments: Sequence[str] | None = None) -> int:
    """Make the bundled learned model again."""
    parser = Parser(
        "Train the bundled model's encoder on frames of videos and on rendered cities, shown at half their size, then "
        "fit clusters and WPCA to its descriptors of whole pictures, as they are and changed.",
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
    config = load_config(require_file(CONFIG, "configs"))
    check_new_checkpoint(Path(args.output_path), config.global_params.num_pcs, args.overwrite)
    from patchnetvlad.training_csv import COLUMNS

    frames, cities, listed = work / "frames.csv", work / "cities", work / "pictures.txt"
    write_table(frames, COLUMNS, frames_table(table))
    quiet = ["-q"] if args.quiet else []
    device = ["--device", args.device, *(["--nocuda"] if args.nocuda else []), *quiet]
    if not cities.exists():
        _run(render_msls, ["--output_dir", f"{cities}", "--places", PLACES, *quiet])
    write_image_list(listed, [f"{path.resolve()}" for path in _database_pictures(config, root, frames, cities)])
    pictures = ["--dataset_root_dir", f"{root}", f"{cities}", "--dataset_csv", f"{frames}", "-"]
    settings = ["--config_path", CONFIG, "--set", f"train.seed={args.seed}"]
    name = f"seed{args.seed}"
    _run(train, [*settings, *pictures, "--save_path", f"{work}", "--identifier", name, "--nEpochs", EPOCHS, *device])
    run = max(work.glob(f"*_{name}"), key=lambda folder: folder.stat().st_mtime)
    learned = run / "checkpoints" / "checkpoint.pth.tar"
    settings += [word for change in (*FITTED, f"train.pretrained={learned}") for word in ("--set", change)]
    pictures = ["--dataset_root_dir", f"{root}", "--dataset_file_path", f"{listed}"]
    _run(fit_model, [*settings, *pictures, "--output_path", args.output_path, "--overwrite", *device])


def _database_pictures(config: Config, root: Path, frames: Path, cities: Path) -> list[Path]:
    """Those that training learns from."""
    from patchnetvlad.training_run import Source, read_training_data

    learned_from = read_training_data(config, [Source(root, frames), Source(cities)])
    return [path for city in learned_from.train for path in city.database.paths]


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
