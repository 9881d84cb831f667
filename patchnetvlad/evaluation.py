"""A matching run: lists, features and ground truth, ranked, held against the truth, and written for others."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.candidates import Candidates
from patchnetvlad.config import BUILT_INDEX, MATCHERS, Config
from patchnetvlad.errors import UserError
from patchnetvlad.extraction import expected_header, tell_precision
from patchnetvlad.ground_truth import GroundTruth, read_ground_truth
from patchnetvlad.image_lists import ImageList, read_image_list
from patchnetvlad.images import require_readable
from patchnetvlad.judging import Judged, Measures, judge, measure
from patchnetvlad.judging_files import EvaluationProtocol, measure_lines, measure_record, write_json, write_judged
from patchnetvlad.model import PlaceModel
from patchnetvlad.paths import require_file
from patchnetvlad.ranking import Ranker, Rankings, RerankAll, check_panoramas
from patchnetvlad.recall import Recall, constant_shift
from patchnetvlad.result_files import (
    FORMATS,
    RERANKING,
    RETRIEVAL,
    WRITTEN,
    check_new_city,
    name_rankings,
    read_predictions,
    write_msls_predictions,
    write_recalls,
    write_scores,
)
from patchnetvlad.retrieval import looks_like_cutouts
from patchnetvlad.search_index import IndexRecord, build_index, open_index
from patchnetvlad.store.cache.disk_cache import FOLDER_NAME, DiskCache
from patchnetvlad.store.cache.memory_cache import cache_bytes
from patchnetvlad.store.manifest import StoreHeader, has_manifest
from patchnetvlad.store.reading.feature_store import FeatureStore
from patchnetvlad.store.reading.patch_sources import DescribedPictures, OnDemandPatches
from patchnetvlad.store.reading.spot_check import check_by_pictures
from patchnetvlad.weights import load_model

logger = logging.getLogger(__name__)

_QUERY_SHARE = 8  # of the memory for patches an eighth is for those of the queries, which are read once


@dataclass(frozen=True)
class Sources:
    """What a run compares: two picture lists, their feature folders, and optionally who truly matches."""

    root: Path
    query_list: Path
    index_list: Path
    query_features: Path
    index_features: Path
    ground_truth: Path | None = None
    radius: float | None = None  # takes the place of the ground truth's posDistThr
    unit: str | None = None  # takes the place of the ground truth's, of which published ones have none


@dataclass(frozen=True, eq=False)
class MatchingRun:
    """What a run compares, opened and found to fit together; given: candidates of another method, in place of the
    search; model: describes patches when they are asked for, None where they are read."""

    config: Config
    queries: ImageList
    database: ImageList
    query_features: DescribedPictures
    database_features: DescribedPictures
    ground_truth: GroundTruth | None
    given: Candidates | None
    device: torch.device
    model: PlaceModel | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Rankings of a run. stages: database indices nQ×k, best first, −1 where there are fewer, under the stage's name;
    judged and measures: the same stages held against the ground truth, empty without it."""

    queries: ImageList
    database: ImageList
    rankings: Rankings
    stages: dict[str, NDArray[np.int64]]
    ground_truth: GroundTruth | None
    judged: dict[str, Judged]
    measures: dict[str, Measures]

    @property
    def recalls(self) -> dict[str, Recall]:
        """Recall of every stage, empty without ground truth."""
        return {stage: measured.recall for stage, measured in self.measures.items()}

    @property
    def protocol(self) -> EvaluationProtocol | None:
        """What was compared; None without ground truth."""
        truth = self.ground_truth
        return (
            None
            if truth is None
            else EvaluationProtocol(len(truth.utm_query), len(truth.utm_database), truth.radius, truth.unit)
        )

    def lines(self, details: bool = False) -> list[str]:
        """The measures as a table for people; empty without ground truth."""
        return [] if self.protocol is None else measure_lines(self.protocol, self.measures, details)


