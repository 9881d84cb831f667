"""Nearest database pictures by global descriptor."""

import mmap
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.candidates import ApproximateSearch, Candidates
from patchnetvlad.errors import UserError, counted
from patchnetvlad.faiss_library import faiss

_CPU = torch.device("cpu")
_MARGIN = 16  # neighbours searched beyond k, so that rounding cannot keep a better one out
_QUERIES = 256  # queries searched at once
_DATABASE_ROWS = 16384  # database rows compared at once on an accelerator
_ROUNDING = 1e-5  # generous bound of a fast distance's error, relative to the vectors' squared norms

Float32Rows: TypeAlias = NDArray[np.float32]
"""Descriptors, one a row; a memory-mapped array is not read into memory."""

_Search = Callable[[Float32Rows, int], tuple[Float32Rows, NDArray[np.int64]]]
"""Queries and a number n → squared distances, accurate to rounding, and rows of the n nearest, nearest first."""


class DatabaseIndex:
    """The global descriptors of a database, made ready once and searched for any number of queries.

    database: M×D; index "Flat" is exact, and equal distances rank the lower row first, whatever the device. Anything
    else runs on the CPU and proposes rows, which are ranked by their exact distances: a faiss factory string, of which
    an index is made here, or a search that was made before. room: bytes that the exact search may take on an
    accelerator, None for all it needs; what does not fit is sent there in blocks, for every 256 queries again.
    Raises UserError if faiss cannot make, train or search the index.
    """

    def __init__(
        self,
        database: Float32Rows,
        index: str | ApproximateSearch = "Flat",
        device: torch.device = _CPU,
        room: int | None = None,
    ) -> None:
        self._database = database
        self._fast: _Search | None = None
        self._approximate: ApproximateSearch | None = None
        if len(database) == 0:
            return
        if not isinstance(index, str):
            self._approximate = index
        elif index != "Flat":
            self._approximate = _FactoryIndex(database, index)
        else:
            self._fast = _faiss_search(database) if device.type == "cpu" else _torch_search(database, device, room)
            self._largest = _largest_square(database)

    def search(self, queries: Float32Rows, k: int, panorama_cutouts: int = 1) -> Candidates:
        """The k nearest rows of each query (N×D) by Euclidean distance; at most M of them.

        panorama_cutouts: consecutive database rows that show one panorama; only the best of each panorama is kept, and
        k counts panoramas.
        """
        wanted = min(k * panorama_cutouts, len(self._database))
        if wanted == 0 or len(queries) == 0:
            empty = (len(queries), wanted)
            candidates = Candidates(np.full(empty, -1, dtype=np.int64), np.full(empty, -np.inf, dtype=np.float32))
        elif self._approximate is not None:
            candidates = _ranked(queries, self._database, self._approximate.search(queries, wanted), wanted)
        else:
            assert self._fast is not None  # there is a database
            doubt = _ROUNDING * 2 * max(self._largest, _largest_square(queries))
            candidates = _exact(queries, self._database, wanted, self._fast, doubt)
        return best_cutout_per_panorama(candidates, panorama_cutouts, k)


def exact_rows(queries: Float32Rows, database: Float32Rows, k: int) -> NDArray[np.int64]:
    """Rows of the k nearest of each query, up to the rounding of fast distances; nearest first, nQ×k."""
    return _faiss_search(database)(np.ascontiguousarray(queries, dtype=np.float32), min(k, len(database)))[1]


def read_rows(database: Float32Rows, rows: NDArray[np.int64]) -> Float32Rows:
    """Rows of descriptors by their numbers; the disk is asked for all of them before the first is waited for."""
    mapping = getattr(database, "_mmap", None)  # of np.memmap
    if mapping is not None and hasattr(mmap, "MADV_WILLNEED"):
        row_bytes = database.strides[0]
        first = database.ctypes.data - np.frombuffer(mapping, np.uint8, 1).ctypes.data
        for start in (first + rows * row_bytes).tolist():
            begin = start - start % mmap.PAGESIZE
            mapping.madvise(mmap.MADV_WILLNEED, begin, start + row_bytes - begin)
    return np.asarray(database[rows], dtype=np.float32)


def faiss_reason(error: RuntimeError) -> str:
    """What faiss has to say: it raises one error for every mistake, and the reason follows the place in its source."""
    return str(error).splitlines()[0].rsplit(": ", 1)[-1]


