"""Training, and adding WPCA to a trained checkpoint."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.config import Config
from patchnetvlad.encoders.published import check_starting_weights
from patchnetvlad.errors import UserError, counted
from patchnetvlad.image_lists import list_file_name, read_image_list
from patchnetvlad.paths import RUNS_FOLDER, check_new_checkpoint, find_checkpoint, require_file, with_wpca

logger = logging.getLogger(__name__)

PITTSBURGH_LIST = list_file_name("pitts30k", "index")


def train(arguments: Sequence[str] | None = None) -> int:
    """train.py: train on MSLS or on one's own pictures."""
    parser = Parser(
        "Train on Mapillary Street-Level Sequences, or on your own pictures; several GPUs: start it with torchrun.",
        "train.py",
    )
    parser.add_config_options("train.ini")
    _add_dataset_options(parser)
    parser.add_argument(
        "--save_path",
        metavar="DIR",
        help=f"folder that gets the run's own folder (default: {RUNS_FOLDER}, or where the resumed run is)",
    )
    parser.add_argument(
        "--cache_path", metavar="DIR", help="folder for the cluster file; without it, a temporary one is used"
    )
    parser.add_argument(
        "--cluster_path", metavar="HDF5", help="cluster file to start from; it is made if it is not there"
    )
    parser.add_argument(
        "--resume_path", metavar="FILE", help="checkpoint to go on from; a published one gives its weights alone"
    )
    parser.add_argument("--identifier", default="mapillary_nopanos", metavar="NAME", help="end of the folder's name")
    parser.add_argument("--nEpochs", type=int, default=30, metavar="N", help="epochs to train in all")
    parser.add_argument(
        "--start_epoch",
        type=int,
        metavar="N",
        help="take the weights of --resume_path alone and count N epochs as finished",
    )
    parser.add_argument("--save_every_epoch", action="store_true", help="keep a checkpoint of every epoch")
    _add_threads_option(parser)
    parser.add_argument(
        "--skip_unreadable", action="store_true", help="leave pictures out that are missing or unreadable"
    )
    parser.add_argument(
        "--trust_pictures", action="store_true", help="do not decode every picture before training starts"
    )
    parser.add_device_options()
    return command_line.run(parser, _train, arguments)


def _train(args: argparse.Namespace) -> None:
    if args.nEpochs < 1 or (args.start_epoch or 0) < 0:
        raise UserError("--nEpochs must be 1 or more, --start_epoch 0 or more")
    config = _with_threads(command_line.configuration(args), args.threads)
    config.check_training()
    sources = _sources(args)
    resumed = _checkpoint(args.resume_path) if args.resume_path else None
    if resumed is None:
        check_starting_weights(config)
    from patchnetvlad.distributed import processes
    from patchnetvlad.training_run import RunOptions, Source, train_model

    first, *more = (Source(*source) for source in sources)
    options = RunOptions(
        first.root,
        first.training_csv,
        tuple(more),
        Path(args.save_path) if args.save_path else None,
        args.identifier,
        Path(args.cache_path) if args.cache_path else None,
        Path(args.cluster_path) if args.cluster_path else None,
        resumed,
        args.nEpochs,
        args.start_epoch,
        args.save_every_epoch,
        not args.trust_pictures,
        args.skip_unreadable,
    )
    with processes(command_line.device(args)) as all_processes:
        if not all_processes.is_first:
            command_line.logger.setLevel(logging.ERROR)
        run = train_model(config, options, all_processes, command_line.progress(args) and all_processes.is_first)
    if all_processes.is_first:
        recalls = ", ".join(f"@{n} {100 * value:.1f}" for n, value in run.recalls.items())
        print(f"epoch {run.epoch}: Recall (%) {recalls}; best Recall@5 {100 * run.best_score:.1f}")
        written = run.folder / "checkpoints"
        best = written / "model_best.pth.tar"
        print("\n".join([f"checkpoints in {written}", *_how_to_use(config, best, 0)]))


def add_pca(arguments: Sequence[str] | None = None) -> int:
    """add_pca.py: add WPCA to a trained checkpoint."""
    parser = Parser(
        "Fit WPCA ([global_params] num_pcs) on database pictures and write the checkpoint with it.", "add_pca.py"
    )
    parser.add_config_options("train.ini")
    parser.add_argument("--resume_path", required=True, metavar="FILE", help="checkpoint to add WPCA to")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that has it already")
    _add_dataset_options(parser)
    parser.add_argument(
        "--dataset_choice",
        default="mapillary",
        choices=["mapillary", "pitts"],
        help=f"database pictures of the training cities, or the list {PITTSBURGH_LIST}",
    )
    parser.add_argument("--dataset_file_path", metavar="LIST", help="any list of pictures in place of --dataset_choice")
    _add_threads_option(parser)
    parser.add_device_options()
    return command_line.run(parser, _add_pca, arguments)


