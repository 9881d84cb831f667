"""Two drives in one command: lists, features, rankings and a page, each by the command that makes it alone."""

from __future__ import annotations

import argparse
import os
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.commands.datasets import make_dataset
from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.config import Config
from patchnetvlad.errors import UserError, counted
from patchnetvlad.files import replacing
from patchnetvlad.image_lists import SIDES, list_file_name, read_image_list
from patchnetvlad.result_files import RERANKING, RETRIEVAL, read_pairs, read_scores

_SHOWN = 20  # queries on the screen, each with
_BEST = 3  # of its candidates
_GIVEN = "--position_csv, --pairs_csv or --frames"


def recognize(arguments: Sequence[str] | None = None) -> int:
    """Find the places of one folder of pictures among those of another."""
    parser = Parser(
        "Find the places of one folder of pictures among those of another: lists, positions where the pictures have "
        "them, features, rankings and a page. Pictures that are added later are described alone.",
        "recognize.py",
    )
    parser.add_argument("--database", required=True, metavar="DIR", help="pictures of known places")
    parser.add_argument("--queries", required=True, metavar="DIR", help="pictures to find among them")
    parser.add_argument("--output_dir", default="recognized", metavar="DIR", help="lists, features and results")
    positions = parser.add_mutually_exclusive_group()
    positions.add_argument(
        "--position_csv",
        nargs=2,
        metavar=("DATABASE_CSV", "QUERY_CSV"),
        help="where they were taken: name within its folder, and latitude, longitude (these where there are both) or "
        "easting, northing",
    )
    positions.add_argument(
        "--pairs_csv", metavar="CSV", help="pictures that show one place, in columns query and database"
    )
    positions.add_argument(
        "--frames",
        nargs="?",
        const=0,
        type=int,
        metavar="OFFSET",
        help="frame N of the queries is where frame N + OFFSET (0) of the database is",
    )
    positions.add_argument("--no_positions", action="store_true", help="do not look for positions in names and EXIF")
    parser.add_argument("--radius", type=float, metavar="DISTANCE", help="true match up to this distance")
    parser.add_argument("--open", action="store_true", help="open the page when it is there")
    parser.add_argument("--overwrite", action="store_true", help="replace other features in the output folder")
    parser.add_config_options("builtin.ini")
    parser.add_device_options()
    return command_line.run(parser, _recognize, arguments)


def _recognize(args: argparse.Namespace) -> int:
    config = command_line.configuration(args)
    config.check_matching()
    config.check_one_process("recognition")
    drives = [
        command_line.folder(name, option).resolve()
        for name, option in ((args.database, "--database"), (args.queries, "--queries"))
    ]
    root = _common_root(*drives)
    database, queries = (drive.relative_to(root).as_posix() for drive in drives)
    command_line.require_checkpoint(config)
    making = _making(args, root, database, queries)
    output, name = Path(args.output_dir), f"{_flat(queries)}_in_{_flat(database)}"
    lists = {side: output / "lists" / list_file_name(name, side) for side in SIDES}
    features = _feature_folders(output / "features", making[0], database, queries)
    truth, results = output / "lists" / f"{name}.npz", output / "results" / name
    shared, of_root = _shared(args), ["--dataset_root_dir", str(root)]
    into = ["--name", name, *(f"--{kind}_dir={output / 'lists'}" for kind in ("lists", "ground_truth"))]
    with _kept_if_refused([*lists.values(), truth]) as accept:
        truth.unlink(missing_ok=True)
        if status := command_line.run_step("tools/make_dataset.py", make_dataset, [*_talk(args), *making, *into]):
            return status
        _check_pictures(args, config, root, list(lists.values()))
        for side in ("index", "query"):
            options = [*of_root, "--dataset_file_path", str(lists[side]), "--output_features_dir", str(features[side])]
            options += ["--queries"] * (side == "query") + ["--overwrite"] * args.overwrite
            if status := command_line.run_step("feature_extract.py", feature_extract, [*shared, *options]):
                return status
        accept()
    options = [word for side in lists for word in (f"--{side}_file_path", str(lists[side]))]
    options += [word for side in lists for word in (f"--{side}_input_features_dir", str(features[side]))]
    options += ["--ground_truth_path", str(truth)] if truth.exists() else []
    options += ["--result_save_folder", str(results), "--report"]
    if status := command_line.run_step("feature_match.py", feature_match, [*shared, *of_root, *options]):
        return status
    print("\n".join(["", *_ranking_lines(results, config)]))
    page = (results / "report.html").absolute()
    print(f"page: {page}")
    if args.open and not webbrowser.open(page.as_uri()):
        print("no browser could be started (open the page by hand)")
    return 0


