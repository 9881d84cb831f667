"""Spatial scores of a query's candidates, fused over patch sizes into one ranking (paper sections 3.4 and 3.5)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from patchnetvlad.candidates import RankingScores
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.matching import WAYS, Matcher, Matches, Prepared, Score, mutual_matches_batch, with_likeness

_ROUNDING = 1e-12  # scores closer than this, relatively, are equal: z-scores would blow their rounding up


Scored = list[list[float]]
"""Scores of some candidates at each patch size."""

Run = Callable[[Callable[[Sequence[int]], Scored], Iterable[Sequence[int]]], Iterable[Scored]]
"""How a function is called for every batch of candidates: `map`, or one that shares them among threads."""


@dataclass(frozen=True)
class PairScore:
    """Two pictures compared: a score and the matches behind it for each patch size."""

    scores: tuple[Score, ...]
    matches: tuple[Matches, ...]


@dataclass(frozen=True, eq=False)
class Reranking:
    """A query's n candidates after spatial scoring at S patch sizes.

    order: int64 (n,), positions in the retrieval order, best first; fused: float64 (n,) and per_scale: float64 n×S
    stay in the retrieval order. Larger is better.
    """

    order: NDArray[np.int64]
    fused: NDArray[np.float64]
    per_scale: NDArray[np.float64]


def score_pair(query: PatchFeatures, reference: PatchFeatures, matcher: Matcher) -> PairScore:
    """Match and score two pictures at every patch size; their grids may differ."""
    matches = match_pair(query, reference)
    (scores,) = _score_all(query, [reference], [matches], matcher)
    return PairScore(scores, matches)


def match_pair(query: PatchFeatures, reference: PatchFeatures) -> tuple[Matches, ...]:
    """Mutual matches of two pictures at every patch size, by 8-bit products where both have them."""
    way = WAYS["int8" if query.rounded and reference.rounded else "float32"]
    pairs = zip(_prepared(query, way.rounds), _prepared(reference, way.rounds), strict=True)
    return tuple(way.match(*pair) for pair in pairs)


def _prepared(picture: PatchFeatures, rounds: bool) -> list[Prepared]:
    if not rounds:
        return [Prepared(rows) for rows in picture.descriptors]
    return [Prepared(*both) for both in zip(picture.descriptors, picture.rounded, strict=True)]


def weighted_sum(scores: Sequence[Score], weights: Sequence[float]) -> float:
    """One number for two pictures: the weighted sum of the scores of all patch sizes."""
    return sum(weight * score.value for weight, score in zip(weights, scores, strict=True))


def fuse(scores: NDArray[np.floating], weights: Sequence[float]) -> NDArray[np.float64]:
    """Weighted sum of the z-scores of every patch size over n candidates (paper section 3.5): n×S, S weights → (n,).

    The standard deviation is that of the population. A patch size at which all candidates score the same says
    nothing about them and contributes 0, as it does for a single candidate.
    """
    fused = np.zeros(len(scores))
    if len(scores) == 0:
        return fused
    for column, weight in zip(np.asarray(scores, dtype=np.float64).T, weights, strict=True):
        lowest, highest = column.min(), column.max()
        if highest - lowest > _ROUNDING * max(abs(lowest), abs(highest)):
            # z-scores do not depend on offset and scale; in 0..1 the deviation of unequal scores cannot vanish
            unit = (column - lowest) / (highest - lowest)
            fused += weight * ((unit - unit.mean()) / unit.std())
    return fused


def rerank(
    query: PatchFeatures,
    candidates: Sequence[int],
    load: Callable[[int], PatchFeatures],
    weights: Sequence[float],
    matcher: Matcher,
    batch_size: int = 1,
    run: Run = map,
    threads: int = 1,
) -> Reranking:
    """Order a query's candidates, given in retrieval order, by their fused spatial scores; ties keep that order.

    load: gives the patches of a candidate, once for each and where it is matched, so that they may come from disk one
    by one, and be decoded by the threads that share the work. batch_size: candidates matched and scored in one go on
    the query's device; few suit the CPU, more an accelerator. run: calls a function for each batch and gives the
    results in order, as `map` does; several at a time if it likes. threads: how many at a time, of which none should
    wait long for the others at the end: the last batches are smaller then.
    """

    def score(indices: Sequence[int]) -> Scored:
        batch = [load(index) for index in indices]
        scored = _score_all(query, batch, _match_all(query, batch), matcher)
        return [[score.value for score in scores] for scores in scored]

    values = list(chain.from_iterable(run(score, _batches(candidates, batch_size, threads))))
    per_scale = np.array(values, dtype=np.float64).reshape(len(values), len(query.descriptors))
    fused = fuse(per_scale, weights)
    return Reranking(np.argsort(-fused, kind="stable"), fused, per_scale)


def _batches(candidates: Sequence[int], largest: int, threads: int) -> Iterator[Sequence[int]]:
    """In order, each at most a share of what is left, so that threads which take them in turn end together."""
    first = 0
    while first < len(candidates):
        left = len(candidates) - first
        size = largest if threads == 1 else min(largest, math.ceil(left / (2 * threads)))
        yield candidates[first : first + size]
        first += size


def similarities(candidates: NDArray[np.floating], query: NDArray[np.floating]) -> NDArray[np.floating]:
    """Dot products of n global descriptors (n×D) with a query's (D,): (n,)."""
    products: NDArray[np.floating] = np.einsum("nd,d->n", candidates, query)  # @ rounds by the number of threads
    return products


