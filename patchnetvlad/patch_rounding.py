"""Descriptors rounded to 8 bits at random, up or down, so that the expected value is exact.

The error of a similarity is then a sum of independent terms of mean 0, and Hoeffding's inequality bounds it far below
what lengths alone (Cauchy-Schwarz) allow.
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
    """P descriptors in 8 bits: row ≈ scale · levels.

    levels: int8 P×D; scale: float32 (P,); norm: float32 (P,), lengths of the rows before rounding.
    """

    levels: Tensor
    scale: Tensor
    norm: Tensor


def round_patches(rows: Tensor, role: Role) -> RoundedPatches:
    """Round P×D float32 rows on the CPU; those of a query go with those of a reference, and the result is always the
    same."""
    count, dims = rows.shape
    dither = torch.rand(dims, generator=torch.Generator().manual_seed(_SEEDS[role]))
    levels = torch.empty(count, dims, dtype=torch.int8)
    scale, norm = torch.empty(count), torch.empty(count)
    for first in range(0, count, ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        block = rows[some]
        norm[some] = torch.linalg.vector_norm(block, dim=1)
        lowest, highest = block.aminmax(dim=1)
        scale[some] = torch.maximum(-lowest, highest).div_(LEVELS).clamp_(min=1e-30)
        levels[some] = torch.addcmul(dither, block, scale[some].reciprocal()[:, None]).floor_()
    return RoundedPatches(levels, scale, norm)


def rounded_bytes(count: int, dims: int) -> int:
    """Memory of count×dims rounded descriptors."""
    return count * (dims + 8)


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


def similarity_errors(query: RoundedPatches, reference: RoundedPatches) -> tuple[Tensor, Tensor]:
    """How far the product of rounded rows may be from the similarity, for each row (Pq) and each column (Pr).

    With one scale s for each row, errors lie in an interval of length s: by Hoeffding their sum, weighted by the other
    row r, is beyond t with a chance of 2·exp(−2t²/(s²‖r‖²)). The rounded query is at most s·√D longer than the query.
    """
    factor = math.sqrt(math.log(2 / CHANCE) / 2)
    length = query.norm + query.scale * math.sqrt(query.levels.shape[1])
    row = torch.hypot(query.scale * reference.norm.max(), length * reference.scale.max())
    column = torch.hypot(query.scale.max() * reference.norm, length.max() * reference.scale)
    return factor * row + FLOAT_SLACK, factor * column + FLOAT_SLACK