@contextmanager
def _kept_if_refused(files: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """Gives a function to call when the block has succeeded; otherwise files that were there are again as they were.

    Where there was none of them, what the block has made stays, so that its steps can be repeated.
    """
    before = {file: file.read_bytes() for file in files if file.exists()}
    accepted: list[bool] = []
    try:
        yield lambda: accepted.append(True)
    finally:
        if before and not accepted:
            for file in files:
                if file in before:
                    with replacing(file) as temporary:
                        temporary.write_bytes(before[file])
                else:
                    file.unlink(missing_ok=True)


def _check_pictures(args: argparse.Namespace, config: Config, root: Path, lists: Sequence[Path]) -> None:
    """Raises UserError for unreadable pictures of either list, before the first picture is described."""
    from patchnetvlad.images import require_readable

    threads = config.global_params.loading_threads
    for listed in lists:
        require_readable(read_image_list(listed, root).paths, listed, threads, command_line.progress(args))


def _feature_folders(folder: Path, kind: str, database: str, queries: str) -> dict[str, Path]:
    """Where a drive's features go; apart where positions from a file may leave pictures out of its list."""
    names = {"index": _flat(database), "query": _flat(queries)}
    partial = {"csv": ("index", "query"), "pairs": ("query",)}.get(kind, ())
    return {side: folder / (f"{name}_{kind}" if side in partial else name) for side, name in names.items()}


def _flat(drive: str) -> str:
    """A drive's name without separators."""
    return drive.replace("/", "__")


def _common_root(database: Path, queries: Path) -> Path:
    """The folder that names of both drives start from."""
    if database == queries or database in queries.parents or queries in database.parents:
        raise UserError(
            f"--database {database}, --queries {queries}: one lies within the other, so every query would find itself"
        )
    try:
        return Path(os.path.commonpath([database.parent, queries.parent]))
    except ValueError as error:  # two disks of Windows
        raise UserError(f"--database {database}, --queries {queries}: lie on different disks") from error


def _making(args: argparse.Namespace, root: Path, database: str, queries: str) -> list[str]:
    """The options of make_dataset.py: a kind, and where it finds things."""
    sides = ["--queries", queries, "--database", database]
    if args.position_csv:
        files = [command_line.file(name, "--position_csv").resolve() for name in args.position_csv]
        kind, sides = "csv", ["--queries", str(files[1]), "--database", str(files[0])]
        sides += ["--query_folder", queries, "--database_folder", database, "--incomplete", "leave_out"]
    elif args.pairs_csv:
        pairs = command_line.file(args.pairs_csv, "--pairs_csv")
        kind, sides = "pairs", [*sides, "--pairs_csv", str(pairs), "--interpolate", "--incomplete", "leave_out"]
    elif args.frames is not None:
        kind, sides = "frames", [*sides, "--offset", str(args.frames)]
    elif args.no_positions:
        kind = "folders"
    else:
        from patchnetvlad.datasets.picture_names import kind_of_positions

        kind, why = kind_of_positions(root, queries, database)
        print(f"positions: {f'none, {why} ({_GIVEN} give them)' if kind == 'folders' else why}")
    if args.radius is not None and kind == "folders":
        raise UserError(f"--radius: needs positions ({_GIVEN} give them)")
    radius = [] if args.radius is None else ["--radius", str(args.radius)]
    return [kind, str(root), *sides, *radius]


def _shared(args: argparse.Namespace) -> list[str]:
    changes = [word for override in args.overrides for word in ("--set", override)]
    device = ["--device", "cpu" if args.nocuda else args.device]
    return ["--config_path", args.config_path, *changes, *device, *_talk(args)]


def _talk(args: argparse.Namespace) -> list[str]:
    return [option for option, given in (("-q", args.quiet), ("-v", args.verbose)) if given]


def _ranking_lines(results: Path, config: Config) -> list[str]:
    """Each query with its best candidates, and the spatial score of the best, which compares queries."""
    stage = RERANKING if config.global_params.has_patches else RETRIEVAL
    predictions = results / f"{stage}_predictions.txt"
    rankings = read_pairs(predictions)
    best: dict[str, float] = {}
    if stage == RERANKING:
        scores, names, _ = read_scores(results / "scores.npz")
        if scores.per_scale.shape[1]:
            of_best = scores.of_best(config.feature_match.patchweights2use)
            best = dict(zip(names, of_best.tolist(), strict=True))
    lines = ["query: best match" + (" (spatial score)" if best else "") + ", next ones"]
    for ranking in rankings[:_SHOWN]:
        first, *others = ranking.database[:_BEST]
        score = f" ({best[ranking.query]:.4f})" if ranking.query in best else ""
        lines.append(f"{ranking.query}: {', '.join([first + score, *others])}")
    if len(rankings) > _SHOWN:
        lines.append(f"and {counted(len(rankings) - _SHOWN, 'more query', 'more queries')}")
    return [*lines, f"all candidates: {predictions}"]
