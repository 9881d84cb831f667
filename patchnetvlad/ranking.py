"""Re-rank the candidates of every query of a run, from wherever their patches come."""

import logging
import time
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.candidates import RankingScores
from patchnetvlad.config import Config
from patchnetvlad.patch_sources import PatchSource
from patchnetvlad.reranker import Reranker
from patchnetvlad.reranking import collect_scores, reorder

logger = logging.getLogger(__name__)


def rerank_queries(
    config: Config,
    retrieved: NDArray[np.int64],
    queries: PatchSource,
    database: PatchSource,
    device: torch.device,
    progress: bool = False,
) -> tuple[NDArray[np.int64], RankingScores]:
    """Rankings nQ×k in which the first rerank_top candidates of every query are re-ranked, and their scores.

    retrieved: nQ×k database rows, best first, −1 where there are fewer.
    """
    options = config.feature_match
    reranker = Reranker(options, database)
    top = options.rerank_top or max(options.n_values_all)
    heads = [row[row >= 0].tolist() for row in retrieved[:, :top]]
    first = next((row for row, head in enumerate(heads) if head), None)
    if first is not None:  # before reading ahead, which would be in vain where 8 bits are chosen
        reranker.choose_similarity(queries.patches(first).to(device), heads[first][0])
    database.prefetch(chain.from_iterable(heads))
    queries.prefetch(range(len(heads)))
    rerankings = []
    started = time.perf_counter()
    for row, head in enumerate(tqdm(heads, "Re-ranking", unit="query", disable=not progress)):
        rerankings.append(reranker.rerank(queries.patches(row).to(device), head))
    pairs = sum(map(len, heads))
    seconds = time.perf_counter() - started
    logger.info("re-ranking: %d pairs in %.1f s (%.1f ms a pair)", pairs, seconds, 1000 * seconds / max(1, pairs))
    ranking = np.stack([reorder(row, result.order) for row, result in zip(retrieved, rerankings, strict=True)])
    return ranking, collect_scores(retrieved, rerankings, config.global_params.patch_sizes, options.matcher)
