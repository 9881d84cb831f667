"""The example places: a whole run on them, and the commands that render them and a small MSLS."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.commands.pairs import match_two
from patchnetvlad.errors import UserError
from patchnetvlad.image_lists import SIDES, list_file_name
from patchnetvlad.paths import shipped_folder


def demo(arguments: Sequence[str] | None = None) -> int:
    """Run the main job on the example places with the bundled model."""
    parser = Parser("Extract, match and compare on the example places with the bundled model.", "demo.py")
    parser.add_argument("--output_dir", default="demo", metavar="DIR", help="folder for features, results and figure")
    parser.add_device_options()
    return command_line.run(parser, _demo, arguments)


def _demo(args: argparse.Namespace) -> int:
    output, examples = Path(args.output_dir), shipped_folder("example_images")
    shared = ["--config_path", "builtin.ini", "--device", "cpu" if args.nocuda else args.device]
    lists = {side: list_file_name("example", side) for side in SIDES}
    steps: list[tuple[Callable[[Sequence[str]], int], list[str]]] = [
        (
            feature_extract,
            ["--dataset_file_path", listed, "--dataset_root_dir", str(examples)]
            + ["--output_features_dir", str(output / "features" / side)],
        )
        for side, listed in lists.items()
    ]
    steps.append(
        (
            feature_match,
            ["--dataset_root_dir", str(examples), "--ground_truth_path", "example.npz"]
            + [word for side in lists for word in (f"--{side}_file_path", lists[side])]
            + [f"--{side}_input_features_dir={output / 'features' / side}" for side in lists]
            + ["--result_save_folder", str(output / "results")],
        )
    )
    steps.append((match_two, ["--plot_save_path", str(output)]))
    for step, options in steps:
        if status := command_line.run_step(f"{step.__name__}.py", step, [*shared, *options]):
            return status
    return 0


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
    _add_size_options(parser)
    parser.add_argument("--quality", type=int, default=85, metavar="Q", help="of the JPEG files, 1 to 95")
    return command_line.run(parser, _render_places, arguments)


def _render_places(args: argparse.Namespace) -> None:
    if min(args.width, args.height) < 32 or not 1 <= args.quality <= 95:
        raise UserError("--width and --height must be 32 or more, --quality 1 to 95")
    if args.places < 1 or args.seed < 0:
        raise UserError("--places must be 1 or more, --seed 0 or more")
    from patchnetvlad.examples.rendered_city import make_city, write_city

    city = make_city(args.places, seed=args.seed, look_alikes=min(2, args.places - 1), scale=args.width / 10)
    pictures = write_city(city, Path(args.root), args.name, (args.width, args.height), args.quality)
    print(f"{len(city.database)} database pictures and {len(city.queries)} queries in {pictures}")


def render_msls(arguments: Sequence[str] | None = None) -> int:
    """Render a small MSLS tree."""
    parser = Parser("Render a small tree in the layout of Mapillary Street-Level Sequences.", "render_msls.py")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="root of the new tree")
    _add_size_options(parser)
    parser.add_argument("--places", type=float, default=1.0, metavar="FACTOR", help="places, times the default")
    return command_line.run(parser, _render_msls, arguments)


def _render_msls(args: argparse.Namespace) -> None:
    if min(args.width, args.height) < 32 or args.places <= 0:
        raise UserError("--width and --height must be 32 or more, --places above 0")
    from patchnetvlad.examples.rendered_msls import SMALL_TREE, write_msls

    cities = [replace(city, places=max(2, round(city.places * args.places))) for city in SMALL_TREE]
    count = write_msls(Path(args.output_dir), cities, (args.width, args.height))
    print(f"{count} pictures of {', '.join(city.name for city in cities)} in {args.output_dir}")


def _add_size_options(parser: Parser) -> None:
    parser.add_argument("--width", type=int, default=640, help="width of the pictures in pixels")
    parser.add_argument("--height", type=int, default=480, help="height of the pictures in pixels")
