"""The triplet loss on Euclidean distances."""

from collections.abc import Sequence

import torch
from torch import Tensor


def triplet_loss(descriptors: Tensor, triplets: Sequence[tuple[int, int, Sequence[int]]], margin: float) -> Tensor:
    """Σ over all negatives of max(0, ‖q−p‖ − ‖q−n‖ + √margin), to be divided by the number of negatives.

    descriptors: N×D; triplets: rows of a query, of its positive and of its negatives. Computed in float32.
    """
    rows = [(query, positive, negative) for query, positive, negatives in triplets for negative in negatives]
    index = torch.tensor(rows, dtype=torch.int64, device=descriptors.device).reshape(-1, 3)
    query, positive, negative = (descriptors.float()[index[:, column]] for column in range(3))
    to_positive = torch.linalg.vector_norm(query - positive, dim=1)
    to_negative = torch.linalg.vector_norm(query - negative, dim=1)
    return (to_positive - to_negative + margin**0.5).clamp(min=0).sum()