@contextmanager
def open_run(
    config: Config,
    sources: Sources,
    device: torch.device,
    progress: bool = False,
    formats: Sequence[str] = WRITTEN,
    city_file: Path | None = None,
    shared: bool = False,
) -> Iterator[MatchingRun]:
    """Open lists, features and ground truth; patches can be read as long as the context lasts.

    formats, city_file: what `write_results` and `add_city` will write, whose names are checked now; shared: the
    queries will be shared out among several processes.
    Raises UserError for whatever does not fit together.
    """
    config.check_matching()
    if not shared:
        config.check_one_process("matching")
    MATCHERS.find(config.feature_match.matcher)
    queries = read_image_list(sources.query_list, sources.root)
    database = read_image_list(sources.index_list, sources.root)
    _check_names(queries, database, formats, city_file)
    truth = _ground_truth(sources, config, queries, database)
    given = _given_candidates(config, queries, database)
    if config.describes_on_demand:
        for pictures in (queries, database):
            require_readable(pictures.paths, pictures.source, config.global_params.loading_threads, progress)

    @lru_cache(maxsize=1)
    def find_model() -> PlaceModel:
        model = load_model(config)[0].to(device)
        tell_precision(model)
        return model

    for_queries, for_database = _told_shares(config)
    folders = sources.query_features, sources.index_features
    with (
        open_features(config, queries, folders[0], for_queries, find_model, folders[1]) as query_features,
        open_features(config, database, folders[1], for_database, find_model, folders[0]) as database_features,
    ):
        if isinstance(query_features.patches, FeatureStore) and query_features.patches.coded:
            raise UserError(
                f"{sources.query_features}: holds codes, and queries are compared as they are (extract them with "
                "feature_extract.py --queries)"
            )
        if given is None:
            database_features = with_built_index(config, database, database_features)
        model = find_model() if config.describes_on_demand else None
        yield MatchingRun(config, queries, database, query_features, database_features, truth, given, device, model)


def _told_shares(config: Config) -> tuple[int, int]:
    """`memory_shares` of a configuration; the log says them where there are patches."""
    shares = memory_shares(config.feature_match.cache_gb)
    if config.global_params.has_patches:
        source = "half of what is available" if config.feature_match.cache_gb is None else "as configured"
        logger.info("memory for patches: %.3g GB (cache_gb, %s)", sum(shares) / 1e9, source)
    return shares


def memory_shares(cache_gb: float | None, workers: int = 1) -> tuple[int, int]:
    """Bytes for the patches of the queries and of the database; workers: how many share this machine's memory."""
    memory = cache_bytes(cache_gb) // workers
    return memory // _QUERY_SHARE, memory - memory // _QUERY_SHARE


def _check_names(queries: ImageList, database: ImageList, formats: Sequence[str], city_file: Path | None) -> None:
    """Raises UserError for names that the files to be written cannot hold."""
    for form in (FORMATS[name] for name in formats):
        form.check(queries.source, form.names(queries), ())
        form.check(database.source, (), form.names(database))
    if city_file is not None:
        check_new_city(city_file, queries.names, database.names)


