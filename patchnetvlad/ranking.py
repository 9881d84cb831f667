"""The one run from described queries and a database to rankings: retrieval, then re-ranking by patches."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.candidates import Candidates, RankingScores
from patchnetvlad.config import BUILT_INDEX, MATCHERS, FeatureMatchConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.devices import MATCHING_MEMORY, device_room, memory_errors
from patchnetvlad.errors import UserError
from patchnetvlad.matching import WAYS
from patchnetvlad.reranking import (
    Reranking,
    collect_scores,
    reorder,
    rerank,
    with_similarities,
)
from patchnetvlad.retrieval import DatabaseIndex
from patchnetvlad.store.reading.patch_sources import DescribedPictures, PatchesOnDevice, PatchSource
from patchnetvlad.workers import Workers, choose_way

logger = logging.getLogger(__name__)

Reranked = tuple[list[Reranking], tuple[int, ...]]
"""Queries' candidates re-ranked, in the order of the queries, and the patch sizes."""

RerankAll = Callable[[Sequence[Sequence[int]]], Reranked]
"""Re-ranks the candidates of all queries, given for each as database rows in retrieval order."""

CANDIDATES_AT_ONCE = 25  # matched in one batch on an accelerator
MOST_A_THREAD = 4  # candidates that a thread is given at a time: with one, handing over takes as long as small pairs do


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
        self._matcher = MATCHERS.find(options.matcher)
        self._database = database
        self._device = device
        self._workers = Workers()
        self._index: DatabaseIndex | None = None  # until the first query that is searched
        self._on_device: PatchesOnDevice | None = None  # until pictures are re-ranked on an accelerator
        self._rounded: bool | None = None  # until the first pair decides
        if options.index.endswith(BUILT_INDEX) and database.index is None:
            raise UserError(
                f"[feature_match] index = {options.index}: was made from a feature folder, and these pictures are not "
                "read from one (Flat, or a factory string of faiss)"
            )
        check_panoramas(options.panorama_cutouts, len(database))

    @memory_errors(MATCHING_MEMORY)
    def rank(
        self,
        queries: DescribedPictures,
        given: Candidates | None = None,
        at_least: int = 0,
        progress: bool = False,
        rerank_all: RerankAll | None = None,
    ) -> Rankings:
        """Retrieve candidates of every query and re-rank the first of them.

        given: candidates of another method, in place of the search; at_least: re-rank so many where [feature_match]
        says fewer; rerank_all: shares the re-ranking out among several processes.
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
        if rerank_all is None:
            rerankings, patch_sizes = self.rerank(queries, range(len(heads)), heads, progress)
        else:
            rerankings, patch_sizes = rerank_all(heads)
        rows = [reorder(row, reranking.order) for row, reranking in zip(retrieved.indices, rerankings, strict=True)]
        indices = np.stack(rows) if rows else retrieved.indices
        scores = collect_scores(retrieved.indices, rerankings, patch_sizes, self._options.matcher)
        return Rankings(retrieved, indices, scores)

    @memory_errors(MATCHING_MEMORY)
    def rerank(
        self, queries: DescribedPictures, rows: Sequence[int], heads: Sequence[Sequence[int]], progress: bool = False
    ) -> Reranked:
        """Re-rank the candidates of some queries: rows of these, and for each its database rows in retrieval order.

        What comes out for a query does not depend on the others. Both sides need their patches.
        """
        if queries.patches is None or self._database.patches is None:
            raise ValueError("pictures without patches cannot be re-ranked")
        rerankings, patch_sizes = self._rerank_all(queries.patches, self._database.patches, rows, heads, progress)
        if self._options.global_weight:
            near = [self._database.global_[head] @ queries.global_[row] for row, head in zip(rows, heads, strict=True)]
            weight = self._options.global_weight
            rerankings = [with_similarities(*pair, weight) for pair in zip(rerankings, near, strict=True)]
        _log_reads(self._database.patches, sum(map(len, heads)))
        return rerankings, patch_sizes

    def _retrieve(self, queries: DescribedPictures, depth: int) -> Candidates:
        started = time.perf_counter()
        if self._index is None:
            index = self._database.index or self._options.index
            self._index = DatabaseIndex(self._database.global_, index, self._device, device_room(self._device))
        candidates = self._index.search(queries.global_, depth, self._options.panorama_cutouts)
        seconds = time.perf_counter() - started
        logger.info("retrieval: %d queries against %d pictures in %.2f s", len(queries), len(self._database), seconds)
        return candidates

    def _rerank_all(
        self,
        queries: PatchSource,
        database: PatchSource,
        rows: Sequence[int],
        heads: Sequence[Sequence[int]],
        progress: bool,
    ) -> Reranked:
        first = next((place for place, head in enumerate(heads) if head), None)
        if first is not None:  # before reading ahead, which would be in vain where 8 bits are chosen
            self._choose_similarity(queries.patches(rows[first], self._device), database, heads[first][0])
        sizes = {index: database.picture_bytes(index) for index in set(chain.from_iterable(heads))}
        _check_room(heads, sizes, database.cache_bytes)
        order = visiting_order(heads, sizes, database.cache_bytes)
        database.prefetch(chain.from_iterable(heads[place] for place in order))
        queries.prefetch(rows[place] for place in order)
        references = self._references(database)
        rerankings: dict[int, Reranking] = {}
        patch_sizes: tuple[int, ...] = ()
        started = time.perf_counter()
        for place in tqdm(order, "Re-ranking", unit="query", disable=not progress):
            query = queries.patches(rows[place], self._device)
            patch_sizes = tuple(grid.patch_size for grid in query.grids)
            rerankings[place] = self._rerank(query, references, heads[place])
        pairs = sum(map(len, heads))
        seconds = time.perf_counter() - started
        logger.info("re-ranking: %d pairs in %.1f s (%.1f ms a pair)", pairs, seconds, 1000 * seconds / max(1, pairs))
        return [rerankings[place] for place in range(len(heads))], patch_sizes

    def _references(self, database: PatchSource) -> PatchSource | PatchesOnDevice:
        """Where candidates come from; on an accelerator half of the room that the search leaves there keeps some."""
        if self._device.type == "cpu":
            return database
        if self._on_device is None:
            self._on_device = PatchesOnDevice(database, self._device, (device_room(self._device) or 0) // 2)
        return self._on_device

    def _rerank(self, query: PatchFeatures, database: PatchSource | PatchesOnDevice, head: Sequence[int]) -> Reranking:
        if self._rounded:
            query = query.round_as("query")
        weights = self._options.patchweights2use
        if self._device.type == "cpu":
            share = min(MOST_A_THREAD, max(1, len(head) // (2 * self._workers.count)))
            return rerank(query, head, database.patches, weights, self._matcher, share, self._workers.map)
        return rerank(query, head, database.patches, weights, self._matcher, CANDIDATES_AT_ONCE)

    def _choose_similarity(self, query: PatchFeatures, database: PatchSource, candidate: int) -> None:
        """Let this pair decide, unless one has; the database's pictures are read again where 8 bits are chosen."""
        if self._rounded is None:
            reference = database.patches(candidate, self._device)
            similarity = self._options.similarity
            # Measured where pairs will be matched
            (chosen,) = self._workers.map(lambda pair: choose_way(similarity, *pair), [(query, reference)])
            self._rounded = WAYS[chosen].rounds
            if self._rounded:
                database.round_references()