def best_cutout_per_panorama(candidates: Candidates, panorama_cutouts: int, k: int) -> Candidates:
    """Keep the first k candidates of which none shares a panorama (database row // panorama_cutouts) with a better one.

    A row in which fewer panoramas were found ends in −1.
    """
    if panorama_cutouts == 1:
        return Candidates(candidates.indices[:, :k], candidates.scores[:, :k])
    indices = np.full_like(candidates.indices, -1)
    scores = np.full_like(candidates.scores, -np.inf)
    widest = 0
    for row, (ranked, ranked_scores) in enumerate(zip(candidates.indices, candidates.scores, strict=True)):
        valid = np.flatnonzero(ranked >= 0)
        _, first = np.unique(ranked[valid] // panorama_cutouts, return_index=True)
        kept = valid[np.sort(first)][:k]
        indices[row, : len(kept)] = ranked[kept]
        scores[row, : len(kept)] = ranked_scores[kept]
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


def _largest_square(rows: Float32Rows) -> float:
    return float(np.einsum("nd,nd->n", rows, rows).max())


def _exact(queries: Float32Rows, database: Float32Rows, k: int, search: _Search, doubt: float) -> Candidates:
    """Fast search for a few more than k neighbours, which are then put in order by exact distances.

    Fast distances, |q|² − 2q·d + |d|², carry rounding, at most ``doubt``, that depends on the device and on the
    position in a block: equal pictures would come out unequal and in any order.
    """
    indices = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    for start in range(0, len(queries), _QUERIES):
        chunk = np.array(queries[start : start + _QUERIES], dtype=np.float32, order="C")
        undecided = np.arange(len(chunk))
        width = k + _MARGIN
        while len(undecided):
            width = min(width, len(database))
            distances, nearest = search(chunk[undecided], width)
            decided = distances[:, -1] - distances[:, k - 1] > doubt
            if width == len(database):
                decided[:] = True
            for row, neighbours in zip(undecided[decided], nearest[decided], strict=True):
                difference = database[neighbours] - chunk[row]
                exact = np.einsum("nd,nd->n", difference, difference)
                order = np.lexsort((neighbours, exact))[:k]
                indices[start + row], scores[start + row] = neighbours[order], -exact[order]
            undecided = undecided[~decided]
            width *= 2
    return Candidates(indices, scores)


def _faiss_search(database: Float32Rows) -> _Search:
    rows = np.ascontiguousarray(database, dtype=np.float32)  # descriptors as they are stored stay on disk

    def search(queries: Float32Rows, count: int) -> tuple[Float32Rows, NDArray[np.int64]]:
        distances, nearest = faiss.knn(queries, rows, count)
        return distances, nearest

    return search


def _torch_search(database: Float32Rows, device: torch.device, room: int | None = None) -> _Search:
    """Search in blocks of rows on a device: the first ones stay there, as many as fit into room, others come and go."""
    rows_at_once, staying = _block_plan(database.shape, room)

    def load(start: int) -> tuple[Tensor, Tensor]:
        block = torch.tensor(database[start : start + rows_at_once], dtype=torch.float32, device=device)
        return block, block.square().sum(dim=1)

    starts = range(0, len(database), rows_at_once)
    there = {start: load(start) for start in starts[:staying]}

    def search(queries: Float32Rows, count: int) -> tuple[Float32Rows, NDArray[np.int64]]:
        rows = torch.as_tensor(queries, device=device)
        best = torch.empty(len(rows), 0, device=device)
        nearest = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        for start in starts:
            block, norms = there.get(start) or load(start)
            distances, within = (norms - 2 * (rows @ block.T)).topk(min(count, len(block)), largest=False)
            best = torch.cat([best, distances], dim=1)
            nearest = torch.cat([nearest, within + start], dim=1)
            best, kept = best.topk(min(count, best.shape[1]), largest=False)
            nearest = nearest.gather(1, kept)
            del block, norms  # before the next one takes its place
        best = best + rows.square().sum(dim=1, keepdim=True)
        return best.cpu().numpy(), nearest.cpu().numpy()

    return search


def _block_plan(shape: tuple[int, ...], room: int | None) -> tuple[int, int]:
    """Rows of a block and blocks that stay on a device, for an N×D database and so many bytes there."""
    count, dims = shape
    row_bytes = 4 * dims
    if room is None or count * row_bytes <= room:
        return _DATABASE_ROWS, -(-count // _DATABASE_ROWS)
    # A block that passes through takes its rows and, while their norms are made, their squares
    rows = max(1, min(_DATABASE_ROWS, room // (4 * row_bytes)))
    return rows, max(0, room // (rows * row_bytes) - 2)


class _FactoryIndex:
    """An index made by faiss's factory string, in memory."""

    def __init__(self, database: Float32Rows, factory: str) -> None:
        self._factory, self._shape = factory, database.shape
        rows = np.ascontiguousarray(database, dtype=np.float32)
        try:
            self._index = faiss.index_factory(rows.shape[1], factory)
            if not self._index.is_trained:
                self._index.train(rows)
            self._index.add(rows)
        except RuntimeError as error:
            raise self._refused(error) from error

    def search(self, queries: Float32Rows, count: int) -> NDArray[np.int64]:
        """What the index finds."""
        try:
            _, rows = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), count)
        except RuntimeError as error:
            raise self._refused(error) from error
        return np.asarray(rows, dtype=np.int64)

    def _refused(self, error: RuntimeError) -> UserError:
        return UserError(
            f"[feature_match] index = {self._factory}: faiss cannot search {counted(self._shape[0], 'picture')} of "
            f"{self._shape[1]} dimensions with it: {faiss_reason(error)} (the exact search is Flat)"
        )


def _ranked(queries: Float32Rows, database: Float32Rows, proposed: NDArray[np.int64], k: int) -> Candidates:
    """The k best of the proposed rows (nQ×n, n ≥ k, −1 for none) by exact distance; equal ones by row."""
    indices = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for position, (query, rows) in enumerate(zip(queries, proposed, strict=True)):
        rows = np.sort(rows[rows >= 0])  # in the order in which they lie on disk
        difference = read_rows(database, rows) - query
        distances = np.einsum("nd,nd->n", difference, difference)
        order = np.argsort(distances, kind="stable")[:k]
        indices[position, : len(order)], scores[position, : len(order)] = rows[order], -distances[order]
    return Candidates(indices, scores)