def with_similarities(reranking: Reranking, near: NDArray[np.floating], weight: float) -> Reranking:
    """The same with a share for the global descriptors' `similarities` to the query's, (n,) in retrieval order.

    They are standardised over the candidates and weighted like the scores of one more patch size; ties keep the
    retrieval order.
    """
    fused = reranking.fused + fuse(near[:, None], (weight,))
    return replace(reranking, order=np.argsort(-fused, kind="stable"), fused=fused)


def reorder(ranking: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """A retrieval ranking (k,) with its first len(order) entries re-ranked and the others left behind them."""
    return np.concatenate([ranking[: len(order)][order], ranking[len(order) :]])


def collect_scores(
    candidates: NDArray[np.int64], rerankings: Sequence[Reranking], patch_sizes: Sequence[int], matcher: str
) -> RankingScores:
    """Gather the re-rankings of all queries; candidates: nQ×k in retrieval order, each re-ranked its first few."""
    most = max((len(reranking.order) for reranking in rerankings), default=0)
    indices = np.full((len(rerankings), most), -1, dtype=np.int64)
    fused = np.zeros((len(rerankings), most))
    per_scale = np.zeros((len(rerankings), most, len(patch_sizes)))
    for row, (retrieved, reranking) in enumerate(zip(candidates, rerankings, strict=True)):
        count = len(reranking.order)
        indices[row, :count] = retrieved[:count][reranking.order]
        fused[row, :count] = reranking.fused[reranking.order]
        per_scale[row, :count] = reranking.per_scale[reranking.order]
    return RankingScores(tuple(patch_sizes), matcher, indices, fused, per_scale)


def _score_all(
    query: PatchFeatures,
    references: Sequence[PatchFeatures],
    matches: Sequence[tuple[Matches, ...]],
    matcher: Matcher,
) -> list[tuple[Score, ...]]:
    """Scores of several references, one for each patch size."""
    sizes = len(query.grids)
    if not sizes:
        return [()] * len(matches)
    of_all = list(chain.from_iterable(matches))
    if matcher.weighs_likeness:
        sides = [*query.descriptors] * len(matches), chain.from_iterable(other.descriptors for other in references)
        of_all = [with_likeness(*three) for three in zip(of_all, *sides, strict=True)]
    scores = matcher.score(
        of_all,
        list(query.grids) * len(matches),
        [grid for reference in references for grid in reference.grids],
        query.descriptors[0].device,
    )
    return [tuple(scores[first : first + sizes]) for first in range(0, len(scores), sizes)]


def _match_all(query: PatchFeatures, batch: Sequence[PatchFeatures]) -> list[tuple[Matches, ...]]:
    """Matches of each candidate, one for each patch size."""
    device = query.descriptors[0].device
    if device.type == "cpu" or len(batch) == 1:
        return [match_pair(query, candidate.to(device)) for candidate in batch]
    by_size = [
        _match_batch(patches, [candidate.descriptors[scale] for candidate in batch])
        for scale, patches in enumerate(query.descriptors)
    ]
    return list(zip(*by_size, strict=True))


def _match_batch(query: Tensor, references: Sequence[Tensor]) -> list[Matches]:
    """One patch size of a batch; candidates of different sizes are padded."""
    lengths = torch.tensor([len(reference) for reference in references])
    padded = pad_sequence([reference.to(query.device) for reference in references], batch_first=True)
    return mutual_matches_batch(query, padded, None if bool((lengths == lengths[0]).all()) else lengths)
