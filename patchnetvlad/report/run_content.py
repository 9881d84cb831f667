"""A run's rankings made ready for the result page."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.candidates import Candidates, RankingScores
from patchnetvlad.config import Config
from patchnetvlad.ground_truth import GroundTruth
from patchnetvlad.image_lists import ImageList
from patchnetvlad.patch_sources import PatchSource
from patchnetvlad.report.content import DrawnMatches, ReportContent, drawn_matches
from patchnetvlad.reranking import find_matcher, score_pair


def run_content(
    config: Config,
    queries: ImageList,
    database: ImageList,
    stages: Mapping[str, NDArray[np.int64]],
    retrieved: Candidates,
    scores: RankingScores | None,
    truth: GroundTruth | None,
    matches: Callable[[int, int], Sequence[DrawnMatches]] | None,
    unit: str,
) -> ReportContent:
    """What the page needs of a run; stages: the retrieval's ranking first, then that of the re-ranking if there is one.

    Confidences compare queries with each other: the cosine of global descriptors (candidates of another method have
    none), and the spatial score of the best candidate, the one that match_two prints.
    """
    names = list(stages)
    confidence: dict[str, tuple[str, NDArray[np.float64]]] = {}
    stage_scores: dict[str, NDArray[np.floating]] = {names[0]: retrieved.scores}
    if config.feature_match.pred_input_path is None and retrieved.scores.shape[1]:
        cosines = 1 + retrieved.scores.astype(np.float64) / 2  # of unit vectors, from minus the squared distance
        stage_scores[names[0]] = cosines
        confidence[names[0]] = "cosine similarity", cosines[:, 0]
    if scores is not None:
        stage_scores[names[1]] = scores.fused
        if scores.per_scale.shape[1]:
            weighted = scores.per_scale[:, 0] @ np.asarray(config.feature_match.patchweights2use)
            confidence[names[1]] = "spatial score", weighted
    upright = config.feature_extract.exif_rotation
    return ReportContent(
        queries, database, stages, stage_scores, confidence, truth, matches, _settings(config), unit, upright
    )


def pair_matches(
    config: Config, queries: PatchSource, database: PatchSource, device: torch.device
) -> Callable[[int, int], Sequence[DrawnMatches]]:
    """Matches of a query with a database picture, by their rows, made when asked for."""
    matcher = find_matcher(config.feature_match.matcher)

    def matches(row: int, index: int) -> Sequence[DrawnMatches]:
        query, reference = queries.patches(row).to(device), database.patches(index).to(device)
        return drawn_matches(score_pair(query, reference, matcher), query.grids, reference.grids)

    return matches


def _settings(config: Config) -> dict[str, str]:
    params, match, size = config.global_params, config.feature_match, config.feature_extract
    shown = {
        "weights": (config.find_checkpoint() or Path(params.resumepath)).name,
        "encoder": params.backbone,
        "pooling": params.pooling,
        "dimensions": str(params.num_pcs or "without WPCA"),
        "picture size": f"{size.imageresizew}×{size.imageresizeh}"
        if min(size.imageresizew, size.imageresizeh) > 0
        else "own",
    }
    if params.pooling == "patchnetvlad":
        shown |= {
            "matcher": match.matcher,
            "patch sizes": ", ".join(map(str, params.patch_sizes)),
            "strides": ", ".join(map(str, params.strides)),
            "weights of patch sizes": ", ".join(f"{weight:g}" for weight in match.patchweights2use),
        }
    return shown
