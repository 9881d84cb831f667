"""What a run finds for each query: the candidates of the search, and their scores by their patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Candidates:
    """Database pictures proposed for each query, best first.

    indices: int64 nQ×k, rows of the database; rows with fewer than k candidates end in −1.
    scores: float32 nQ×k, larger is better (a search gives minus the squared distance), −inf where the index is −1.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]


class ApproximateSearch(Protocol):
    """A search of global descriptors that may miss neighbours; what it finds is compared exactly."""

    def search(self, queries: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """At least `count` database rows for each query (N×D), in any order; −1 where fewer are found."""
        ...


@dataclass(frozen=True, eq=False)
class RankingScores:
    """Spatial scores of all queries' re-ranked candidates, best first; larger is better.

    patch_sizes: S of them; matcher: its name in MATCHERS; indices: int64 nQ×r, database rows, −1 where a query has
    fewer than r candidates (its scores there are 0); fused: float64 nQ×r; per_scale: float64 nQ×r×S, as the matcher
    gave them.
    """

    patch_sizes: tuple[int, ...]
    matcher: str
    indices: NDArray[np.int64]
    fused: NDArray[np.float64]
    per_scale: NDArray[np.float64]

    def of_best(self, weights: Sequence[float]) -> NDArray[np.float64]:
        """The best candidates' scores weighted over patch sizes, (nQ,): unlike fused ones, to compare queries by.

        There must be candidates.
        """
        best: NDArray[np.float64] = self.per_scale[:, 0] @ np.asarray(weights)
        return best
