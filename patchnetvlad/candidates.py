"""What a run finds for each query: the candidates of the search, and their scores by their patches."""

from dataclasses import dataclass

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
