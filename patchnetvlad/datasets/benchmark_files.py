"""What a benchmark's run needs, found, made or asked for before it starts: configuration, lists, pictures, weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchnetvlad.config import Config
from patchnetvlad.datasets.dataset import check_pictures
from patchnetvlad.datasets.known_results import BENCHMARKS, Benchmark, ListPair
from patchnetvlad.datasets.makers import finish
from patchnetvlad.errors import UserError
from patchnetvlad.image_lists import ImageList, list_file_name, read_image_list
from patchnetvlad.ini import load_config
from patchnetvlad.paths import find_file, require_file


@dataclass(frozen=True)
class Files:
    """A pair of lists with its ground truth, found or made; name: of the lists."""

    name: str
    queries: ImageList
    database: ImageList
    ground_truth: Path


def prepare(
    benchmark_name: str, root: Path, work: Path, config_path: str | None, overrides: Sequence[str]
) -> tuple[Config, list[Files]]:
    """Configuration and lists of a benchmark; one UserError says all that is missing and where to get it."""
    benchmark = BENCHMARKS[benchmark_name]
    own = () if config_path else benchmark.overrides
    config = load_config(require_file(config_path or benchmark.config, "configs"), (*own, *overrides))
    missing = []
    weights: Path | None = None
    try:
        weights = config.require_checkpoint()
    except UserError as error:
        missing.append(f"weights: {error}")
    files: list[Files] = []
    try:
        files = _lists(benchmark, root, None if missing else work)
    except UserError as error:
        missing.insert(0, f"data: {error} (get it: {benchmark.where})")
        if weights is not None and not weights.exists():  # with the data at hand it is downloaded
            missing.append(
                f"weights: {weights.name} is not at hand (get it: download_models.py --models {weights.name})"
            )
    if missing:
        raise UserError(f"{benchmark_name}: missing " + "; ".join(missing))
    return config, files


def _lists(benchmark: Benchmark, root: Path, work: Path | None) -> list[Files]:
    """Lists beside the pictures, among the known ones, or made from the dataset; work: None to write none.

    Raises UserError when lists or pictures are missing, before any list is written.
    """
    at_hand = [_find_pair(root, pair) for pair in benchmark.list_pairs]
    if all(pair is not None for pair in at_hand):
        complete = [pair for pair in at_hand if pair is not None]
        for listed in (pictures for pair in complete for pictures in (pair.queries, pair.database)):
            absent = sum(not path.is_file() for path in listed.paths)
            if absent:
                raise UserError(f"{listed.source}: {absent} of {len(listed)} pictures are absent below {root}")
        return complete
    if benchmark.make is None:
        names = "; ".join(f"{', '.join(_list_names(pair))}, {pair.ground_truth}.npz" for pair in benchmark.list_pairs)
        raise UserError(f"{root}: no {names}")
    datasets = [check_pictures(dataset, root) for dataset in benchmark.make(root)]
    if work is None:
        return []
    made = []
    for pair, dataset in zip(benchmark.list_pairs, datasets, strict=True):
        _, files = finish(dataset, root, work / "lists", work / "lists")
        if files.ground_truth is None:
            raise UserError(f"{root}: {dataset.name} has no coordinates")
        made.append(
            Files(
                pair.lists,
                read_image_list(files.queries, root),
                read_image_list(files.database, root),
                files.ground_truth,
            )
        )
    return made


def _list_names(pair: ListPair) -> tuple[str, str]:
    return list_file_name(pair.lists, "query"), list_file_name(pair.lists, "index")


def _find_pair(root: Path, pair: ListPair) -> Files | None:
    lists = [find_file(name, "dataset_imagenames", root) for name in _list_names(pair)]
    truth = find_file(f"{pair.ground_truth}.npz", "dataset_gt_files", root)
    if lists[0] is None or lists[1] is None or truth is None:
        return None
    return Files(pair.lists, read_image_list(lists[0], root), read_image_list(lists[1], root), truth)
