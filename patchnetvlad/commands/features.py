"""The two steps of a run: describe the pictures of a list, and rank a database for every query."""

import argparse
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.config import BUILT_INDEX, Config
from patchnetvlad.errors import UserError, counted
from patchnetvlad.paths import require_file
from patchnetvlad.result_files import FORMATS, WRITTEN, check_formats

if TYPE_CHECKING:
    from patchnetvlad.engines.ray_cluster import RayOptions
    from patchnetvlad.evaluation import Evaluation, MatchingRun, Sources
    from patchnetvlad.extraction import Extraction

logger = logging.getLogger(__name__)


def feature_extract(arguments: Sequence[str] | None = None) -> int:
    """feature_extract.py: describe the pictures of a list."""
    parser = Parser("Describe the pictures of a list and store global and patch descriptors.", "feature_extract.py")
    parser.add_config_options("performance.ini")
    parser.add_argument("--dataset_file_path", required=True, metavar="LIST", help="text file, one picture a line")
    parser.add_argument(
        "--dataset_root_dir", default="", metavar="DIR", help="folder that the names in the list start from"
    )
    parser.add_argument(
        "--output_features_dir", default="output_features", metavar="DIR", help="folder for the descriptors"
    )
    parser.add_argument(
        "--queries",
        action="store_true",
        help="the pictures are queries: never stored as codes (feature_dtype = pqN)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other features in that folder")
    parser.add_device_options()
    _add_engine_options(parser, "1")
    return command_line.run(parser, _extract, arguments)


def _add_engine_options(parser: Parser, cpus: str) -> None:
    parser.add_argument(
        "--engine",
        choices=["process", "ray"],
        default="process",
        help="this process alone, or workers that Ray starts here or on many machines",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="head of a Ray cluster, or auto for the one that this machine is part of; without it, Ray uses this "
        "machine for the time of the run",
    )
    parser.add_argument(
        "--worker_cpus",
        type=_positive,
        metavar="N",
        help=f"cores of each of Ray's workers; default: {cpus}, or an equal share for each GPU",
    )


def _ray_options(args: argparse.Namespace, config: Config, whole_machines: bool = False) -> "RayOptions | None":
    """How Ray is used, None where this process does all; raises UserError for what does not fit together."""
    gpus = config.global_params.ngpu if config.global_params.ngpu > 1 else None
    if args.engine == "process":
        for option, given in (("--address", args.address), ("--worker_cpus", args.worker_cpus)):
            if given is not None:
                raise UserError(f"{option} {given}: needs --engine ray")
        if gpus is None:
            return None
    asked = f"[global_params] ngpu = {gpus}" if args.engine == "process" else "--engine ray"
    device = "cpu" if args.nocuda else args.device
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: with {asked} the devices are Ray's to choose (auto, cpu or cuda)")
    if gpus is not None and device == "cpu":
        raise UserError(f"[global_params] ngpu = {gpus}: --device cpu uses no GPU (set ngpu = 1)")
    if find_spec("ray") is None:
        also = ", or set ngpu = 1" if args.engine == "process" else ""
        raise UserError(f"{asked}: Ray is not installed (pip install 'patchnetvlad[ray]'{also})")
    config.check_torchrun(asked)
    from patchnetvlad.engines.ray_cluster import RayOptions

    return RayOptions(args.address, device, gpus, args.worker_cpus, whole_machines)


def _extract(args: argparse.Namespace) -> None:
    config = command_line.configuration(args)
    listed = require_file(args.dataset_file_path, "dataset_imagenames")
    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    options = _ray_options(args, config)
    if options is None:
        config.check_one_process("extraction")
    command_line.require_checkpoint(config)
    from patchnetvlad.extraction import extract

    folder, progress = Path(args.output_features_dir), command_line.progress(args)
    if args.queries:
        config = config.for_queries()
    with command_line.log_file(folder / "extract.log"):
        if options is None:
            device = command_line.device(args)
            done = extract(config, listed, root, folder, device, progress, args.overwrite)
        else:
            done = _extract_with_ray(options, config, listed, root, folder, progress, args.overwrite)
    now = "" if done.described == done.pictures else f", {done.described} of them now"
    print(f"{counted(done.pictures, 'picture')} described in {done.folder}{now}")


def _extract_with_ray(
    options: "RayOptions", config: Config, listed: Path, root: Path, folder: Path, progress: bool, overwrite: bool
) -> "Extraction":
    import torch

    from patchnetvlad.engines.ray_cluster import connected
    from patchnetvlad.engines.shared_extraction import with_ray
    from patchnetvlad.extraction import extract

    with connected(options) as cluster:
        cpu = torch.device("cpu")
        return extract(config, listed, root, folder, cpu, progress, overwrite, with_ray(cluster))


