"""Descriptors rounded to 8 bits at random, up or down, so that what is lost is known in distribution.

The error of a similarity is then a sum of independent terms of mean 0, and its tails are bounded far below what lengths
alone (Cauchy-Schwarz) allow.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Role = Literal["query", "reference"]

LEVELS = 126  # largest integer used: rounding up stays within int8
CHANCE = 1e-18  # that a similarity is further off than its bound
FLOAT_SLACK = 4e-6  # what float32 rounding may add to the similarity of unit rows
ROWS_AT_ONCE = 64  # rows that pass through a processor's cache together

# Two fixed dithers: the errors of query and reference must not depend on each other.
_SEEDS: dict[Role, int] = {"query": 20210621, "reference": 20210622}


@dataclass(frozen=True)
class RoundedPatches:
    """P descriptors in 8 bits: row ≈ scale · (levels + the role's shift), see `shift`.

    levels: int8 P×D; scale: float32 (P,); norm: float32 (P,), lengths of the rows before rounding; offset: float32
    (P,), what the other role's shift adds to the products of each row.
    """

    levels: Tensor
    scale: Tensor
    norm: Tensor
    offset: Tensor


def round_patches(rows: Tensor, role: Role) -> RoundedPatches:
    """Round P×D float32 rows on the CPU; those of a query go with those of a reference, and the result is always the
    same."""
    count, dims = rows.shape
    dither = _dither(dims, role)
    own, other = (shift(dims, side) for side in (role, _other(role)))
    levels = torch.empty(count, dims, dtype=torch.int8)
    scale, norm, offset = (torch.empty(count) for _ in range(3))
    for first in range(0, count, ROWS_AT_ONCE):
        chunk = slice(first, first + ROWS_AT_ONCE)
        block = rows[chunk]
        norm[chunk] = torch.linalg.vector_norm(block, dim=1)
        # aminmax of rows takes twenty times as long as both
        scale[chunk] = torch.maximum(-block.amin(dim=1), block.amax(dim=1)).div_(LEVELS).clamp_(min=1e-30)
        whole = torch.addcmul(dither, block, scale[chunk].reciprocal()[:, None]).floor_()
        levels[chunk] = whole
        offset[chunk] = whole @ other
    # Half of what the two shifts make together: both roles add it
    return RoundedPatches(levels, scale, norm, offset + 0.5 * float(own.double() @ other.double()))


def shift(dims: int, role: Role) -> Tensor:
    """What is added to the levels of a role, so that the errors are uniform within half a level and of mean 0: (D,)."""
    return 0.5 - _dither(dims, role)


def approximate_similarities(query: RoundedPatches, reference: RoundedPatches) -> Tensor:
    """Pq×Pr products of rounded rows, float32; within `similarity_errors` of the similarities."""
    products = torch._int_mm(query.levels, reference.levels.T).float()  # exact before it becomes float
    return products.add_(reference.offset).add_(query.offset[:, None]).mul_(reference.scale).mul_(query.scale[:, None])


def similarity_errors(query: RoundedPatches, reference: RoundedPatches) -> tuple[Tensor, Tensor]:
    """How far the product of rounded rows may be from the similarity, for each row (Pq) and each column (Pr).

    Rounding with one scale s for a row leaves independent errors, uniform in an interval of length s. Such an error is
    sub-Gaussian with its variance s²/12, so their sum, weighted by the other row r, is beyond t with a chance of at
    most 2·exp(−6t²/(s²‖r‖²)). The similarity's error is the sum of the query's, weighted by the reference, and the
    reference's, weighted by the rounded query, which is at most s·√D/2 longer than the query: variances add.
    """
    factor = math.sqrt(math.log(2 / CHANCE) / 6)
    length = query.norm + query.scale * (math.sqrt(query.levels.shape[1]) / 2)
    row = torch.hypot(query.scale * reference.norm.max(), length * reference.scale.max())
    column = torch.hypot(query.scale.max() * reference.norm, length.max() * reference.scale)
    slack = FLOAT_SLACK * max(1.0, float(length.max() * reference.norm.max()))
    return factor * row + slack, factor * column + slack


def rounded_bytes(count: int, dims: int) -> int:
    """Memory of count×dims rounded descriptors."""
    return count * (dims + 12)


def integer_products(left: Tensor, right: Tensor) -> Tensor:
    """P×R products of the rows of two int8 matrices on the CPU, P×D and R×D, float32; rounded once, whatever the
    processor. −128 must not occur."""
    if left.shape[1] > 1 and products_are_exact():
        return torch._int_mm(left, right.T).float()
    return (left.double() @ right.double().T).float()


@lru_cache(maxsize=1)
def products_are_exact() -> bool:
    """Whether this machine multiplies int8 matrices without loss: some processors saturate 16-bit sums."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(-LEVELS, LEVELS + 1, (64, 256), dtype=torch.int8, generator=generator)
    largest = torch.full((64, 256), LEVELS, dtype=torch.int8)
    for first, second in ((mixed, mixed.flip(0)), (largest, largest), (largest, -largest), (largest, mixed)):
        if not torch.equal(torch._int_mm(first, second.T), first.int() @ second.int().T):
            return False
    return True


def _other(role: Role) -> Role:
    return "reference" if role == "query" else "query"


@lru_cache(maxsize=16)
def _dither(dims: int, role: Role) -> Tensor:
    """Uniform numbers in [0, 1), (D,)."""
    return torch.rand(dims, generator=torch.Generator().manual_seed(_SEEDS[role]))
