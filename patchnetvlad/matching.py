"""Mutual nearest neighbours between the patches of two pictures (paper section 3.3), in one of several ways.

All ways give the same matches. They differ in speed, from one processor to another.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.patch_rounding import (
    RoundedPatches,
    approximate_similarities,
    products_are_exact,
    similarity_errors,
)

CLOSE = 2e-6  # similarities of unit rows that float32 may order either way: several times its largest error
TIED = 2.0**-40  # similarities in steps of this are equal, so that the order of a float64 sum's terms decides nothing
DOUBTFUL = 0.06  # share of all pairs beyond which the float32 product is cheaper than single pairs
_FEWEST_DIMS = 2  # torch's int8 product is undefined for one


@dataclass(frozen=True)
class Matches:
    """Pairs of patches that are each other's nearest neighbour, in the order of the query's patches.

    query, reference: int64 patch indices, (M,) each, on the CPU. No index occurs twice on either side. similarity:
    float64 (M,), the dot product of each pair's descriptors, where a matcher weighs it (`with_likeness`).
    """

    query: Tensor
    reference: Tensor
    similarity: Tensor | None = None

    def __len__(self) -> int:
        return len(self.query)


@dataclass(frozen=True)
class Score:
    """Spatial agreement of two pictures' matches at one patch size; larger is better, 0 when nothing agrees.

    inliers: bool, one for each match; homography: 3×3 from reference to query pixels, or None where the matcher
    has none.
    """

    value: float
    inliers: Tensor
    homography: Tensor | None = None


@dataclass(frozen=True)
class Matcher:
    """How the matches of two pictures at one patch size are scored.

    pair: matches, the query's grid, the reference's grid → Score, larger is better, 0 for no agreement; pairs: the same
    for many pairs together, computed on a device, where that is faster; meaning: of a score, in a few words for people;
    weighs_likeness: whether it needs the matches' similarity.
    """

    pair: Callable[[Matches, PatchGrid, PatchGrid], Score]
    pairs: Callable[[Sequence[Matches], Sequence[PatchGrid], Sequence[PatchGrid], torch.device], list[Score]] | None = (
        None
    )
    meaning: str = "larger is better"
    weighs_likeness: bool = False

    def score(
        self,
        matches: Sequence[Matches],
        query_grids: Sequence[PatchGrid],
        reference_grids: Sequence[PatchGrid],
        device: torch.device,
    ) -> list[Score]:
        """Scores of many pairs, in the way that is faster."""
        if self.pairs is not None:
            return self.pairs(matches, query_grids, reference_grids, device)
        return [self.pair(*three) for three in zip(matches, query_grids, reference_grids, strict=True)]


@dataclass(frozen=True)
class Prepared:
    """One picture's patches of one size as a way to match needs them: rows, P×D, and perhaps the same in 8 bits."""

    rows: Tensor
    rounded: RoundedPatches | None = None


@dataclass(frozen=True)
class Way:
    """How the mutual matches of a query and a reference are found.

    match: gives them; rounds: whether it needs 8-bit rows; works: whether this machine's processor can do it at all;
    text: what the log says.
    """

    match: Callable[[Prepared, Prepared], Matches]
    rounds: bool
    works: Callable[[], bool]
    text: str


def mutual_matches(query: Tensor, reference: Tensor) -> Matches:
    """Mutual nearest neighbours of two sets of unit descriptors, Pq×D and Pr×D, on any device.

    The nearest neighbour has the largest dot product, which orders pairs as the distance of unit vectors does; of
    equal ones the lowest index is nearest, in both directions. Products that float32 cannot order are taken in
    float64, so that no processor, device or number of threads decides. Either set may be empty.
    """
    if query.device.type != "cpu":
        return mutual_matches_batch(query, reference[None])[0]
    if len(query) == 0 or len(reference) == 0:
        return _no_matches()
    close = _close(_lengths(query), _lengths(reference))
    similarity = query @ reference.T  # Pq×Pr
    least = similarity.amax(dim=1) - close, similarity.amax(dim=0) - close
    return _settle(_possible(similarity, *least), query, reference, close)


