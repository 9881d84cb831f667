"""Retrieve, re-rank and score: one run from two feature folders to rankings, recalls and result files."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.extraction import expected_header
from patchnetvlad.feature_store import FeatureStore
from patchnetvlad.ground_truth import GroundTruth, read_ground_truth
from patchnetvlad.image_lists import ImageList, read_image_list
from patchnetvlad.images import require_readable
from patchnetvlad.measure_files import Protocol, measure_lines, measure_record, write_json, write_judged
from patchnetvlad.measures import Judged, Measures, judge, measure
from patchnetvlad.patch_sources import OnDemandPatches, PatchSource
from patchnetvlad.paths import require_file
from patchnetvlad.ranking import rerank_queries
from patchnetvlad.recall import Recall
from patchnetvlad.report.page import write_report
from patchnetvlad.report.run_content import pair_matches, run_content
from patchnetvlad.reranking import RankingScores, find_matcher
from patchnetvlad.result_files import (
    Ranking,
    name_rankings,
    read_predictions,
    write_hloc_pairs,
    write_kapture_pairs,
    write_msls_predictions,
    write_recalls,
    write_scores,
)
from patchnetvlad.retrieval import Candidates, looks_like_cutouts, retrieve
from patchnetvlad.search_index import ENDING as INDEX_ENDING
from patchnetvlad.search_index import SearchIndex, open_index
from patchnetvlad.weights import load_model

logger = logging.getLogger(__name__)

RETRIEVAL, RERANKING = "NetVLAD", "PatchNetVLAD"  # names of the two stages in result files
FORMATS: dict[str, tuple[str, Callable[[Path, list[Ranking]], None]]] = {  # format: end of the file name, writer
    "kapture": ("predictions.txt", write_kapture_pairs),
    "hloc": ("pairs_hloc.txt", write_hloc_pairs),
    "msls": ("predictions_msls.txt", write_msls_predictions),
}


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


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Rankings of a run. stages: database indices nQ×k, best first, −1 where there are fewer, under the stage's name;
    measures: the same stages, empty without ground truth; files: what was written."""

    queries: ImageList
    database: ImageList
    retrieved: Candidates
    scores: RankingScores | None
    stages: dict[str, NDArray[np.int64]]
    ground_truth: GroundTruth | None
    measures: dict[str, Measures]
    files: tuple[Path, ...]

    @property
    def recalls(self) -> dict[str, Recall]:
        """Recall of every stage, empty without ground truth."""
        return {stage: measured.recall for stage, measured in self.measures.items()}

    def protocol(self) -> Protocol:
        """What was compared; needs ground truth."""
        assert self.ground_truth is not None
        return _protocol(self.ground_truth)

    def lines(self, details: bool = False) -> list[str]:
        """The measures as a table for people; empty without ground truth."""
        return measure_lines(self.protocol(), self.measures, details) if self.measures else []


def evaluate(
    config: Config,
    sources: Sources,
    results: Path,
    device: torch.device,
    formats: Sequence[str] = ("kapture",),
    progress: bool = False,
    report_unit: str | None = None,
) -> Evaluation:
    """Rank the database for every query, write the rankings, and score them where the ground truth is given.

    results: folder for the files; formats: names in FORMATS; report_unit: write report.html too, which shows distances
    in this unit. Raises UserError for whatever does not fit together.
    """
    config.check_matching()
    find_matcher(config.feature_match.matcher)
    queries = read_image_list(sources.query_list, sources.root)
    database = read_image_list(sources.index_list, sources.root)
    truth = _ground_truth(sources, config, queries, database)
    query_store = open_store(config, queries, sources.query_features, config.feature_match.cache_gb / 8)
    index_store = open_store(config, database, sources.index_features, config.feature_match.cache_gb)
    with query_store, index_store:
        retrieved = _retrieve(config, queries, database, query_store, index_store, device)
        stages = {RETRIEVAL: retrieved.indices}
        scores = None
        matches = None
        if config.global_params.pooling == "patchnetvlad":
            query_patches: PatchSource = query_store
            index_patches: PatchSource = index_store
            if config.feature_match.local_features == "on_demand":
                query_patches, index_patches = _on_demand(config, queries, database, device, progress)
            stages[RERANKING], scores = rerank_queries(
                config, retrieved.indices, query_patches, index_patches, device, progress
            )
            if report_unit is not None:
                matches = pair_matches(config, query_patches, index_patches, device)
        files = _write(results, queries, database, stages, scores, formats)
        if report_unit is not None:
            files += (results / "report.html",)
            content = run_content(config, queries, database, stages, retrieved, scores, truth, matches, report_unit)
            size = write_report(files[-1], content, progress)
            logger.info("report: %s (%.1f MB)", files[-1], size / 1e6)
    judged = {} if truth is None else _judge(config, truth, stages, retrieved, scores)
    measures = {stage: measure(part, config.feature_match.n_values_all) for stage, part in judged.items()}
    if truth is not None:
        files += _write_measures(results, _protocol(truth), judged, measures)
    return Evaluation(queries, database, retrieved, scores, stages, truth, measures, files)


def add_city(evaluation: Evaluation, path: Path) -> None:
    """Add a run's final rankings to a file of MSLS predictions, in which other cities may stand already."""
    final = list(evaluation.stages.values())[-1]
    write_msls_predictions(path, name_rankings(evaluation.queries.names, evaluation.database.names, final), append=True)


