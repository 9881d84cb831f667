"""Re-rank one query after another against a database, comparing patches in the way that is fastest here."""

import logging
import math
import time
from collections.abc import Sequence

from patchnetvlad.config import FeatureMatchConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.patch_rounding import products_are_exact
from patchnetvlad.patch_sources import PatchSource
from patchnetvlad.reranking import Reranking, find_matcher, match_pair, rerank

logger = logging.getLogger(__name__)

CANDIDATES_AT_ONCE = 25  # matched in one batch on an accelerator
_SHORTEST_ROUNDED = 256  # dimensions below which 8-bit products gain nothing


class Reranker:
    """[feature_match] matcher, weights and similarity, at work on one database.

    The first pair decides whether patches are compared by 8-bit products; the ranking is the same either way.
    """

    def __init__(self, options: FeatureMatchConfig, database: PatchSource) -> None:
        self._options = options
        self._matcher = find_matcher(options.matcher)
        self._database = database
        self._rounded: bool | None = None  # until the first pair decides

    def rerank(self, query: PatchFeatures, candidates: Sequence[int]) -> Reranking:
        """Re-rank database pictures, named by their index in retrieval order, on the query's device."""
        device = query.descriptors[0].device
        if candidates:
            self.choose_similarity(query, candidates[0])
        if self._rounded:
            query = query.round_as("query")
        features = (self._database.patches(index) for index in candidates)
        batch_size = 1 if device.type == "cpu" else CANDIDATES_AT_ONCE
        return rerank(query, features, self._options.patchweights2use, self._matcher, batch_size)

    def choose_similarity(self, query: PatchFeatures, candidate: int) -> None:
        """Let this pair decide, unless one has; the database's pictures are read again where 8 bits are chosen.

        Raises UserError where [feature_match] similarity asks for what the query's device cannot do.
        """
        if self._rounded is None:
            reference = self._database.patches(candidate).to(query.descriptors[0].device)
            self._rounded = uses_rounding(self._options.similarity, query, reference)
            if self._rounded:
                logger.info("similarities by 8-bit products, checked in float32")
                self._database.round_references()


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