def build_index(arguments: Sequence[str] | None = None) -> int:
    """Make a search index of a database's global descriptors, once."""
    parser = Parser(
        "Make a search index of a database's global descriptors, for --set feature_match.index=FILE. Searching takes "
        "the least effort that reaches the recall, measured with queries, or else with made ones at half the likeness.",
        "build_index.py",
    )
    parser.add_config_options("performance.ini", recorded=True)
    parser.add_argument(
        "--dataset_root_dir", default="", metavar="DIR", help="folder that the names in the list start from"
    )
    parser.add_argument("--index_file_path", required=True, metavar="LIST", help="list of database pictures")
    parser.add_argument("--index_input_features_dir", required=True, metavar="DIR", help="descriptors of the database")
    parser.add_argument("--query_file_path", metavar="LIST", help="list of queries to measure the recall with")
    parser.add_argument("--query_input_features_dir", metavar="DIR", help="descriptors of these queries")
    parser.add_argument(
        "--output_path", metavar="FILE", help="file to write (.json); default: search_index.json with the descriptors"
    )
    parser.add_argument(
        "--factory", metavar="TEXT", help="faiss's factory string; default: short codes that are compared all at once"
    )
    parser.add_argument("--shards", type=_positive, default=1, metavar="N", help="files, one at a time in memory")
    parser.add_argument("--recall", type=_share, default=0.99, help="share of the exact nearest pictures to be found")
    parser.add_argument("--candidates", type=_positive, default=100, metavar="N", help="how many nearest pictures")
    return command_line.run(parser, _build_index, arguments)


def _build_index(args: argparse.Namespace) -> None:
    features = command_line.folder(args.index_input_features_dir, "--index_input_features_dir", "feature_extract.py")
    config = command_line.configuration(args, features)
    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    listed = require_file(args.index_file_path, "dataset_imagenames")
    path = Path(args.output_path) if args.output_path else features / "search_index.json"
    if path.suffix != BUILT_INDEX:
        raise UserError(f"--output_path {path}: expected a name that ends in {BUILT_INDEX}")
    if (args.query_file_path is None) != (args.query_input_features_dir is None):
        raise UserError("--query_file_path and --query_input_features_dir: give both or none")
    queries = None
    if args.query_file_path is not None:
        asked = require_file(args.query_file_path, "dataset_imagenames")
        queries = asked, command_line.folder(args.query_input_features_dir, "--query_input_features_dir")
    from patchnetvlad.evaluation import make_search_index

    built = make_search_index(
        config, listed, root, features, path, args.factory, args.shards, args.candidates, args.recall, queries
    )
    effort = ", ".join(f"{name} {value}" for name, value in built.parameters.items()) or "all compared"
    print(
        f"index of {counted(built.num_pictures, 'picture')} in {path}: {built.factory}, {effort}, {built.widening} "
        f"looked up for each one wanted, {built.num_bytes / 1e6:.1f} MB"
    )
    print(f"Recall@{built.neighbours} against the exact search: {built.recall:.4f}")
    if built.recall < args.recall:
        logger.warning("%s: less than --recall %g (choose another --factory)", path, args.recall)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, at most 1")
    return number


def feature_match(arguments: Sequence[str] | None = None) -> int:
    """feature_match.py: rank database pictures for every query."""
    parser = Parser("Rank the database pictures for every query, from stored descriptors.", "feature_match.py")
    parser.add_config_options("performance.ini", recorded=True)
    parser.add_argument(
        "--dataset_root_dir", default="", metavar="DIR", help="folder that the names in the lists start from"
    )
    parser.add_argument("--query_file_path", required=True, metavar="LIST", help="list of query pictures")
    parser.add_argument("--index_file_path", required=True, metavar="LIST", help="list of database pictures")
    parser.add_argument("--query_input_features_dir", required=True, metavar="DIR", help="descriptors of the queries")
    parser.add_argument("--index_input_features_dir", required=True, metavar="DIR", help="descriptors of the database")
    parser.add_argument(
        "--ground_truth_path", metavar="NPZ", help="utmQ, utmDb and posDistThr; with it recalls are reported"
    )
    parser.add_argument(
        "--posDistThr", type=float, metavar="DISTANCE", help="true match up to this distance, not the file's"
    )
    _add_result_options(parser)
    parser.add_device_options()
    _add_engine_options(parser, "all of a machine")
    return command_line.run(parser, _match, arguments)