def _add_pca(args: argparse.Namespace) -> None:
    config = _with_threads(command_line.configuration(args), args.threads)
    config.check_projecting()
    config.check_one_process("fitting")
    sources = _sources(args)
    resumed, num_pcs = _checkpoint(args.resume_path), config.global_params.num_pcs
    check_new_checkpoint(with_wpca(resumed, num_pcs), num_pcs, args.overwrite)
    name = args.dataset_file_path or (PITTSBURGH_LIST if args.dataset_choice == "pitts" else None)
    if name and args.dataset_csv:
        raise UserError("--dataset_csv: cannot be used together with a list")
    if name and len(sources) > 1:
        raise UserError("--dataset_root_dir: a list belongs to one folder")
    pictures = read_image_list(require_file(name, "dataset_imagenames"), sources[0][0]) if name else None
    from patchnetvlad.model_fitting import add_wpca
    from patchnetvlad.training_run import Source, read_training_data

    if pictures is not None:
        source, paths = pictures.source, list(dict.fromkeys(pictures.paths))
    else:
        described = [Source(*source) for source in sources]
        training_data = read_training_data(config, described)
        source, paths = described[0].listed, [path for city in training_data.train for path in city.database.paths]
    written = add_wpca(config, resumed, paths, source, command_line.device(args), command_line.progress(args))
    print("\n".join([f"checkpoint in {written}", *_how_to_use(config, written, num_pcs)]))


def make_training_csv(arguments: Sequence[str] | None = None) -> int:
    """Turn lists and ground truth into a table to train on."""
    parser = Parser(
        "Write the lists and ground truth of a dataset, published ones or those of make_dataset.py, as a table for "
        "--dataset_csv of train.py and add_pca.py.",
        "make_training_csv.py",
    )
    parser.add_argument("--query_file_path", required=True, metavar="LIST", help="list of query pictures")
    parser.add_argument("--index_file_path", required=True, metavar="LIST", help="list of database pictures")
    parser.add_argument("--ground_truth_path", required=True, metavar="NPZ", help="where they were taken, in metres")
    parser.add_argument(
        "--part", required=True, choices=["train", "val"], help="to learn from, or to be judged by while learning"
    )
    parser.add_argument("--city", metavar="NAME", help="without it, the name of the ground truth")
    parser.add_argument("--out_file", required=True, metavar="CSV", help="table to write")
    return command_line.run(parser, _make_csv, arguments)


def _make_csv(args: argparse.Namespace) -> None:
    # The table has the lists' names as they are: where their pictures are does not matter here
    queries, database = (
        read_image_list(require_file(name, "dataset_imagenames"), Path())
        for name in (args.query_file_path, args.index_file_path)
    )
    path = require_file(args.ground_truth_path, "dataset_gt_files")
    from patchnetvlad.ground_truth import read_ground_truth
    from patchnetvlad.training_csv import write_training_csv

    truth = read_ground_truth(path, queries.names, database.names)
    write_training_csv(Path(args.out_file), args.part, args.city or path.stem, queries, database, truth)
    counts = counted(len(queries), "query", "queries"), counted(len(database), "database picture")
    print(f"{' and '.join(counts)} in {args.out_file}")


def _checkpoint(name: str) -> Path:
    """The checkpoint of --resume_path, with or without its .pth.tar."""
    return find_checkpoint(name, 0) or require_file(name, "pretrained_models")


def _how_to_use(config: Config, checkpoint: Path, num_pcs: int) -> list[str]:
    """With a published configuration, changed where the trained model differs from the published ones."""
    params, train = config.global_params, config.train
    changes = [f"global_params.{key}={getattr(params, key)}" for key in ("backbone", "vladv2")]
    if params.pooling in ("max", "avg"):
        changes.append(f"global_params.pooling={params.pooling}")
    sides = {"imageresizew": train.imageresizew, "imageresizeh": train.imageresizeh}
    changes += [f"feature_{step}.{key}={value}" for step in ("extract", "match") for key, value in sides.items()]
    from patchnetvlad.encoders.table import encoder_geometry

    # The largest patches of performance.ini span 8 positions, those of speed.ini 5
    positions = min(encoder_geometry(params.backbone).map_size(train.imageresizeh, train.imageresizew))
    base = "performance.ini" if positions >= 8 else "speed.ini"
    if positions < 5:
        changes.append(f"global_params.patch_sizes={max(1, min(2, positions))}")
    return command_line.how_to_use(checkpoint, num_pcs, base, changes)


def _add_dataset_options(parser: Parser) -> None:
    parser.add_argument(
        "--dataset_root_dir",
        required=True,
        nargs="+",
        metavar="DIR",
        help="root of the MSLS tree, or of the pictures listed; several, each with its --dataset_csv, are one dataset",
    )
    parser.add_argument(
        "--dataset_csv",
        nargs="+",
        metavar="CSV",
        help="your own pictures in place of MSLS: columns image, easting, northing (or latitude, longitude, which "
        "count where there are both), role; one for each root in their order, with - for an MSLS tree",
    )


def _sources(args: argparse.Namespace) -> list[tuple[Path, Path | None]]:
    """Each folder of pictures with its table, None for an MSLS tree."""
    roots = [command_line.folder(folder, "--dataset_root_dir") for folder in args.dataset_root_dir]
    tables = args.dataset_csv or ["-"]
    if len(roots) != len(tables):
        raise UserError(
            f"--dataset_csv: expected one for each folder of --dataset_root_dir ({len(roots)}), found "
            f"{len(tables) if args.dataset_csv else 'none'} (- stands for an MSLS tree)"
        )
    pairs = zip(roots, tables, strict=True)
    return [(root, None if table == "-" else command_line.file(table, "--dataset_csv")) for root, table in pairs]


def _add_threads_option(parser: Parser) -> None:
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads that load and check pictures, 0 for as many as there are cores (default: [global_params] threads "
        "of the INI, 6 in train.ini)",
    )


def _with_threads(config: Config, threads: int | None) -> Config:
    if threads is None:
        return config
    if threads < 0:
        raise UserError(f"--threads {threads}: must be 0 or more")
    return replace(config, global_params=replace(config.global_params, threads=threads))