@contextmanager
def open_features(
    config: Config,
    pictures: ImageList,
    folder: Path,
    memory: int,
    find_model: Callable[[], PlaceModel],
    beside: Path | None = None,
    checked: StoreHeader | None = None,
) -> Iterator[DescribedPictures]:
    """Open a list's feature folder, checked against the configuration, or by describing two pictures again.

    memory: bytes that patch descriptors may take; find_model: gives the model, and is asked where [feature_match]
    local_features = on_demand, or where the folder has no manifest and the weights are at hand; beside: the folder that
    this one is compared with, None for pictures that are described now; checked: what the configuration makes, where
    another process has held the folder against it and its pictures.
    """
    expected = checked or expected_header(config)
    if config.describes_on_demand:
        expected = replace(expected, patch_sizes=(), strides=())
    size = config.feature_extract.picture_size
    map_size = expected.geometry.map_size(*size) if size else None
    with FeatureStore.open(folder, pictures, expected, map_size=map_size, cache_gb=memory / 1e9) as store:
        if checked is None and not has_manifest(folder):
            if not config.describes_on_demand:
                _tell_mixed(folder, beside)
            check_by_pictures(folder, pictures, store.global_, config, find_model)
        if not config.global_params.has_patches:
            yield DescribedPictures(store.global_, None)
        elif config.describes_on_demand:
            room = int(1e9 * config.feature_match.disk_cache_gb)
            made_by = repr(expected_header(config))
            kept = DiskCache(folder / FOLDER_NAME, room, made_by) if room else None
            patches = OnDemandPatches(find_model(), pictures, config.feature_extract, memory, kept)
            yield DescribedPictures(store.global_, patches)
        else:
            yield DescribedPictures(store.global_, store)


def _tell_mixed(folder: Path, beside: Path | None) -> None:
    if beside is not None and not has_manifest(beside):
        return
    logger.warning(
        "%s: has no manifest.jsonl, and %s: patches that the published code described are not quite those of this "
        "program (docs/migrate.md), so extract both, or neither",
        folder,
        "it is compared with pictures described now" if beside is None else f"{beside} has one",
    )


def make_search_index(
    config: Config,
    index_list: Path,
    root: Path,
    features: Path,
    path: Path,
    factory: str | None = None,
    shards: int = 1,
    neighbours: int = 100,
    recall: float = 0.99,
    queries: tuple[Path, Path] | None = None,
) -> IndexRecord:
    """Make the search index of a list's feature folder, as `build_index` says; returns what it is.

    queries: the list and the features of queries, to tune the search with.
    """
    pictures = read_image_list(index_list, root)
    expected = replace(expected_header(config), patch_sizes=(), strides=())
    asked = None
    if queries is not None:
        with FeatureStore.open(queries[1], read_image_list(queries[0], root), expected) as store:
            asked = store.global_
    with FeatureStore.open(features, pictures, expected) as store:
        return build_index(store.global_, pictures.names, path, factory, shards, neighbours, recall, asked).record


def with_built_index(config: Config, pictures: ImageList, features: DescribedPictures) -> DescribedPictures:
    """A database with the index file that [feature_match] index names, if it names one."""
    named = config.feature_match.index
    if not named.endswith(BUILT_INDEX):
        return features
    path = require_file(named, "dataset_gt_files", config.path)
    return replace(features, index=open_index(path, features.global_, pictures.names))


def evaluate(run: MatchingRun, progress: bool = False, rerank_all: RerankAll | None = None) -> Evaluation:
    """Rank the database for every query, and hold the rankings against the ground truth where it is given.

    rerank_all: shares the re-ranking out among several processes.
    """
    options = run.config.feature_match
    ranker = Ranker(options, run.database_features, run.device)
    rankings = ranker.rank(run.query_features, run.given, progress=progress, rerank_all=rerank_all)
    stages = {RETRIEVAL: rankings.retrieved.indices}
    if rankings.scores is not None:
        stages[RERANKING] = rankings.indices
    judged = {} if run.ground_truth is None else _judge(run, run.ground_truth, rankings, stages)
    measures = {stage: measure(stage_judged, options.n_values_all) for stage, stage_judged in judged.items()}
    if run.ground_truth is not None and run.ground_truth.unit == "frames":
        _tell_shift(run.ground_truth, rankings.indices)
    return Evaluation(run.queries, run.database, rankings, stages, run.ground_truth, judged, measures)


