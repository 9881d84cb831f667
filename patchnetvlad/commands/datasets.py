"""Datasets: lists and ground truth made, rankings measured, known results repeated, files converted."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.errors import UserError
from patchnetvlad.files import duration, free_disk
from patchnetvlad.image_lists import list_folder, read_image_list, write_image_list
from patchnetvlad.judging import Measures, judge
from patchnetvlad.judging import measure as measure_judged
from patchnetvlad.judging_files import EvaluationProtocol, joined, measure_lines, measure_record, write_json
from patchnetvlad.paths import making_folder, require_file
from patchnetvlad.result_files import read_pairs, read_predictions, write_msls_predictions

if TYPE_CHECKING:
    from patchnetvlad.datasets.reproduction import ComparedRecall, Estimate, Reproduction

_JOINED = "all {} joined, each searched in its own database: {}"


def gen_image_file_list(arguments: Sequence[str] | None = None) -> int:
    """List a folder's pictures."""
    parser = Parser("Write the list of a folder's pictures, in natural order.", "gen_image_file_list.py")
    parser.add_argument("--dataset_root_dir", required=True, metavar="DIR", help="folder with the pictures")
    parser.add_argument("--out_file", required=True, metavar="LIST", help="text file to write")
    parser.add_argument("--recursive", action="store_true", help="enter folders within")
    return command_line.run(parser, _list, arguments)


def _list(args: argparse.Namespace) -> None:
    names = list_folder(command_line.folder(args.dataset_root_dir, "--dataset_root_dir"), args.recursive)
    write_image_list(Path(args.out_file), names)
    print(f"{len(names)} pictures listed in {args.out_file}")


def make_dataset(arguments: Sequence[str] | None = None) -> int:
    """Write lists and ground truth of a dataset as its authors distribute it, or of your own."""
    from patchnetvlad.datasets.makers import MAKERS

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
            "--lists_dir", type=Path, default=making_folder("dataset_imagenames"), metavar="DIR", help="for the lists"
        )
        options.add_argument(
            "--ground_truth_dir",
            type=Path,
            default=making_folder("dataset_gt_files"),
            metavar="DIR",
            help="for the ground truth",
        )
    return command_line.run(parser, _make, arguments)


def _make(args: argparse.Namespace) -> None:
    from patchnetvlad.datasets.dataset import summary
    from patchnetvlad.datasets.makers import MAKERS, finish

    maker = MAKERS[args.kind]
    command_line.folder(args.root, "ROOT")
    names = [option.flag.lstrip("-") for option in maker.options]
    progress = command_line.progress(args)
    options = {name: getattr(args, name) for name in names}
    for dataset in maker.make(args.root, **options, **({"progress": progress} if maker.reads_pictures else {})):
        made, files = finish(
            dataset,
            args.root,
            args.lists_dir,
            args.ground_truth_dir,
            args.incomplete == "leave_out",
            args.only_queries_with_match,
            not args.no_picture_check,
            progress,
        )
        print("\n".join(summary(made)))
        print(f"  written: {', '.join(str(path) for path in vars(files).values() if path is not None)}")


def convert_kapture_to_msls(arguments: Sequence[str] | None = None) -> int:
    """Turn a Kapture pairs file into MSLS predictions."""
    parser = Parser("Turn a Kapture pairs file into predictions for the MSLS evaluator.", "convert_kapture_to_msls.py")
    parser.add_argument("kapture", metavar="IN", help="pairs file with two or three columns")
    parser.add_argument("msls", metavar="OUT", help="text file to write")
    parser.add_argument("--append", action="store_true", help="add another city to the file")
    return command_line.run(parser, _convert, arguments)


def _convert(args: argparse.Namespace) -> None:
    rankings = read_pairs(Path(args.kapture))
    write_msls_predictions(Path(args.msls), rankings, args.append)
    print(f"predictions of {len(rankings)} queries in {args.msls}")


