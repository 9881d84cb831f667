"""Mutual nearest neighbours between the patches of two pictures (paper section 3.3), in one of several ways.

All ways give the same matches. They differ in speed, from one processor to another.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.patch_rounding import (
    RoundedPatches,
    approximate_similarities,
    products_are_exact,
    similarity_errors,
)

CLOSE = 1e-6  # similarities of unit rows that float32 may order either way
DOUBTFUL = 0.02  # share of all pairs beyond which the float32 product is cheaper than single pairs
_FEWEST_DIMS = 2  # torch's int8 product is undefined for one


@dataclass(frozen=True)
class Matches:
    """Pairs of patches that are each other's nearest neighbour, in the order of the query's patches.

    query, reference: int64 patch indices, (M,) each, on the CPU. No index occurs twice on either side.
    """

    query: Tensor
    reference: Tensor

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
    equal ones the lowest index is nearest, in both directions. Either set may be empty.
    """
    if query.device.type != "cpu":
        return mutual_matches_batch(query, reference[None])[0]
    if len(query) == 0 or len(reference) == 0:
        return _no_matches()
    # NumPy finds maxima, and where they are, several times faster than torch does on a processor
    similarity = (query @ reference.T).numpy()  # Pq×Pr
    nearest = similarity.argmax(axis=1)
    column_best = similarity.max(axis=0)
    best = np.take_along_axis(similarity, nearest[:, None], axis=1)[:, 0]
    rows = np.flatnonzero(best == column_best[nearest])
    # Each of these rows attains the maximum of its column; where another row does so too, only the first counts.
    # Finding that row costs far more than the maximum, so it is done only if some column has a tie.
    if np.count_nonzero(similarity == column_best) > len(reference):
        rows = rows[similarity[:, nearest[rows]].argmax(axis=0) == rows]
    return Matches(torch.from_numpy(rows), torch.from_numpy(nearest[rows]))


def mutual_matches_batch(query: Tensor, references: Tensor, lengths: Tensor | None = None) -> list[Matches]:
    """`mutual_matches` of one query, Pq×D, with B references, B×Pr×D, for accelerators.

    lengths: (B,) integers, how many rows of each reference are patches, the rest being padding; None: all of them.
    Nothing leaves the device before all B pairs are matched. Needs memory for B·Pq·Pr similarities.
    """
    count, padded, dims = references.shape
    if count == 0 or len(query) == 0 or padded == 0:
        return [_no_matches() for _ in range(count)]
    similarity = (references.reshape(count * padded, dims) @ query.T).reshape(count, padded, -1)  # B×Pr×Pq
    if lengths is not None:
        lengths = lengths.to(similarity.device)
        padding = torch.arange(padded, device=similarity.device) >= lengths[:, None]  # B×Pr
        similarity.masked_fill_(padding[:, :, None], -torch.inf)
    nearest = similarity.argmax(dim=1)  # B×Pq
    back = similarity.argmax(dim=2)  # B×Pr
    mutual = back.gather(1, nearest) == torch.arange(len(query), device=similarity.device)
    if lengths is not None:
        mutual &= (lengths > 0)[:, None]
    pairs = zip(mutual.cpu(), nearest.cpu(), strict=True)
    return [Matches(found.nonzero()[:, 0], indices[found]) for found, indices in pairs]


def rounded_mutual_matches(
    query: Tensor, reference: Tensor, rounded_query: RoundedPatches, rounded_reference: RoundedPatches
) -> Matches:
    """What `mutual_matches` gives for the float32 rows, Pq×D and Pr×D on the CPU, at a fraction of its cost.

    rounded_query, rounded_reference: the rows after `round_patches` in these roles. Pairs that may be mutual within
    the error of rounding, and their rivals, are compared in float32; where two of these are so close that the order of
    a sum's terms decides, the answer is that of the float32 product itself. It is the same unless one of the Pq·Pr
    similarities breaks its bound, which each does with a chance of 10⁻¹⁸.
    """
    if len(query) == 0 or len(reference) == 0 or query.shape[1] < _FEWEST_DIMS:
        return mutual_matches(query, reference)
    similarity = approximate_similarities(rounded_query, rounded_reference).numpy()  # Pq×Pr
    row_error, column_error = (
        error.numpy() for error in similarity_errors(rounded_query, rounded_reference)
    )  # Pq and Pr
    row_least = similarity.max(axis=1) - 2 * row_error
    column_least = similarity.max(axis=0) - 2 * column_error
    rows, columns = _where(similarity >= _of_both(torch.maximum, row_least, column_least))
    if len(rows) > DOUBTFUL * similarity.size:
        return mutual_matches(query, reference)
    exact = _similarities(query, reference, rows, columns)
    close = CLOSE * max(1.0, float(rounded_query.norm.max() * rounded_reference.norm.max()))
    keep = exact >= _largest(exact, rows, len(query))[rows] - close
    keep &= exact >= _largest(exact, columns, len(reference))[columns] - close
    rows, columns, exact = rows[keep], columns[keep], exact[keep]
    # What is left is the best of its row and column among the possible pairs; others may still beat it
    beaten = _beaten(similarity, (row_error, column_error), query, reference, (rows, columns, exact), close)
    if beaten is None:
        return mutual_matches(query, reference)
    return Matches(torch.from_numpy(rows[~beaten]), torch.from_numpy(columns[~beaten]))


def _beaten(
    similarity: NDArray[np.float32],
    errors: tuple[NDArray[np.float32], NDArray[np.float32]],
    query: Tensor,
    reference: Tensor,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]],
    close: float,
) -> NDArray[np.bool_] | None:
    """Which of n pairs another of their row or column beats, bool (n,); None where one comes too close to tell.

    similarity: Pq×Pr, within errors (Pq and Pr); pairs: rows, columns and float32 similarities, (n,) each.
    """
    rows, columns, exact = pairs
    of_row, of_column = (np.full(count, np.inf, np.float32) for count in similarity.shape)
    of_row[rows], of_column[columns] = exact, exact
    if np.isfinite(of_row).sum() < len(rows) or np.isfinite(of_column).sum() < len(rows):
        return None  # two pairs of one row or column
    near = similarity >= _of_both(torch.minimum, of_row - errors[0], of_column - errors[1])
    near[rows, columns] = False
    rival_rows, rival_columns = _where(near)
    rivals = _similarities(query, reference, rival_rows, rival_columns)
    row_lead, column_lead = rivals - of_row[rival_rows], rivals - of_column[rival_columns]
    if (np.minimum(np.abs(row_lead), np.abs(column_lead)) <= close).any():
        return None
    row_beaten, column_beaten = (np.zeros(count, dtype=bool) for count in similarity.shape)
    row_beaten[rival_rows[row_lead > 0]] = True
    column_beaten[rival_columns[column_lead > 0]] = True
    return row_beaten[rows] | column_beaten[columns]


def _of_both(
    choose: Callable[[Tensor, Tensor], Tensor], rows: NDArray[np.float32], columns: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What to choose of the values of each row and each column; torch is faster at it than NumPy."""
    return choose(torch.from_numpy(rows)[:, None], torch.from_numpy(columns)).numpy()


def _where(condition: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns where a matrix is true, row after row."""
    rows, columns = np.divmod(np.flatnonzero(condition), condition.shape[1])
    return rows, columns


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


def _largest(values: NDArray[np.float32], groups: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """The largest value of each of ``count`` groups, −∞ for an empty one."""
    largest = np.full(count, -np.inf, np.float32)
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
