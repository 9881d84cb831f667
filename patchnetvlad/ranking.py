"""The one run from described queries and a database to rankings: retrieval, then re-ranking by patches."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.config import FeatureMatchConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.patch_rounding import products_are_exact
from patchnetvlad.patch_sources import DescribedPictures, PatchSource
from patchnetvlad.reranking import (
    MATCHERS,
    Matcher,
    RankingScores,
    Reranking,
    collect_scores,
    match_pair,
    reorder,
    rerank,
    with_similarities,
)
from patchnetvlad.retrieval import Candidates, DatabaseIndex

logger = logging.getLogger(__name__)

CANDIDATES_AT_ONCE = 25  # matched in one batch on an accelerator
_SHORTEST_ROUNDED = 256  # dimensions below which 8-bit products gain nothing


@dataclass(frozen=True, eq=False)
class Rankings:
    """Database pictures for every query.

    retrieved: by global descriptors; indices: int64 nQ×k, the same candidates, best first, those re-ranked before the
    others, −1 where there are fewer; scores: of the re-ranked ones, None for a purely global model.
    """

    retrieved: Candidates
    indices: NDArray[np.int64]
    scores: RankingScores | None


class Ranker:
    """[feature_match] at work on one database, for queries that come together or one after the other.

    The first pair decides whether patches are compared by 8-bit products; the ranking is the same either way.
    Raises UserError for a matcher or an index that there is not, and for a database that is no whole number of
    panoramas.
    """

    def __init__(self, options: FeatureMatchConfig, database: DescribedPictures, device: torch.device) -> None:
        self._options = options
        self._matcher = find_matcher(options.matcher)
        self._database = database
        self._device = device
        self._index: DatabaseIndex | None = None  # until the first query that is searched
        self._rounded: bool | None = None  # until the first pair decides
        whole, rest = divmod(len(database), options.panorama_cutouts)
        if rest:
            raise UserError(
                f"[feature_match] panorama_cutouts = {options.panorama_cutouts}: the database has {len(database)} "
                f"pictures, {whole} panoramas and {rest} more (cut-outs left out of the list, or another dataset?)"
            )

    def rank(
        self,
        queries: DescribedPictures,
        given: Candidates | None = None,
        at_least: int = 0,
        progress: bool = False,
    ) -> Rankings:
        """Retrieve candidates of every query and re-rank the first of them.

        given: candidates of another method, in place of the search; at_least: re-rank so many where [feature_match]
        says fewer.
        """
        top = max(self._options.reranked, at_least)
        depth = max(self._options.retrieved, at_least)
        if given is None:
            retrieved = self._retrieve(queries, depth)
        else:
            retrieved = Candidates(given.indices[:, :depth], given.scores[:, :depth])
        if queries.patches is None or self._database.patches is None:
            return Rankings(retrieved, retrieved.indices, None)
        heads = [row[row >= 0].tolist() for row in retrieved.indices[:, :top]]
        rerankings, patch_sizes = self._rerank_all(queries.patches, self._database.patches, heads, progress)
        if self._options.global_weight:
            near = [self._database.global_[head] @ query for head, query in zip(heads, queries.global_, strict=True)]
            weight = self._options.global_weight
            rerankings = [with_similarities(*pair, weight) for pair in zip(rerankings, near, strict=True)]
        rows = [reorder(row, result.order) for row, result in zip(retrieved.indices, rerankings, strict=True)]
        indices = np.stack(rows) if rows else retrieved.indices
        scores = collect_scores(retrieved.indices, rerankings, patch_sizes, self._options.matcher)
        return Rankings(retrieved, indices, scores)

    def _retrieve(self, queries: DescribedPictures, depth: int) -> Candidates:
        started = time.perf_counter()
        if self._index is None:
            self._index = DatabaseIndex(self._database.global_, self._options.index, self._device)
        found = self._index.search(queries.global_, depth, self._options.panorama_cutouts)
        seconds = time.perf_counter() - started
        logger.info("retrieval: %d queries against %d pictures in %.2f s", len(queries), len(self._database), seconds)
        return found

    def _rerank_all(
        self, queries: PatchSource, database: PatchSource, heads: Sequence[Sequence[int]], progress: bool
    ) -> tuple[list[Reranking], tuple[int, ...]]:
        """Re-rank the candidates of every query, database rows in retrieval order; and the patch sizes."""
        first = next((row for row, head in enumerate(heads) if head), None)
        if first is not None:  # before reading ahead, which would be in vain where 8 bits are chosen
            self._choose_similarity(queries.patches(first).to(self._device), database, heads[first][0])
        database.prefetch(chain.from_iterable(heads))
        queries.prefetch(range(len(heads)))
        rerankings = []
        patch_sizes: tuple[int, ...] = ()
        started = time.perf_counter()
        for row, head in enumerate(tqdm(heads, "Re-ranking", unit="query", disable=not progress)):
            query = queries.patches(row).to(self._device)
            patch_sizes = tuple(grid.patch_size for grid in query.grids)
            rerankings.append(self._rerank(query, database, head))
        pairs = sum(map(len, heads))
        seconds = time.perf_counter() - started
        logger.info("re-ranking: %d pairs in %.1f s (%.1f ms a pair)", pairs, seconds, 1000 * seconds / max(1, pairs))
        return rerankings, patch_sizes

    def _rerank(self, query: PatchFeatures, database: PatchSource, head: Sequence[int]) -> Reranking:
        if self._rounded:
            query = query.round_as("query")
        batch_size = 1 if self._device.type == "cpu" else CANDIDATES_AT_ONCE
        features = (database.patches(index) for index in head)
        return rerank(query, features, self._options.patchweights2use, self._matcher, batch_size)

    def _choose_similarity(self, query: PatchFeatures, database: PatchSource, candidate: int) -> None:
        """Let this pair decide, unless one has; the database's pictures are read again where 8 bits are chosen."""
        if self._rounded is None:
            reference = database.patches(candidate).to(self._device)
            self._rounded = uses_rounding(self._options.similarity, query, reference)
            if self._rounded:
                logger.info("similarities by 8-bit products, checked in float32")
                database.round_references()


def find_matcher(name: str) -> Matcher:
    """A matcher by its name in the table; raises UserError for another name."""
    if name not in MATCHERS:
        raise UserError(f"[feature_match] matcher = {name}: expected {' or '.join(MATCHERS)}")
    return MATCHERS[name]


def uses_rounding(similarity: str, query: PatchFeatures, reference: PatchFeatures) -> bool:
    """Whether to match by 8-bit products; "auto" tries both ways on these two pictures, on this machine."""
    if similarity == "float32":
        return False
    possible = query.descriptors[0].device.type == "cpu" and products_are_exact()
    if similarity == "int8" and not possible:
        raise UserError(
            "[feature_match] similarity = int8: this device does not multiply 8-bit numbers exactly (auto takes what "
            "suits it)"
        )
    if similarity == "int8":
        return True
    if not possible or query.descriptors[0].shape[1] < _SHORTEST_ROUNDED:
        return False
    rounded = query.round_as("query"), reference.round_as("reference")
    seconds = {True: math.inf, False: math.inf}
    for _ in range(3):
        for way, (first, second) in ((True, rounded), (False, (query, reference))):
            started = time.perf_counter()
            match_pair(first, second)
            seconds[way] = min(seconds[way], time.perf_counter() - started)
    return seconds[True] < seconds[False]