def measure(arguments: Sequence[str] | None = None) -> int:
    """Measure rankings: matching runs joined and apart, or predictions of any method."""
    parser = Parser(
        "Measure rankings with confidence: the folders of matching runs (joined, and each apart), or with "
        "--predictions those of any method.",
        "measure.py",
    )
    parser.add_argument(
        "results", nargs="*", metavar="[NAME=]DIR", help="result folders of feature_match.py, a city each"
    )
    parser.add_argument("--predictions", nargs="+", metavar="[NAME=]FILE", help="Kapture or hloc pairs, .npy of rows")
    parser.add_argument("--query_file_path", metavar="LIST", help="with --predictions")
    parser.add_argument("--index_file_path", metavar="LIST", help="with --predictions")
    parser.add_argument("--ground_truth_path", metavar="NPZ", help="with --predictions")
    parser.add_argument(
        "--posDistThr", type=float, metavar="DISTANCE", help="not the ground truth's, with --predictions"
    )
    parser.add_argument("--distance_unit", metavar="UNIT", help="not the ground truth's, with --predictions")
    parser.add_argument("--dataset_root_dir", default="", metavar="DIR", help="with --predictions")
    parser.add_argument("--n_values", nargs="+", type=int, default=[1, 5, 10, 20], metavar="N", help="N of Recall@N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return command_line.run(parser, _measure, arguments)


def _measure(args: argparse.Namespace) -> None:
    if bool(args.results) == bool(args.predictions):
        raise UserError("expected result folders of feature_match.py, or --predictions")
    if min(args.n_values) < 1:
        raise UserError(f"--n_values {min(args.n_values)}: expected 1 or more")
    if args.results:
        named = {_name(named_path): _path(named_path) for named_path in args.results}
        whole = joined(list(named.values()), args.n_values)
        per_dataset = {name: joined([path], args.n_values) for name, path in named.items()} if len(named) > 1 else {}
    else:
        whole, per_dataset = _measured_predictions(args), {}
    if per_dataset:
        print(_JOINED.format(len(per_dataset), ", ".join(per_dataset)))
    print("\n".join(measure_lines(*whole, details=True)))
    for name, measured in per_dataset.items():
        print("\n".join(["", name, *measure_lines(*measured)]))
    if args.json:
        record = measure_record(*whole)
        if per_dataset:
            record["parts"] = {name: measure_record(*measured) for name, measured in per_dataset.items()}
        write_json(args.json, record)


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark's whole chain and set the recalls beside the known ones."""
    from patchnetvlad.datasets.known_results import BENCHMARKS

    parser = Parser(
        "Describe, match and measure a dataset, and set the recalls beside the known ones. Exit status: 0; 1 when a "
        "recall is outside its band; 2 for an error.",
        "reproduce.py",
    )
    parser.add_argument("dataset", choices=list(BENCHMARKS), metavar="DATASET", help=", ".join(BENCHMARKS))
    parser.add_argument("--dataset_root_dir", required=True, metavar="DIR", help="folder that the names start from")
    parser.add_argument("--output_dir", metavar="DIR", help="for features and results; without it runs/DATASET")
    parser.add_argument("--config_path", metavar="INI", help="another configuration than the known result's")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one key"
    )
    parser.add_argument("--estimate_only", action="store_true", help="say disk, memory and time, and stop")
    parser.add_device_options()
    return command_line.run(parser, _reproduce, arguments)


def _reproduce(args: argparse.Namespace) -> int:
    from patchnetvlad.datasets.benchmark_files import prepare
    from patchnetvlad.datasets.known_results import BENCHMARKS

    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    work = Path(args.output_dir) if args.output_dir else Path("runs") / args.dataset
    config, files = prepare(args.dataset, root, work, args.config_path, args.overrides)
    for pair in files:
        print(f"{pair.name}: {len(pair.queries)} queries, {len(pair.database)} database pictures")
    from patchnetvlad.datasets.reproduction import reproduce as run_benchmark

    def announce(estimate: Estimate) -> None:
        print("\n".join(_estimate_lines(estimate, work)), flush=True)
        if args.estimate_only:
            raise _Enough

    known = BENCHMARKS[args.dataset].known
    device, progress = command_line.device(args), command_line.progress(args)
    try:
        reproduction = run_benchmark(config, files, root, known, work, device, progress, announce)
    except _Enough:
        return 0
    _tell(reproduction, work)
    return int(any(comparison.passed is False for comparison in reproduction.comparisons))