def write_results(evaluation: Evaluation, results: Path, formats: Sequence[str] = WRITTEN) -> tuple[Path, ...]:
    """Write rankings, scores, and with ground truth recalls, into a folder; returns the files.

    formats: of the rankings, names in FORMATS. Raises UserError for names that a format cannot hold.
    """
    files = []
    queries, database = evaluation.queries, evaluation.database
    for stage, indices in evaluation.stages.items():
        for form in (FORMATS[name] for name in formats):
            files.append(results / f"{stage}_{form.ending}")
            form.write(files[-1], name_rankings(form.names(queries), form.names(database), indices))
    if evaluation.rankings.scores is not None:
        files.append(results / "scores.npz")
        write_scores(files[-1], evaluation.rankings.scores, queries.names, database.names)
    if evaluation.protocol is not None:
        measured = [results / name for name in ("recalls.txt", "recalls.json", "judged.npz")]
        write_recalls(measured[0], evaluation.recalls)
        write_json(measured[1], measure_record(evaluation.protocol, evaluation.measures))
        write_judged(measured[2], evaluation.protocol, evaluation.judged)
        files += measured
    return tuple(files)


def add_city(evaluation: Evaluation, path: Path) -> None:
    """Add a run's final rankings to a file of MSLS predictions, in which other cities may stand already."""
    final = evaluation.rankings.indices
    write_msls_predictions(path, name_rankings(evaluation.queries.names, evaluation.database.names, final), append=True)


def _judge(
    run: MatchingRun, truth: GroundTruth, rankings: Rankings, stages: dict[str, NDArray[np.int64]]
) -> dict[str, Judged]:
    """Every stage held against the ground truth; its scores must be comparable between queries.

    The similarity is, and the weighted sum of the raw spatial scores; their z-scores are not, nor are 1/rank of given
    predictions.
    """
    comparable: dict[str, NDArray[np.floating] | None] = {}
    if run.given is None and rankings.retrieved.scores.shape[1]:
        comparable[RETRIEVAL] = rankings.retrieved.scores[:, 0]
    if rankings.scores is not None and rankings.scores.per_scale.shape[1]:
        comparable[RERANKING] = rankings.scores.of_best(run.config.feature_match.patchweights2use)
    positives = truth.positives()
    return {stage: judge(indices, positives, comparable.get(stage)) for stage, indices in stages.items()}


def _ground_truth(sources: Sources, config: Config, queries: ImageList, database: ImageList) -> GroundTruth | None:
    if sources.ground_truth is None:
        return None
    truth = read_ground_truth(sources.ground_truth, queries.names, database.names, sources.radius, sources.unit)
    check_panoramas(config.feature_match.panorama_cutouts, len(database), truth.utm_database)
    if config.feature_match.panorama_cutouts == 1 and looks_like_cutouts(truth.utm_database):
        logger.warning(
            "%s: the database looks like 12 cut-outs of each panorama; Tokyo 24/7 is evaluated with "
            "--set feature_match.panorama_cutouts=12",
            sources.ground_truth,
        )
    return truth


def _tell_shift(truth: GroundTruth, rankings: NDArray[np.int64]) -> None:
    """Warn when a constant between the frame numbers of both drives would explain the rankings better."""
    shift = constant_shift(rankings, truth.utm_query[:, 0], truth.utm_database[:, 0], truth.radius)
    if shift is not None and shift.helps:
        logger.warning(
            "frame N of the queries seems to be where frame N %s %d of the database is, as the ground truth numbers "
            "them: Recall@1 is %.1f %%, and with this shift %.1f %% (if that is so, make it with an --offset, or "
            "--frames of recognize, changed by %+d)",
            "+" if shift.frames > 0 else "-",
            abs(shift.frames),
            100 * shift.found_before,
            100 * shift.found_after,
            shift.frames,
        )


def _given_candidates(config: Config, queries: ImageList, database: ImageList) -> Candidates | None:
    if config.feature_match.pred_input_path is None:
        return None
    path = require_file(config.feature_match.pred_input_path, "dataset_gt_files", config.path)
    return read_predictions(path, queries.names, database.names)
