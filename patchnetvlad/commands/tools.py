"""The commands of tools/: each parses, makes one call and says where the result is."""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from patchnetvlad.checkpoints import join_models, read_checkpoint, write_checkpoint
from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.commands.features import feature_extract, feature_match, match_two
from patchnetvlad.errors import UserError
from patchnetvlad.examples.rendered_city import make_city, write_city
from patchnetvlad.image_lists import list_folder, read_image_list, write_image_list
from patchnetvlad.images import require_readable
from patchnetvlad.model_fitting import fit_model as fit
from patchnetvlad.paths import require_file, shipped_folder
from patchnetvlad.result_files import read_pairs, write_msls_predictions

logger = logging.getLogger(__name__)


def fit_model(arguments: Sequence[str] | None = None) -> int:
    """Fit a model on any pictures, without training."""
    parser = Parser(
        "Fit NetVLAD's clusters and WPCA on your own pictures, without training; the configuration says the encoder, "
        "[train] num_clusters, whitening and seed, and num_pcs.",
        "fit_model.py",
    )
    parser.add_config_options("builtin.ini")
    parser.add_argument(
        "--dataset_root_dir", required=True, nargs="+", metavar="DIR", help="one or several folders with pictures"
    )
    parser.add_argument(
        "--dataset_file_path", metavar="LIST", help="list of pictures of one folder; without it, all below the folders"
    )
    parser.add_argument("--output_path", required=True, metavar="FILE", help="checkpoint to write (.pth.tar)")
    parser.add_device_options()

    def command(args: argparse.Namespace) -> None:
        config = command_line.configuration(args)
        roots = [command_line.folder(folder, "--dataset_root_dir") for folder in args.dataset_root_dir]
        if args.dataset_file_path:
            if len(roots) > 1:
                raise UserError("--dataset_file_path: a list belongs to one folder, and --dataset_root_dir names more")
            listed = read_image_list(require_file(args.dataset_file_path, "dataset_imagenames"), roots[0])
            found = {listed.source: list(listed.paths)}
        else:
            found = {root: [root / name for name in list_folder(root, recursive=True)] for root in roots}
        for source, pictures in found.items():
            require_readable(pictures, source, config.global_params.loading_threads, command_line.progress(args))
        paths = [path for pictures in found.values() for path in pictures]
        device = command_line.device(args)
        model, wpca = fit(config, paths, device, command_line.progress(args))
        path = Path(args.output_path)
        write_checkpoint(
            path,
            model,
            half_precision_wpca=True,
            fitted_on=f"{len(paths)} pictures",
            explained_variance=wpca.explained_variance if wpca else 1.0,
        )
        print(f"model in {path}")

    return command_line.run(parser, command, arguments)


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

    def command(args: argparse.Namespace) -> None:
        first, second = (
            read_checkpoint(require_file(path, "pretrained_models")) for path in (args.global_path, args.patches_path)
        )
        if args.num_pcs is not None and args.num_pcs < 1:
            raise UserError("--num_pcs must be 1 or more")
        model = join_models(first, second, args.num_pcs)
        write_checkpoint(Path(args.output_path), model, half_precision_wpca=True)
        print(f"model of {model.output_dims} dimensions in {args.output_path}")

    return command_line.run(parser, command, arguments)