def mutual_matches_batch(query: Tensor, references: Tensor, lengths: Tensor | None = None) -> list[Matches]:
    """`mutual_matches` of one query, Pq×D, with B references, B×Pr×D, for accelerators.

    lengths: (B,) integers, how many rows of each reference are patches, the rest being padding; None: all of them.
    All B products are computed before the pairs that may be nearest, a few in a thousand, leave the device. Needs
    memory for B·Pq·Pr similarities and for a comparison of each.
    """
    count, padded, dims = references.shape
    if count == 0 or len(query) == 0 or padded == 0:
        return [_no_matches() for _ in range(count)]
    close = _close(_lengths(query), _lengths(references))
    similarity = (references.reshape(count * padded, dims) @ query.T).reshape(count, padded, -1)  # B×Pr×Pq
    if lengths is not None:
        lengths = lengths.to(similarity.device)
        padding = torch.arange(padded, device=similarity.device) >= lengths[:, None]  # B×Pr
        similarity.masked_fill_(padding[:, :, None], -torch.inf)
    row_least, column_least = similarity.amax(dim=1) - close, similarity.amax(dim=2) - close  # B×Pq and B×Pr
    near = similarity >= torch.minimum(row_least[:, None], column_least[:, :, None])
    if lengths is not None:
        near &= ~padding[:, :, None]
    index, row, column = near.transpose(1, 2).nonzero(as_tuple=True)
    values = similarity[index, column, row]
    of_row, of_column = values >= row_least[index, row], values >= column_least[index, column]
    ends = index.bincount(minlength=count).cumsum(0).tolist()
    listed = [numbers.cpu().numpy() for numbers in (row, column, values, of_row, of_column)]
    matches = []
    for reference, first, last in zip(references, [0, *ends], ends, strict=False):
        pairs = _Pairs(*(numbers[first:last] for numbers in listed))
        matches.append(_settle(pairs, query, reference, close))
    return matches


def rounded_mutual_matches(
    query: Tensor, reference: Tensor, rounded_query: RoundedPatches, rounded_reference: RoundedPatches
) -> Matches:
    """What `mutual_matches` gives for the float32 rows, Pq×D and Pr×D on the CPU, at a fraction of its cost.

    rounded_query, rounded_reference: the rows after `round_patches` in these roles. Pairs that may be nearest within
    the error of rounding are compared in float32: first those that may be so in their row and their column, then the
    rivals of the best among them. The answer is the same unless one of the Pq·Pr similarities breaks its bound, which
    each does with a chance of 10⁻¹⁸.
    """
    if len(query) == 0 or len(reference) == 0 or query.shape[1] < _FEWEST_DIMS:
        return mutual_matches(query, reference)
    similarity = approximate_similarities(rounded_query, rounded_reference)  # Pq×Pr
    row_error, column_error = similarity_errors(rounded_query, rounded_reference)  # Pq and Pr
    least = similarity.amax(dim=1) - 2 * row_error, similarity.amax(dim=0) - 2 * column_error
    rows, columns, rough, of_row, of_column = _possible(similarity, *least)
    if len(rows) > DOUBTFUL * similarity.numel():
        return mutual_matches(query, reference)
    close = _close(rounded_query.norm, rounded_reference.norm)
    exact = np.full(len(rows), -np.inf, np.float32)
    hopeful = np.flatnonzero(of_row & of_column)
    exact[hopeful] = _similarities(query, reference, rows[hopeful], columns[hopeful])
    row_best, column_best = _largest(exact, rows, len(query)), _largest(exact, columns, len(reference))
    best = hopeful[(exact >= row_best[rows] - close)[hopeful] & (exact >= column_best[columns] - close)[hopeful]]
    # A pair that is not the best among these cannot be mutual; one that is may still have a rival elsewhere
    row_bar, column_bar = np.full(len(query), np.inf, np.float32), np.full(len(reference), np.inf, np.float32)
    row_bar[rows[best]], column_bar[columns[best]] = exact[best], exact[best]
    of_row &= rough >= (row_bar - row_error.numpy())[rows] - close
    of_column &= rough >= (column_bar - column_error.numpy())[columns] - close
    of_row[best], of_column[best] = True, True
    unknown = np.flatnonzero((of_row | of_column) & np.isinf(exact))
    exact[unknown] = _similarities(query, reference, rows[unknown], columns[unknown])
    wanted = np.flatnonzero(of_row | of_column)
    pairs = _Pairs(rows[wanted], columns[wanted], exact[wanted], of_row[wanted], of_column[wanted])
    return _settle(pairs, query, reference, close)


def with_likeness(matches: Matches, query: Tensor, reference: Tensor) -> Matches:
    """Matches of two sets of descriptors, Pq×D and Pr×D on any device, with the similarity of each pair.

    In float64 and in steps of TIED, so that no processor, device or number of threads decides.
    """
    sides = ((query, matches.query), (reference, matches.reference))
    left, right = (rows[index.to(rows.device)].cpu().double().numpy() for rows, index in sides)
    products = np.einsum("md,md->m", left, right)
    return replace(matches, similarity=torch.from_numpy(np.round(products / TIED) * TIED))


