"""Re-rank one query after another against a database, comparing patches in the way that is fastest here."""

from collections.abc import Sequence

from patchnetvlad.config import FeatureMatchConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.matching import WAYS
from patchnetvlad.patch_sources import PatchSource
from patchnetvlad.reranking import Reranking, find_matcher, rerank
from patchnetvlad.similarity_choice import choose_way
from patchnetvlad.workers import Workers

CANDIDATES_AT_ONCE = 25  # matched in one batch on an accelerator


class Reranker:
    """[feature_match] matcher, weights and similarity, at work on one database.

    The first pair decides whether patches are compared by 8-bit products; the ranking is the same either way.
    """

    def __init__(self, options: FeatureMatchConfig, database: PatchSource) -> None:
        self._options = options
        self._matcher = find_matcher(options.matcher)
        self._database = database
        self._workers = Workers()
        self._rounded: bool | None = None  # until the first pair decides

    def rerank(self, query: PatchFeatures, candidates: Sequence[int]) -> Reranking:
        """Re-rank database pictures, named by their index in retrieval order, on the query's device."""
        device = query.descriptors[0].device
        if candidates:
            self.choose_similarity(query, candidates[0])
        if self._rounded:
            query = query.round_as("query")
        features = (self._database.patches(index) for index in candidates)
        weights = self._options.patchweights2use
        if device.type == "cpu":
            return rerank(query, features, weights, self._matcher, run=self._workers.map)
        return rerank(query, features, weights, self._matcher, CANDIDATES_AT_ONCE)

    def choose_similarity(self, query: PatchFeatures, candidate: int) -> None:
        """Let this pair decide, unless one has; the database's pictures are read again where 8 bits are chosen.

        Raises UserError where [feature_match] similarity asks for what the query's device cannot do.
        """
        if self._rounded is None:
            reference = self._database.patches(candidate).to(query.descriptors[0].device)
            # Measured where pairs will be matched
            (chosen,) = self._workers.map(
                lambda pair: choose_way(self._options.similarity, *pair), [(query, reference)]
            )
            self._rounded = WAYS[chosen].rounds
            if self._rounded:
                self._database.round_references()