def demo(arguments: Sequence[str] | None = None) -> int:
    """Run the main job on the example places with the bundled model."""
    parser = Parser("Extract, match and compare on the example places with the bundled model.", "demo.py")
    parser.add_argument("--output_dir", default="demo", metavar="DIR", help="folder for features, results and figure")
    parser.add_device_options()

    def command(args: argparse.Namespace) -> int:
        output, examples = Path(args.output_dir), shipped_folder("example_images")
        shared = ["--config_path", "builtin.ini", "--device", "cpu" if args.nocuda else args.device]
        lists = {part: f"example_imageNames_{part}.txt" for part in ("query", "index")}
        steps: list[tuple[Callable[[Sequence[str]], int], list[str]]] = [
            (
                feature_extract,
                ["--dataset_file_path", listed, "--dataset_root_dir", str(examples)]
                + ["--output_features_dir", str(output / "features" / part)],
            )
            for part, listed in lists.items()
        ]
        steps.append(
            (
                feature_match,
                ["--dataset_root_dir", str(examples), "--ground_truth_path", "example.npz"]
                + [word for part in lists for word in (f"--{part}_file_path", lists[part])]
                + [f"--{part}_input_features_dir={output / 'features' / part}" for part in lists]
                + ["--result_save_folder", str(output / "results")],
            )
        )
        steps.append((match_two, ["--plot_save_path", str(output)]))
        for step, options in steps:
            print(f"\n$ {step.__name__}.py {' '.join(shared + options)}", flush=True)
            if status := step([*shared, *options]):
                return status
        return 0

    return command_line.run(parser, command, arguments)


def gen_image_file_list(arguments: Sequence[str] | None = None) -> int:
    """List a folder's pictures."""
    parser = Parser("Write the list of a folder's pictures, in natural order.", "gen_image_file_list.py")
    parser.add_argument("--dataset_root_dir", required=True, metavar="DIR", help="folder with the pictures")
    parser.add_argument("--out_file", required=True, metavar="LIST", help="text file to write")
    parser.add_argument("--recursive", action="store_true", help="enter folders within")

    def command(args: argparse.Namespace) -> None:
        names = list_folder(command_line.folder(args.dataset_root_dir, "--dataset_root_dir"), args.recursive)
        write_image_list(Path(args.out_file), names)
        print(f"{len(names)} pictures listed in {args.out_file}")

    return command_line.run(parser, command, arguments)


def convert_kapture_to_msls(arguments: Sequence[str] | None = None) -> int:
    """Turn a Kapture pairs file into MSLS predictions."""
    parser = Parser("Turn a Kapture pairs file into predictions for the MSLS evaluator.", "convert_kapture_to_msls.py")
    parser.add_argument("kapture", metavar="IN", help="pairs file with two or three columns")
    parser.add_argument("msls", metavar="OUT", help="text file to write")
    parser.add_argument("--append", action="store_true", help="add another city to the file")

    def command(args: argparse.Namespace) -> None:
        rankings = read_pairs(Path(args.kapture))
        write_msls_predictions(Path(args.msls), rankings, args.append)
        print(f"predictions of {len(rankings)} queries in {args.msls}")

    return command_line.run(parser, command, arguments)


def render_example_places(arguments: Sequence[str] | None = None) -> int:
    """Render example pictures with their lists, ground truth and geometry."""
    parser = Parser(
        "Render pictures of invented places, with image lists, ground truth and the homographies between views.",
        "render_example_places.py",
    )
    parser.add_argument("--root", default=".", metavar="DIR", help="gets NAME_images and the dataset_* folders")
    parser.add_argument("--name", default="example", metavar="NAME", help="name of the set")
    parser.add_argument("--places", type=int, default=12, metavar="N", help="number of places")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another number is another city")
    parser.add_argument("--width", type=int, default=640, help="width of the pictures in pixels")
    parser.add_argument("--height", type=int, default=480, help="height of the pictures in pixels")
    parser.add_argument("--quality", type=int, default=85, metavar="Q", help="of the JPEG files, 1 to 95")

    def command(args: argparse.Namespace) -> None:
        if min(args.width, args.height) < 32 or not 1 <= args.quality <= 95:
            raise UserError("--width and --height must be 32 or more, --quality 1 to 95")
        if args.places < 1 or args.seed < 0:
            raise UserError("--places must be 1 or more, --seed 0 or more")
        city = make_city(args.places, seed=args.seed, look_alikes=min(2, args.places - 1), scale=args.width / 10)
        pictures = write_city(city, Path(args.root), args.name, (args.width, args.height), args.quality)
        print(f"{len(city.database)} database pictures and {len(city.queries)} queries in {pictures}")

    return command_line.run(parser, command, arguments)
