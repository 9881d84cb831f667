"""Mutual nearest neighbours by 8-bit products, with float32 only where these leave a doubt.

Pairs that may be mutual within the error of rounding, and their rivals, are compared in float32.
"""

import torch
from torch import Tensor

from patchnetvlad.matching import Matches, mutual_matches
from patchnetvlad.patch_rounding import RoundedPatches, similarity_errors

NUMBERS_AT_ONCE = 1 << 18  # of the rows that are compared in float32
_FEWEST_DIMS = 2  # torch's int8 product is undefined for one
DOUBTFUL = 0.02  # share of all pairs beyond which the float32 product is cheaper than single pairs


def rounded_mutual_matches(
    query: Tensor, reference: Tensor, rounded_query: RoundedPatches, rounded_reference: RoundedPatches
) -> Matches:
    """What `mutual_matches` gives for the float32 rows, Pq×D and Pr×D on the CPU, at a fraction of its cost.

    rounded_query, rounded_reference: the rows after `round_patches` in these roles. The answer is the same unless one
    of the Pq·Pr similarities breaks its bound, which each does with a chance of 10⁻¹⁸; or two similarities are equal
    within the rounding of float32.
    """
    if len(query) == 0 or len(reference) == 0 or query.shape[1] < _FEWEST_DIMS:
        return mutual_matches(query, reference)
    products = torch._int_mm(rounded_query.levels, rounded_reference.levels.T)  # int32 Pq×Pr
    similarity = (products * rounded_reference.scale).mul_(rounded_query.scale[:, None])
    row_error, column_error = similarity_errors(rounded_query, rounded_reference)  # Pq, Pr
    possible = similarity >= (similarity.amax(dim=1) - 2 * row_error)[:, None]
    possible &= similarity >= similarity.amax(dim=0) - 2 * column_error
    rows, columns = possible.nonzero(as_tuple=True)
    if len(rows) > DOUBTFUL * similarity.numel():
        return mutual_matches(query, reference)
    exact = _similarities(query, reference, rows, columns)
    keep = exact == _largest(exact, rows, len(query))[rows]
    keep &= exact == _largest(exact, columns, len(reference))[columns]
    rows, columns, exact = rows[keep], columns[keep], exact[keep]
    # What is left is the best of its row and column among the possible pairs; others may still beat it
    keep = _unbeaten(similarity, row_error, query, reference, rows, columns, exact)
    rows, columns, exact = rows[keep], columns[keep], exact[keep]
    keep = _unbeaten(similarity.T, column_error, reference, query, columns, rows, exact)
    return Matches(rows[keep], columns[keep])


def _unbeaten(
    similarity: Tensor, error: Tensor, own: Tensor, other: Tensor, rows: Tensor, columns: Tensor, exact: Tensor
) -> Tensor:
    """Which of n pairs, of these exact similarities, no other column of their row beats: bool (n,).

    Compared exactly are the columns that may be better within the error (P,) of the approximate similarity, P×P'; of
    equal ones the first is better.
    """
    near = similarity[rows] >= (exact - error[rows])[:, None]
    pair, rival = near.nonzero(as_tuple=True)
    pair, rival = (some[rival != columns[pair]] for some in (pair, rival))
    rivals = _similarities(own, other, rows[pair], rival)
    better = (rivals > exact[pair]) | ((rivals == exact[pair]) & (rival < columns[pair]))
    unbeaten = torch.ones(len(rows), dtype=torch.bool)
    unbeaten[pair[better]] = False
    return unbeaten


def _similarities(query: Tensor, reference: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Float32 similarities of n pairs of rows."""
    exact = torch.empty(len(rows))
    step = max(1, NUMBERS_AT_ONCE // query.shape[1])
    for first in range(0, len(rows), step):
        some = slice(first, first + step)
        torch.sum(query[rows[some]].mul_(reference[columns[some]]), dim=1, out=exact[some])
    return exact


def _largest(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """The largest value of each of ``count`` groups, −∞ for an empty one."""
    return torch.full((count,), -torch.inf).scatter_reduce(0, groups, values, "amax")
