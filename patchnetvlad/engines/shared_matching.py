"""Matching on several processes: one searches, all re-rank blocks of queries."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from patchnetvlad.config import Config
from patchnetvlad.engines.ray_cluster import Cluster
from patchnetvlad.evaluation import MatchingRun, Sources, memory_shares, open_features
from patchnetvlad.extraction import expected_header
from patchnetvlad.image_lists import Derived, ImageList
from patchnetvlad.model import PlaceModel
from patchnetvlad.ranking import Ranker, RerankAll, Reranked
from patchnetvlad.reranking import Reranking
from patchnetvlad.store.manifest import StoreHeader

logger = logging.getLogger(__name__)

_QUERIES = 64  # in a part, at most

QueryBlock = tuple[list[int], list[list[int]]]
"""Some queries, and for each its candidates' database rows in retrieval order."""


@dataclass(frozen=True, eq=False)
class MatchingJob:
    """What re-ranking any queries takes.

    expected: what the configuration would make, by the checkpoint's hash too, which is made once; model: describes
    patches where they are not read; workers: those on one machine, which share its memory.
    """

    config: Config
    expected: StoreHeader
    queries: ImageList
    database: ImageList
    query_features: Path
    index_features: Path
    model: PlaceModel | None
    device: str
    cpus: int
    workers: int

    def prepare(self) -> Callable[[QueryBlock], Reranked]:
        """Both feature folders opened; they stay open as long as the worker lives."""
        torch.set_num_threads(self.cpus)
        device = torch.device(self.device)
        model = self.model

        def find_model() -> PlaceModel:
            assert model is not None  # asked for on demand alone, which is why it came
            return model.to(device)

        memory = memory_shares(self.config.feature_match.cache_gb, self.workers)
        opened = ExitStack()
        sides = ((self.queries, self.query_features), (self.database, self.index_features))
        queries, database = (
            opened.enter_context(open_features(self.config, pictures, folder, share, find_model, checked=self.expected))
            for (pictures, folder), share in zip(sides, memory, strict=True)
        )
        # The search is done: a file of it, which [feature_match] index may name, is not needed
        ranker = Ranker(replace(self.config.feature_match, index="Flat"), database, device)

        def rerank(part: QueryBlock, opened: ExitStack = opened) -> Reranked:
            return ranker.rerank(queries, *part)

        return rerank


def with_ray(cluster: Cluster, run: MatchingRun, sources: Sources, progress: bool) -> RerankAll:
    """What re-ranks queries on a cluster, in place of this process."""

    def rerank_all(heads: Sequence[Sequence[int]]) -> Reranked:
        started = time.perf_counter()
        folders = sources.query_features.absolute(), sources.index_features.absolute()
        machine: tuple[Any, ...] = cluster.device, cluster.cpus, cluster.most
        lists = _absolute(run.queries), _absolute(run.database)
        job = MatchingJob(run.config, expected_header(run.config), *lists, *folders, run.model, *machine)
        blocks = cluster.parts(range(len(heads)), _QUERIES)
        parts: list[QueryBlock] = [(rows, [list(heads[row]) for row in rows]) for rows in blocks]
        done: dict[int, Reranking] = {}
        sizes: tuple[int, ...] = ()
        with tqdm(total=len(heads), desc="Re-ranking", unit="query", disable=not progress) as bar:
            for place, (rerankings, patch_sizes) in cluster.answers(job, parts):
                sizes = sizes or patch_sizes
                done.update(zip(blocks[place], rerankings, strict=True))
                bar.update(len(rerankings))
        pairs, seconds = sum(map(len, heads)), time.perf_counter() - started
        logger.info("re-ranking: %d pairs of %d queries in %.1f s by Ray", pairs, len(heads), seconds)
        return [done[row] for row in range(len(heads))], sizes

    return rerank_all


def _absolute(pictures: ImageList) -> ImageList:
    """The same pictures for processes that run in another folder."""
    paths, here = pictures.paths, Path.cwd()
    return replace(pictures, paths=Derived(lambda: [here / path for path in paths], len(pictures)))