def _tell(reproduction: Reproduction, work: Path) -> None:
    """Print what a run gave, and keep it beside its results."""
    if len(reproduction.evaluations) > 1:
        print(_JOINED.format(len(reproduction.evaluations), ", ".join(reproduction.evaluations)))
    print("\n".join(measure_lines(reproduction.protocol, reproduction.measures, details=True)))
    if len(reproduction.evaluations) > 1:
        for name, evaluation in reproduction.evaluations.items():
            print("\n".join(["", name, *evaluation.lines()]))
    print("\n".join(["", *_comparison_lines(reproduction.comparisons)]))
    print(f"{reproduction.seconds:.0f} s; results in {work / 'results'}")
    record = measure_record(reproduction.protocol, reproduction.measures)
    record["known"] = [
        {
            "stage": comparison.known.stage,
            "source": comparison.known.source,
            "n": comparison.n,
            "known": comparison.known.recalls[comparison.n],
        }
        | {"measured": comparison.measured, "passed": comparison.passed}
        for comparison in reproduction.comparisons
    ]
    write_json(work / "results" / "reproduction.json", record)


class _Enough(Exception):
    """The estimate was all that was asked for."""


def _measured_predictions(args: argparse.Namespace) -> tuple[EvaluationProtocol, dict[str, Measures]]:
    if None in (args.query_file_path, args.index_file_path, args.ground_truth_path):
        raise UserError("--predictions: needs --query_file_path, --index_file_path and --ground_truth_path")
    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    queries, database = (
        read_image_list(require_file(path, "dataset_imagenames"), root)
        for path in (args.query_file_path, args.index_file_path)
    )
    from patchnetvlad.ground_truth import read_ground_truth

    truth = read_ground_truth(
        require_file(args.ground_truth_path, "dataset_gt_files"),
        queries.names,
        database.names,
        args.posDistThr,
        args.distance_unit,
    )
    positives = truth.positives()
    measures = {}
    for named_path in args.predictions:
        predicted = read_predictions(_path(named_path), queries.names, database.names).indices
        measures[_name(named_path)] = measure_judged(judge(predicted, positives), args.n_values)
    return EvaluationProtocol(len(queries), len(database), truth.radius, truth.unit), measures


def _name(named_path: str) -> str:
    name, separator, _ = named_path.partition("=")
    return name if separator else Path(named_path).name


def _path(named_path: str) -> Path:
    return Path(named_path.partition("=")[2] or named_path)


def _estimate_lines(estimate: Estimate, work: Path) -> list[str]:
    free = free_disk(work)
    lines = [
        f"about {estimate.disk / 1e9:.2f} GB on disk ({free / 1e9:.0f} GB free), {estimate.memory / 1e9:.1f} GB of "
        f"memory, {duration(estimate.seconds)}, from trying a few pictures"
    ]
    if estimate.disk > free:
        lines.append(
            "warning: the disk is too small (--output_dir elsewhere, --set feature_extract.feature_dtype=int8, or "
            "--set feature_match.local_features=on_demand)"
        )
    return lines


def _band(band: tuple[float, float]) -> str:
    lower, upper = band
    return f"−{lower:g} or better" if math.isinf(upper) else f"−{lower:g} to +{upper:g}"


def _comparison_lines(comparisons: Sequence[ComparedRecall]) -> list[str]:
    if not comparisons:
        return ["no known result to compare with"]
    lines = [f"{'':<14}{'N':>4}{'known':>8}{'measured':>10}{'':>8}  source"]
    for comparison in comparisons:
        known, verdict = comparison.known, {True: "passed", False: "FAILED", None: ""}[comparison.passed]
        band = f" ({_band(known.band)})" if known.band else ""
        lines.append(
            f"{known.stage:<14}{comparison.n:>4}{known.recalls[comparison.n]:8.1f}{comparison.measured:10.1f}"
            f"{verdict:>8}  {known.source}{band}"
        )
    return lines
