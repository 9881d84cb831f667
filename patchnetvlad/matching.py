"""Mutual nearest neighbours between the patches of two pictures (paper section 3.3), and what is said of them."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def mutual_matches(query: Tensor, reference: Tensor) -> Matches:
    """Mutual nearest neighbours of two sets of unit descriptors, Pq×D and Pr×D, on any device.

    The nearest neighbour has the largest dot product, which orders pairs as the distance of unit vectors does; of
    equal ones the lowest index is nearest, in both directions. Either set may be empty.
    """
    if len(query) == 0 or len(reference) == 0:
        return _no_matches()
    similarity = query @ reference.T  # Pq×Pr
    best, nearest = similarity.max(dim=1)  # of equal values torch names the first
    column_best = similarity.amax(dim=0)
    rows = (best == column_best[nearest]).nonzero()[:, 0]
    # Each of these rows attains the maximum of its column; where another row does so too, only the first counts.
    # Finding that row costs far more than the maximum, so it is done only if some column has a tie.
    if int((similarity == column_best).count_nonzero()) > len(reference):
        rows = rows[similarity.argmax(dim=0)[nearest[rows]] == rows]
    return Matches(rows.cpu(), nearest[rows].cpu())


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


def _no_matches() -> Matches:
    return Matches(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
