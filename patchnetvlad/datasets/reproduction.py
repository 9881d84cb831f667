"""A benchmark's known results repeated: one run of the whole chain, from lists to comparison."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from patchnetvlad.checkpoints import Checkpoint
from patchnetvlad.config import MATCHERS, Config
from patchnetvlad.datasets.benchmark_files import Files
from patchnetvlad.datasets.known_results import Known
from patchnetvlad.evaluation import Evaluation, Sources, add_city, evaluate, open_run, write_results
from patchnetvlad.extraction import describe_list, estimate_bytes, store_header
from patchnetvlad.images import image_batches, require_readable
from patchnetvlad.judging import Measures
from patchnetvlad.judging_files import EvaluationProtocol, joined
from patchnetvlad.model import PlaceModel
from patchnetvlad.reranking import rerank
from patchnetvlad.store.cache.memory_cache import cache_bytes
from patchnetvlad.weights import load_model

logger = logging.getLogger(__name__)

_BASE_GB = 1.5  # of memory for Python, torch and the encoder's feature maps


@dataclass(frozen=True)
class ComparedRecall:
    """A known Recall@N beside the measured one, both in %; passed: within the band, None where there is none."""

    known: Known
    n: int
    measured: float
    passed: bool | None = field(default=None)


@dataclass(frozen=True)
class Estimate:
    """What a run takes: bytes of features on disk, bytes of memory, seconds, from trying a few pictures."""

    disk: int
    memory: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Reproduction:
    """What a run gave: the measures of all pairs of lists joined, of each pair, and beside the known results."""

    protocol: EvaluationProtocol
    measures: dict[str, Measures]
    evaluations: dict[str, Evaluation]
    comparisons: tuple[ComparedRecall, ...]
    seconds: float


def reproduce(
    config: Config,
    files: Sequence[Files],
    root: Path,
    known: Sequence[Known],
    work: Path,
    device: torch.device,
    progress: bool = False,
    announce: Callable[[Estimate], None] = lambda estimate: None,
) -> Reproduction:
    """The whole chain: describe, match, measure, compare. Features and results go below work and finished ones stay.

    announce is called with the estimate before the long part; each pair of lists is searched in its own database.
    """
    started = time.perf_counter()
    config.check_one_process("a reproduction")
    for listed in (pictures for pair in files for pictures in (pair.queries, pair.database)):
        require_readable(listed.paths, listed.source, config.global_params.loading_threads, progress)
    model, checkpoint = load_model(config)
    model.to(device)
    announce(estimate(model, checkpoint, config, files))
    evaluations = {}
    for pair in files:
        name = pair.name
        folders = [work / "features" / f"{name}_{side}" for side in ("query", "index")]
        for pictures, folder in zip((pair.queries, pair.database), folders, strict=True):
            describe_list(model, checkpoint, config, pictures, folder, progress)
        query_features, index_features = folders
        sources = Sources(
            root, pair.queries.source, pair.database.source, query_features, index_features, pair.ground_truth
        )
        results = work / "results" / name
        with open_run(config, sources, device, progress) as run:
            evaluations[name] = evaluate(run, progress)
        write_results(evaluations[name], results)
        logger.info("%s: results in %s", name, results)
    if len(files) > 1:
        predictions = work / "results" / "predictions_msls.txt"
        predictions.unlink(missing_ok=True)
        for evaluation in evaluations.values():
            add_city(evaluation, predictions)
    protocol, measures = joined([work / "results" / pair.name for pair in files], config.feature_match.n_values_all)
    return Reproduction(protocol, measures, evaluations, compare(known, measures), time.perf_counter() - started)


def compare(known: Sequence[Known], measures: dict[str, Measures]) -> tuple[ComparedRecall, ...]:
    """Known recalls beside those measured; a stage or N that was not measured is passed over."""
    comparisons = []
    for known_result in known:
        if known_result.stage not in measures:
            continue
        recall = measures[known_result.stage].recall
        measured = dict(zip(recall.n_values, recall.all_queries, strict=True))
        for n, value in known_result.recalls.items():
            if n in measured:
                ours = 100 * measured[n]
                passed = None
                if known_result.band is not None:
                    passed = value - known_result.band[0] <= round(ours, 2) <= value + known_result.band[1]
                comparisons.append(ComparedRecall(known_result, n, ours, passed))
    return tuple(comparisons)


def estimate(model: PlaceModel, checkpoint: Checkpoint, config: Config, files: Sequence[Files]) -> Estimate:
    """Describe and compare a few pictures, and multiply."""
    size, options = config.feature_extract, config.feature_match
    listed = [pictures for pair in files for pictures in (pair.queries, pair.database)]
    sample = listed[0].paths[: min(4, len(listed[0]))]
    model.describe(next(image_batches(sample[:1], size.imageresizeh, size.imageresizew, 1, 1))[1].to(model.device))
    started = time.perf_counter()
    described = [
        model.describe(batch.to(model.device))
        for _, batch in image_batches(sample, size.imageresizeh, size.imageresizew, 1, 1)
    ]
    seconds_each = (time.perf_counter() - started) / len(sample)
    seconds = seconds_each * sum(map(len, listed))
    pairs = 0
    if described[0].grids:
        pairs = sum(len(pair.queries) * min(options.reranked, len(pair.database)) for pair in files)
        patches = [descriptors.picture(0) for descriptors in described]
        started = time.perf_counter()
        candidates = [*range(len(patches))] * 2
        rerank(patches[0], candidates, patches.__getitem__, options.patchweights2use, MATCHERS.find(options.matcher))
        seconds += (time.perf_counter() - started) / (2 * len(patches)) * pairs
    grid = described[0].grids[0] if described[0].grids else None
    map_size = (grid.map_height, grid.map_width) if grid else (0, 0)
    header = store_header(model, checkpoint, config)
    disk = estimate_bytes(header, map_size, sum(map(len, listed)))
    vectors = max(4 * model.output_dims * (len(pair.queries) + len(pair.database)) for pair in files)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    cache = min(cache_bytes(options.cache_gb), disk)
    return Estimate(disk, int(_BASE_GB * 1e9 + weights + 2 * vectors + cache), seconds)