def visiting_order(
    candidates: Sequence[Sequence[int]], picture_bytes: Mapping[int, int], room: int | None
) -> list[int]:
    """Rows of the queries, each once, in an order in which memory serves best: the list's where all candidates fit.

    Otherwise the query comes next that shares most with the one before it. candidates: database rows of each query;
    picture_bytes: what each of them takes; room: bytes that memory holds, None for everything.
    """
    if room is None or sum(picture_bytes.values()) <= room:
        return list(range(len(candidates)))
    asking: dict[int, list[int]] = {index: [] for index in picture_bytes}
    for row, head in enumerate(candidates):
        for index in head:
            asking[index].append(row)
    askers = {index: np.array(rows) for index, rows in asking.items()}
    left = np.ones(len(candidates), dtype=bool)
    order: list[int] = []
    for _ in candidates:
        shared = np.zeros(len(candidates))
        for index in candidates[order[-1]] if order else ():
            shared[askers[index]] += picture_bytes[index]
        shared[~left] = -1
        order.append(int(shared.argmax()))  # of equal ones the first of the list
        left[order[-1]] = False
    return order


def _check_room(heads: Sequence[Sequence[int]], sizes: Mapping[int, int], room: int | None) -> None:
    """Warn where the candidates of one query do not fit into memory; sizes: bytes of each."""
    most = max((sum(sizes[index] for index in head) for head in heads), default=0)
    if room is not None and most > room:
        logger.warning(
            "the candidates of one query take %.3g GB and memory keeps %.3g GB, so they are read again and again; ways "
            "out: a larger [feature_match] cache_gb, fewer candidates (rerank_top), smaller ones ([feature_extract] "
            "feature_dtype = float16 or int8)",
            most / 1e9,
            room / 1e9,
        )


def _log_reads(database: PatchSource, asked: int) -> None:
    done = database.statistics
    if database.cache_bytes is not None:
        logger.info(
            "database patches: %d pictures read (%.3g GB), %d times found in memory, %.3g of %.3g GB in use",
            done.reads,
            done.bytes_read / 1e9,
            max(0, asked - done.reads),
            done.held_bytes / 1e9,
            database.cache_bytes / 1e9,
        )


def check_panoramas(cutouts: int, num_pictures: int, coordinates: NDArray[np.float64] | None = None) -> None:
    """Raises UserError unless a database is cut-outs of panoramas, so many in a row of each.

    coordinates: of the pictures, M×c, where they are known: those of one panorama are the same.
    """
    key = f"[feature_match] panorama_cutouts = {cutouts}"
    panoramas, rest = divmod(num_pictures, cutouts)
    if rest:
        raise UserError(
            f"{key}: the database has {num_pictures} pictures, {panoramas} panoramas and {rest} more (cut-outs left "
            "out of the list, or another dataset?)"
        )
    if coordinates is None:
        return
    blocks = coordinates.reshape(panoramas, cutouts, -1)
    apart = np.flatnonzero((blocks != blocks[:, :1]).any(axis=(1, 2)))
    if len(apart):
        first = apart[0] * cutouts
        raise UserError(
            f"{key}: database pictures {first + 1} to {first + cutouts} have different coordinates in the ground "
            f"truth, as have {len(apart) - 1} further panoramas (cut-outs left out of the list or in another order, or "
            "a dataset without panoramas?)"
        )