def _add_result_options(parser: Parser) -> None:
    parser.add_argument("--result_save_folder", default="results", metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=list(WRITTEN),
        choices=list(FORMATS),
        metavar="FORMAT",
        help=f"prediction files to write: {', '.join(FORMATS)}",
    )
    parser.add_argument(
        "--details", action="store_true", help="print confidence intervals, mAP@N and precision against recall too"
    )
    parser.add_argument(
        "--msls_predictions", metavar="FILE", help="add the final rankings to this file for the MSLS evaluator"
    )
    parser.add_argument(
        "--report", action="store_true", help="write report.html too: curves, a map, every query with its candidates"
    )
    parser.add_argument(
        "--distance_unit", metavar="UNIT", help="of the ground truth's coordinates (m, frames), not the file's"
    )


def _match(args: argparse.Namespace) -> None:
    truth = None if args.ground_truth_path in (None, "None", "") else args.ground_truth_path
    for option, given in (("--posDistThr", args.posDistThr), ("--distance_unit", args.distance_unit)):
        if truth is None and given is not None:
            raise UserError(f"{option}: needs --ground_truth_path, whose own it takes the place of")
    check_formats(args.formats)
    query_features, index_features = (
        command_line.folder(given, f"--{side}_input_features_dir", "feature_extract.py")
        for side, given in (("query", args.query_input_features_dir), ("index", args.index_input_features_dir))
    )
    config = command_line.configuration(args, index_features)
    config.check_matching()
    options = _ray_options(args, config, whole_machines=True)
    if options is None:
        config.check_one_process("matching")
    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    query_list = require_file(args.query_file_path, "dataset_imagenames")
    index_list = require_file(args.index_file_path, "dataset_imagenames")
    truth_path = None if truth is None else require_file(truth, "dataset_gt_files")
    if config.feature_match.local_features == "on_demand":
        command_line.require_checkpoint(config)
    if config.feature_match.pred_input_path is not None:
        require_file(config.feature_match.pred_input_path, "dataset_gt_files", config.path)
    if config.feature_match.index.endswith(BUILT_INDEX):
        require_file(config.feature_match.index, "dataset_gt_files", config.path)
    from patchnetvlad.evaluation import Sources, add_city

    results = Path(args.result_save_folder)
    cities = None if args.msls_predictions is None else Path(args.msls_predictions)
    own_truth = (truth_path, args.posDistThr, args.distance_unit)
    sources = Sources(root, query_list, index_list, query_features, index_features, *own_truth)
    with command_line.log_file(results / "match.log"):
        if options is None:
            evaluation = _evaluate(args, config, sources, cities)
        else:
            evaluation = _evaluate_with_ray(args, options, config, sources, cities)
        for line in evaluation.lines(details=True):
            logger.debug(line)
        if cities is not None:
            add_city(evaluation, cities)
    print("\n".join([*evaluation.lines(args.details), f"results in {results}"]))


def _evaluate(args: argparse.Namespace, config: Config, sources: "Sources", cities: Path | None) -> "Evaluation":
    from patchnetvlad.evaluation import evaluate, open_run

    progress = command_line.progress(args)
    with open_run(config, sources, command_line.device(args), progress, args.formats, cities) as run:
        evaluation = evaluate(run, progress)
        _write(args, run, evaluation)
    return evaluation


def _evaluate_with_ray(
    args: argparse.Namespace, options: "RayOptions", config: Config, sources: "Sources", cities: Path | None
) -> "Evaluation":
    import torch

    from patchnetvlad.engines.ray_cluster import connected
    from patchnetvlad.engines.shared_matching import with_ray
    from patchnetvlad.evaluation import evaluate, open_run

    progress = command_line.progress(args)
    with (
        connected(options) as cluster,
        open_run(config, sources, torch.device("cpu"), progress, args.formats, cities, shared=True) as run,
    ):
        evaluation = evaluate(run, progress, with_ray(cluster, run, sources, progress))
        _write(args, run, evaluation)
    return evaluation


def _write(args: argparse.Namespace, run: "MatchingRun", evaluation: "Evaluation") -> None:
    from patchnetvlad.evaluation import write_results

    results = Path(args.result_save_folder)
    write_results(evaluation, results, args.formats)
    if args.report:
        _write_report(results / "report.html", run, evaluation, command_line.progress(args))


def _write_report(path: Path, run: "MatchingRun", evaluation: "Evaluation", progress: bool) -> None:
    from patchnetvlad.report.page import write_report
    from patchnetvlad.report.run_content import run_content

    size = write_report(path, run_content(run, evaluation), progress)
    logger.info("report: %s (%.1f MB)", path, size / 1e6)
