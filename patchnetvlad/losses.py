"""Losses by name: what training pulls together and pushes apart, given mined sets of a query, a positive, negatives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from patchnetvlad.errors import UserError

Triplet: TypeAlias = tuple[int, int, Sequence[int]]
"""Rows of a query, of its positive and of its negatives among the descriptors of a step."""

POSITIVE_SHARPNESS = 1.0  # α, β and λ of the multi-similarity loss, as usual in place recognition
NEGATIVE_SHARPNESS = 50.0
SIMILARITY_MARGIN = 0.0


@dataclass(frozen=True)
class Loss:
    """A loss. total: descriptors N×D of unit rows, triplets, [train] margin → the sum over all terms, in float32;
    terms: how many there are, by which training divides, so that several processes can share a step."""

    total: Callable[[Tensor, Sequence[Triplet], float], Tensor]
    terms: Callable[[Sequence[Triplet]], int]


def triplet_loss(descriptors: Tensor, triplets: Sequence[Triplet], margin: float) -> Tensor:
    """Σ over all negatives of max(0, ‖q−p‖ − ‖q−n‖ + √margin)."""
    rows = [(query, positive, negative) for query, positive, negatives in triplets for negative in negatives]
    index = torch.tensor(rows, dtype=torch.int64, device=descriptors.device).reshape(-1, 3)
    query, positive, negative = (descriptors.float()[index[:, column]] for column in range(3))
    to_positive = torch.linalg.vector_norm(query - positive, dim=1)
    to_negative = torch.linalg.vector_norm(query - negative, dim=1)
    return (to_positive - to_negative + margin**0.5).clamp(min=0).sum()


def multi_similarity_loss(descriptors: Tensor, triplets: Sequence[Triplet], margin: float) -> Tensor:
    """Σ over all queries of log(1 + e^(−α(q·p−λ)))/α + log(1 + Σₙ e^(β(q·n−λ)))/β (Wang et al., CVPR 2019).

    Hard negatives weigh more by themselves; the margin only decides which are mined.
    """
    descriptors = descriptors.float()
    total = descriptors.new_zeros(())
    for query, positive, negatives in triplets:
        similar = descriptors[query] @ descriptors[positive] - SIMILARITY_MARGIN
        different = descriptors[list(negatives)] @ descriptors[query] - SIMILARITY_MARGIN
        pull = F.softplus(-POSITIVE_SHARPNESS * similar) / POSITIVE_SHARPNESS
        push = F.softplus(torch.logsumexp(NEGATIVE_SHARPNESS * different, dim=0)) / NEGATIVE_SHARPNESS
        total = total + pull + push
    return total


LOSSES: dict[str, Loss] = {
    "triplet": Loss(triplet_loss, lambda triplets: sum(len(negatives) for _, _, negatives in triplets)),
    "multi_similarity": Loss(multi_similarity_loss, len),
}


def find_loss(name: str) -> Loss:
    """A loss by its name in the table; raises UserError for another name."""
    if name not in LOSSES:
        raise UserError(f"[train] loss = {name}: expected one of {', '.join(LOSSES)}")
    return LOSSES[name]
