"""A run's rankings made ready for the result page."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import MATCHERS, Config
from patchnetvlad.evaluation import Evaluation, MatchingRun
from patchnetvlad.report.content import DrawnMatches, ReportContent, drawn_matches
from patchnetvlad.reranking import score_pair


def run_content(run: MatchingRun, evaluation: Evaluation) -> ReportContent:
    """What the page needs of a run, whose patches must still be open.

    Confidences compare queries with each other: the cosine of global descriptors (candidates of another method have
    none), and the spatial score of the best candidate, the one that match_two prints.
    """
    names = list(evaluation.stages)
    retrieved, scores = evaluation.rankings.retrieved, evaluation.rankings.scores
    confidence: dict[str, tuple[str, NDArray[np.float64]]] = {}
    stage_scores: dict[str, NDArray[np.floating]] = {names[0]: retrieved.scores}
    if run.given is None and retrieved.scores.shape[1]:
        cosines = 1 + retrieved.scores.astype(np.float64) / 2  # of unit vectors, from minus the squared distance
        stage_scores[names[0]] = cosines
        confidence[names[0]] = "cosine similarity", cosines[:, 0]
    if scores is not None:
        stage_scores[names[1]] = scores.fused
        if scores.per_scale.shape[1]:
            confidence[names[1]] = "spatial score", scores.of_best(run.config.feature_match.patchweights2use)
    return ReportContent(
        run.queries,
        run.database,
        evaluation.stages,
        stage_scores,
        confidence,
        run.ground_truth,
        _pair_matches(run),
        _settings(run.config),
        run.config.feature_extract.exif_rotation,
    )


def _pair_matches(run: MatchingRun) -> Callable[[int, int], Sequence[DrawnMatches]] | None:
    """Matches of a query with a database picture, by their rows, made when asked for; None for a global model."""
    queries, database = run.query_features.patches, run.database_features.patches
    if queries is None or database is None:
        return None
    matcher = MATCHERS.find(run.config.feature_match.matcher)

    def matches(row: int, index: int) -> Sequence[DrawnMatches]:
        query, reference = queries.patches(row, run.device), database.patches(index, run.device)
        return drawn_matches(score_pair(query, reference, matcher), query.grids, reference.grids)

    return matches


def _settings(config: Config) -> dict[str, str]:
    params, match, size = config.global_params, config.feature_match, config.feature_extract
    shown = {
        "weights": (config.find_checkpoint() or Path(params.resumepath)).name,
        "encoder": params.backbone,
        "pooling": params.pooling,
        "dimensions": str(params.num_pcs or "without WPCA"),
        "picture size": f"{size.imageresizew}×{size.imageresizeh}" if size.picture_size else "own",
    }
    if params.has_patches:
        shown |= {
            "matcher": match.matcher,
            "patch sizes": ", ".join(map(str, params.patch_sizes)),
            "strides": ", ".join(map(str, params.strides)),
            "weights of patch sizes": ", ".join(f"{weight:g}" for weight in match.patchweights2use),
        }
    return shown
