"""Nearest database pictures by global descriptor."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.errors import UserError
from patchnetvlad.faiss_library import faiss

_CPU = torch.device("cpu")
_MARGIN = 16  # neighbours searched beyond k, so that rounding cannot keep a better one out
_QUERIES = 256  # queries searched at once
_DATABASE_ROWS = 16384  # database rows compared at once on an accelerator
_ROUNDING = 1e-5  # generous bound of a fast distance's error, relative to the vectors' squared norms

_Search = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]
"""Queries and a number n → squared distances, accurate to rounding, and rows of the n nearest, nearest first."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Database pictures proposed for each query, best first.

    indices: int64 nQ×k, rows of the database; rows with fewer than k candidates end in −1.
    scores: float32 nQ×k, larger is better (a search gives minus the squared distance), −inf where the index is −1.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]


def retrieve(
    queries: NDArray[np.float32],
    database: NDArray[np.float32],
    k: int,
    index: str = "Flat",
    device: torch.device = _CPU,
    panorama_cutouts: int = 1,
) -> Candidates:
    """The k nearest database rows (M×D) of each query (N×D) by Euclidean distance; at most M of them.

    index "Flat" is exact, and equal distances rank the lower row first, whatever the device. Any other index is a
    faiss factory string, runs on the CPU and ranks what that index finds. panorama_cutouts: consecutive database
    rows that show one panorama; only the best of each panorama is kept, and k counts panoramas.

    Raises UserError if faiss cannot make, train or search the index.
    """
    wanted = min(k * panorama_cutouts, len(database))
    if wanted == 0 or len(queries) == 0:
        empty = (len(queries), wanted)
        found = Candidates(np.full(empty, -1, dtype=np.int64), np.full(empty, -np.inf, dtype=np.float32))
    elif index == "Flat":
        found = _exact(queries, database, wanted, device)
    else:
        found = _approximate(queries, database, wanted, index)
    return best_cutout_per_panorama(found, panorama_cutouts, k)


def best_cutout_per_panorama(candidates: Candidates, panorama_cutouts: int, k: int) -> Candidates:
    """Keep the first k candidates of which none shares a panorama (database row // panorama_cutouts) with a better one.

    A row in which fewer panoramas were found ends in −1.
    """
    if panorama_cutouts == 1:
        return Candidates(candidates.indices[:, :k], candidates.scores[:, :k])
    indices = np.full_like(candidates.indices, -1)
    scores = np.full_like(candidates.scores, -np.inf)
    widest = 0
    for row, (found, found_scores) in enumerate(zip(candidates.indices, candidates.scores, strict=True)):
        valid = np.flatnonzero(found >= 0)
        _, first = np.unique(found[valid] // panorama_cutouts, return_index=True)
        kept = valid[np.sort(first)][:k]
        indices[row, : len(kept)] = found[kept]
        scores[row, : len(kept)] = found_scores[kept]
        widest = max(widest, len(kept))
    return Candidates(indices[:, :widest], scores[:, :widest])


def looks_like_cutouts(utm_database: NDArray[np.floating], panorama_cutouts: int = 12) -> bool:
    """Whether database coordinates (M×2 or more) come in blocks of panorama_cutouts equal rows, several of them."""
    blocks, rest = divmod(len(utm_database), panorama_cutouts)
    if rest or blocks < 2:
        return False
    coordinates = utm_database.reshape(blocks, panorama_cutouts, -1)
    one_place_each = bool((coordinates == coordinates[:, :1]).all())
    return one_place_each and not bool((coordinates == coordinates[0, 0]).all())


def _exact(queries: NDArray[np.float32], database: NDArray[np.float32], k: int, device: torch.device) -> Candidates:
    """Fast search for a few more than k neighbours, which are then put in order by exact distances.

    Fast distances, |q|² − 2q·d + |d|², carry rounding that depends on the device and on the position in a block:
    equal pictures would come out unequal and in any order.
    """
    search = _faiss_search(database) if device.type == "cpu" else _torch_search(database, device)
    largest = max(float(np.einsum("nd,nd->n", rows, rows).max()) for rows in (queries, database))
    doubt = _ROUNDING * 2 * largest
    indices = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    for start in range(0, len(queries), _QUERIES):
        chunk = np.array(queries[start : start + _QUERIES], dtype=np.float32, order="C")
        undecided = np.arange(len(chunk))
        width = k + _MARGIN
        while len(undecided):
            width = min(width, len(database))
            distances, found = search(chunk[undecided], width)
            decided = distances[:, -1] - distances[:, k - 1] > doubt
            if width == len(database):
                decided[:] = True
            for row, neighbours in zip(undecided[decided], found[decided], strict=True):
                difference = database[neighbours] - chunk[row]
                exact = np.einsum("nd,nd->n", difference, difference)
                order = np.lexsort((neighbours, exact))[:k]
                indices[start + row], scores[start + row] = neighbours[order], -exact[order]
            undecided = undecided[~decided]
            width *= 2
    return Candidates(indices, scores)


def _faiss_search(database: NDArray[np.float32]) -> _Search:
    flat = faiss.IndexFlatL2(database.shape[1])
    flat.add(np.ascontiguousarray(database, dtype=np.float32))
    return flat.search


def _torch_search(database: NDArray[np.float32], device: torch.device) -> _Search:
    blocks = [
        torch.tensor(database[start : start + _DATABASE_ROWS], dtype=torch.float32, device=device)
        for start in range(0, len(database), _DATABASE_ROWS)
    ]
    squared_norms = [block.square().sum(dim=1) for block in blocks]

    def search(queries: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        rows = torch.as_tensor(queries, device=device)
        best = torch.empty(len(rows), 0, device=device)
        nearest = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        start = 0
        for block, norms in zip(blocks, squared_norms, strict=True):
            distances, within = (norms - 2 * (rows @ block.T)).topk(min(count, len(block)), largest=False)
            best = torch.cat([best, distances], dim=1)
            nearest = torch.cat([nearest, within + start], dim=1)
            best, kept = best.topk(min(count, best.shape[1]), largest=False)
            nearest = nearest.gather(1, kept)
            start += len(block)
        best = best + rows.square().sum(dim=1, keepdim=True)
        return best.cpu().numpy(), nearest.cpu().numpy()

    return search


def _approximate(queries: NDArray[np.float32], database: NDArray[np.float32], k: int, factory: str) -> Candidates:
    rows = np.ascontiguousarray(database, dtype=np.float32)
    try:
        index = faiss.index_factory(rows.shape[1], factory)
        if not index.is_trained:
            index.train(rows)
        index.add(rows)
        distances, found = index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
    except RuntimeError as error:  # faiss raises it for every mistake; the reason follows the place in its source
        reason = str(error).splitlines()[0].rsplit(": ", 1)[-1]
        raise UserError(
            f"[feature_match] index = {factory}: faiss cannot search {rows.shape[0]} pictures of {rows.shape[1]} "
            f"dimensions with it: {reason} (the exact search is Flat)"
        ) from error
    distances[found < 0] = np.inf
    order = np.lexsort((found, distances), axis=-1)
    return Candidates(np.take_along_axis(found, order, axis=1), -np.take_along_axis(distances, order, axis=1))