class _Pairs(NamedTuple):
    """n pairs of patches, row after row: which may be the nearest of their row and which of their column."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float32]  # similarities, in float32
    of_row: NDArray[np.bool_]
    of_column: NDArray[np.bool_]


def _possible(similarity: Tensor, row_least: Tensor, column_least: Tensor) -> _Pairs:
    """The pairs of Pq×Pr similarities that are no less than the least (Pq) of their row or the least (Pr) of their
    column."""
    values = similarity.numpy()
    # torch combines rows with columns faster than NumPy does; NumPy finds places faster
    near = values >= torch.minimum(row_least[:, None], column_least).numpy()
    rows, columns = np.divmod(np.flatnonzero(near), near.shape[1])
    chosen = values[rows, columns]
    return _Pairs(rows, columns, chosen, chosen >= row_least.numpy()[rows], chosen >= column_least.numpy()[columns])


def _settle(pairs: _Pairs, query: Tensor, reference: Tensor, close: float) -> Matches:
    """The mutual ones of pairs, among which are all that may be nearest to a patch of any mutual pair.

    What is closer to the best of its row or column than float32 can tell is compared in float64.
    """
    rows, columns = pairs.rows, pairs.columns
    values = pairs.values.astype(np.float64)
    sides = [(rows, pairs.of_row, len(query)), (columns, pairs.of_column, len(reference))]
    near = []
    for groups, member, count in sides:
        best = _largest(np.where(member, values, -np.inf), groups, count)
        near.append(member & (values >= best[groups] - close))
    mutual = near[0] & near[1]
    doubtful = np.zeros(len(rows), dtype=bool)
    for (groups, _, count), close_by in zip(sides, near, strict=True):
        crowded = np.bincount(groups[close_by], minlength=count) > 1
        crowded &= np.bincount(groups[mutual], minlength=count) > 0
        doubtful |= close_by & crowded[groups]
    if doubtful.any():
        values[doubtful] = _exact(query, reference, rows[doubtful], columns[doubtful])
        for (groups, _, count), close_by in zip(sides, near, strict=True):
            best = _largest(np.where(close_by, values, -np.inf), groups, count)
            nearest = np.flatnonzero(close_by & (values == best[groups]))
            first = nearest[np.unique(groups[nearest], return_index=True)[1]]  # of equal ones, in the order of pairs
            mutual &= np.isin(np.arange(len(rows)), first)
    return Matches(torch.from_numpy(rows[mutual]), torch.from_numpy(columns[mutual]))


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


def _close(query: Tensor, reference: Tensor) -> float:
    """How near to each other float32 similarities may be before their order is uncertain, for rows of these lengths."""
    return CLOSE * max(1.0, float(query.max()) * float(reference.max()))


def _exact(
    query: Tensor, reference: Tensor, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Similarities of n pairs in float64, in steps of TIED."""
    (which_rows, row), (which_columns, column) = (np.unique(index, return_inverse=True) for index in (rows, columns))
    chosen = (patches[torch.from_numpy(which)] for patches, which in ((query, which_rows), (reference, which_columns)))
    left, right = (patches.cpu().double() for patches in chosen)
    similarity: NDArray[np.float64] = (left @ right.T).numpy()[row, column]
    return np.round(similarity / TIED) * TIED


def _similarities(
    query: Tensor, reference: Tensor, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Float32 similarities of n pairs, given row after row, without a copy of what they are made of."""
    starts = np.searchsorted(rows, np.arange(len(query) + 1))
    wanted = torch.sparse_csr_tensor(
        torch.from_numpy(starts),
        torch.from_numpy(columns),
        torch.zeros(len(rows)),
        (len(query), len(reference)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(wanted, query, reference.T, beta=0.0).values().numpy()


Float = TypeVar("Float", np.float32, np.float64)


def _largest(values: NDArray[Float], groups: NDArray[np.int64], count: int) -> NDArray[Float]:
    """The largest value of each of ``count`` groups, −∞ for an empty one."""
    largest = np.full(count, -np.inf, values.dtype)
    np.maximum.at(largest, groups, values)
    return largest


@lru_cache(maxsize=1)
def rounding_works() -> bool:
    """Whether this processor multiplies 8-bit numbers exactly and its torch compares single pairs."""
    with warnings.catch_warnings():  # torch says once that its sparse tensors are new; this is that once
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        rows = torch.eye(3)
        try:
            single = _similarities(rows, 2 * rows, np.array([0, 0, 2]), np.array([0, 1, 2]))
        except RuntimeError:
            return False
    return single.tolist() == [2, 0, 2] and products_are_exact()


def _match_rounded(query: Prepared, reference: Prepared) -> Matches:
    assert query.rounded is not None and reference.rounded is not None
    return rounded_mutual_matches(query.rows, reference.rows, query.rounded, reference.rounded)


def _no_matches() -> Matches:
    return Matches(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


WAYS: dict[str, Way] = {
    "float32": Way(
        lambda query, reference: mutual_matches(query.rows, reference.rows), False, lambda: True, "in float32"
    ),
    "int8": Way(_match_rounded, True, rounding_works, "by 8-bit products, checked in float32"),
}
"""The ways to match on a processor, by the names that [feature_match] similarity takes."""
