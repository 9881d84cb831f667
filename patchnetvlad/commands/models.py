"""Where models come from without training: the published ones are fetched, one's own are fitted on any pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.downloads import fetch_published
from patchnetvlad.encoders.published import check_starting_weights
from patchnetvlad.errors import UserError, counted
from patchnetvlad.image_lists import list_folder, read_image_list
from patchnetvlad.paths import (
    PUBLISHED_CHECKPOINTS,
    check_new_checkpoint,
    download_folder,
    find_checkpoint,
    require_file,
)


def download_models(arguments: Sequence[str] | None = None) -> int:
    """download_models.py: fetch the published weights."""
    parser = Parser("Fetch the published checkpoints from the Hugging Face hub.", "download_models.py")
    parser.add_argument("--ask_for_permission", action="store_true", help="ask before each file")
    names = list(PUBLISHED_CHECKPOINTS)
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="NAME", help="which ones")
    return command_line.run(parser, _download, arguments)


def _download(args: argparse.Namespace) -> None:
    folder = download_folder()
    for name in args.models:
        if (folder / name).exists():
            print(f"{folder / name}: at hand")
        elif not args.ask_for_permission or command_line.agreed(f"Fetch {name}?"):
            print(f"{fetch_published(name, folder)}: fetched")


def fit_model(arguments: Sequence[str] | None = None) -> int:
    """Fit a model on any pictures, without training."""
    parser = Parser(
        "Fit NetVLAD's clusters and WPCA on your own pictures, without training; the configuration says the encoder, "
        "[train] num_clusters, whitening and seed, and num_pcs.",
        "fit_model.py",
    )
    parser.add_config_options("rootsift.ini")
    parser.add_argument(
        "--dataset_root_dir", required=True, nargs="+", metavar="DIR", help="one or several folders with pictures"
    )
    parser.add_argument(
        "--dataset_file_path", metavar="LIST", help="list of pictures of one folder; without it, all below the folders"
    )
    parser.add_argument("--output_path", required=True, metavar="FILE", help="checkpoint to write (.pth.tar)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint of that name")
    parser.add_device_options()
    return command_line.run(parser, _fit, arguments)


def _fit(args: argparse.Namespace) -> None:
    config = command_line.configuration(args)
    path = Path(args.output_path)
    check_new_checkpoint(path, config.global_params.num_pcs, args.overwrite)
    config.check_fitting()
    config.check_one_process("fitting")
    check_starting_weights(config)
    pictures = _pictures(args)
    from patchnetvlad.checkpoints import write_checkpoint
    from patchnetvlad.images import require_readable
    from patchnetvlad.model_fitting import fit_model as fit

    for source, paths in pictures.items():
        require_readable(paths, source, config.global_params.loading_threads, command_line.progress(args))
    together = [path for paths in pictures.values() for path in paths]
    model, wpca = fit(config, together, command_line.device(args), command_line.progress(args))
    write_checkpoint(
        path,
        model,
        half_precision=["WPCA", "encoder"],
        fitted_on=counted(len(together), "picture"),
        explained_variance=wpca.explained_variance if wpca else 1.0,
    )
    usage = command_line.how_to_use(path, config.global_params.num_pcs, args.config_path, args.overrides)
    print("\n".join([f"model in {path}", *usage]))


def _pictures(args: argparse.Namespace) -> dict[Path, list[Path]]:
    """The pictures of a list, or those below each folder, by the list or the folder."""
    roots = [command_line.folder(folder, "--dataset_root_dir") for folder in args.dataset_root_dir]
    if not args.dataset_file_path:
        return {root: [root / name for name in list_folder(root, recursive=True)] for root in roots}
    if len(roots) > 1:
        raise UserError("--dataset_file_path: a list belongs to one folder, and --dataset_root_dir names more")
    listed = read_image_list(require_file(args.dataset_file_path, "dataset_imagenames"), roots[0])
    return {listed.source: list(listed.paths)}


def combine_models(arguments: Sequence[str] | None = None) -> int:
    """Join the global descriptors of one model and the patches of another."""
    parser = Parser(
        "Write a checkpoint with the global descriptors of one model and the patches of another: backbone and "
        "patch_backbone of a configuration.",
        "combine_models.py",
    )
    parser.add_argument("--global_path", required=True, metavar="FILE", help="checkpoint for retrieval")
    parser.add_argument(
        "--num_pcs", type=int, metavar="D", help="dimensions of both; without it, as many as the one with fewer has"
    )
    parser.add_argument("--patches_path", required=True, metavar="FILE", help="checkpoint for patches")
    parser.add_argument("--output_path", required=True, metavar="FILE", help="checkpoint to write (.pth.tar)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint of that name")
    return command_line.run(parser, _combine, arguments)


def _combine(args: argparse.Namespace) -> None:
    if args.num_pcs is not None and args.num_pcs < 1:
        raise UserError("--num_pcs must be 1 or more")
    paths = [
        find_checkpoint(name, 0) or require_file(name, "pretrained_models")
        for name in (args.global_path, args.patches_path)
    ]
    path = Path(args.output_path)
    check_new_checkpoint(path, args.num_pcs, args.overwrite)
    from patchnetvlad.checkpoints import join_models, read_checkpoint, write_checkpoint

    first, second = map(read_checkpoint, paths)
    model = join_models(first, second, args.num_pcs)
    check_new_checkpoint(path, model.output_dims, overwrite=True)  # what its name says
    write_checkpoint(path, model, half_precision=["WPCA", "encoder"])
    backbones = [f"global_params.backbone={first.backbone}", f"global_params.patch_backbone={second.backbone}"]
    usage = command_line.how_to_use(path, model.output_dims, "builtin.ini", backbones)
    print("\n".join([f"model of {model.output_dims} dimensions in {path}", *usage]))