def _judge(
    config: Config,
    truth: GroundTruth,
    stages: dict[str, NDArray[np.int64]],
    retrieved: Candidates,
    scores: RankingScores | None,
) -> dict[str, Judged]:
    """Every stage held against the ground truth; its scores must be comparable between queries.

    The similarity is, and the weighted sum of the raw spatial scores; their z-scores are not, nor are 1/rank of given
    predictions.
    """
    comparable: dict[str, NDArray[np.floating] | None] = {}
    if config.feature_match.pred_input_path is None and retrieved.scores.shape[1]:
        comparable[RETRIEVAL] = retrieved.scores[:, 0]
    if scores is not None and scores.per_scale.shape[1]:
        comparable[RERANKING] = scores.per_scale[:, 0] @ np.array(config.feature_match.patchweights2use)
    positives = truth.positives()
    return {stage: judge(indices, positives, comparable.get(stage)) for stage, indices in stages.items()}


def _protocol(truth: GroundTruth) -> Protocol:
    return Protocol(len(truth.utm_query), len(truth.utm_database), truth.radius)


def _ground_truth(sources: Sources, config: Config, queries: ImageList, database: ImageList) -> GroundTruth | None:
    if sources.ground_truth is None:
        return None
    truth = read_ground_truth(sources.ground_truth, len(queries), len(database), sources.radius)
    if config.feature_match.panorama_cutouts == 1 and looks_like_cutouts(truth.utm_database):
        logger.warning(
            "%s: the database looks like 12 cut-outs of each panorama; Tokyo 24/7 is evaluated with "
            "--set feature_match.panorama_cutouts=12",
            sources.ground_truth,
        )
    return truth


def open_store(config: Config, pictures: ImageList, folder: Path, cache_gb: float) -> FeatureStore:
    """Open a list's feature folder, checked against the configuration."""
    expected = expected_header(config, pictures, folder)
    if config.feature_match.local_features == "on_demand":
        expected = replace(expected, patch_sizes=(), strides=())
    height, width = config.feature_extract.imageresizeh, config.feature_extract.imageresizew
    stride = expected.geometry.stride
    map_size = (height // stride, width // stride) if min(height, width) > 0 else None
    return FeatureStore.open(
        folder, pictures.names, pictures.feature_names, expected, map_size=map_size, cache_gb=cache_gb
    )


def open_global_store(config: Config, pictures: ImageList, folder: Path) -> FeatureStore:
    """The same for global descriptors alone."""
    expected = replace(expected_header(config, pictures, folder), patch_sizes=(), strides=())
    return FeatureStore.open(folder, pictures.names, pictures.feature_names, expected)


def _retrieve(
    config: Config,
    queries: ImageList,
    database: ImageList,
    query_store: FeatureStore,
    index_store: FeatureStore,
    device: torch.device,
) -> Candidates:
    options = config.feature_match
    count = max(*options.n_values_all, options.rerank_top or 0, 1)
    if options.pred_input_path is not None:
        path = require_file(options.pred_input_path, "dataset_gt_files", config.path)
        given = read_predictions(path, queries.names, database.names)
        return Candidates(given.indices[:, :count], given.scores[:, :count])
    index: str | SearchIndex = options.index
    if options.index.endswith(INDEX_ENDING):
        index = open_index(
            require_file(options.index, "dataset_gt_files", config.path), index_store.global_, database.names
        )
    started = time.perf_counter()
    found = retrieve(query_store.global_, index_store.global_, count, index, device, options.panorama_cutouts)
    logger.info(
        "retrieval: %d queries against %d pictures in %.2f s",
        len(queries),
        len(database),
        time.perf_counter() - started,
    )
    return found


def _on_demand(
    config: Config, queries: ImageList, database: ImageList, device: torch.device, progress: bool
) -> tuple[PatchSource, PatchSource]:
    for pictures in (queries, database):
        require_readable(pictures.paths, pictures.source, progress=progress)
    model, _ = load_model(config)
    model.to(device)
    options, size = config.feature_match, config.feature_extract
    return (
        OnDemandPatches(model, queries, size, options.cache_gb / 8),
        OnDemandPatches(model, database, size, options.cache_gb),
    )


def _write(
    results: Path,
    queries: ImageList,
    database: ImageList,
    stages: dict[str, NDArray[np.int64]],
    scores: RankingScores | None,
    formats: Sequence[str],
) -> tuple[Path, ...]:
    files = []
    for stage, indices in stages.items():
        rankings = name_rankings(queries.names, database.names, indices)
        for name in formats:
            ending, write = FORMATS[name]
            files.append(results / f"{stage}_{ending}")
            write(files[-1], rankings)
    if scores is not None:
        files.append(results / "scores.npz")
        write_scores(files[-1], scores, queries.names, database.names)
    return tuple(files)


def _write_measures(
    results: Path, protocol: Protocol, judged: dict[str, Judged], measures: dict[str, Measures]
) -> tuple[Path, ...]:
    files = tuple(results / name for name in ("recalls.txt", "recalls.json", "judged.npz"))
    write_recalls(files[0], {stage: measured.recall for stage, measured in measures.items()})
    write_json(files[1], measure_record(protocol, measures))
    write_judged(files[2], protocol, judged)
    return files
