"""What training pulls together and pushes apart: global descriptors of queries, positives and negatives, and local
features of which it is known that they show the same point."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from patchnetvlad.homographies import float64_device
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.products import rounds_by_threads, row_products

Triplet: TypeAlias = tuple[int, int, Sequence[int]]
"""Rows of a query, of its positive and of its negatives among the descriptors of a step."""

POSITIVE_SHARPNESS = 1.0  # α, β and λ of the multi-similarity loss, as usual in place recognition
NEGATIVE_SHARPNESS = 50.0
SIMILARITY_MARGIN = 0.0
TEMPERATURE = 0.1  # of the softmax over local features that could correspond
FAR = 1.5  # strides from a point: positions beyond do not show it


@dataclass(frozen=True)
class Loss:
    """A loss. total: descriptors N×D of unit rows, triplets, [train] margin → the sum over all terms, in float32;
    terms: how many there are, by which training divides, so that several processes can share a step; whole_step: a
    query's negatives are all database pictures of a step that lie elsewhere, not those alone that were mined for it."""

    total: Callable[[Tensor, Sequence[Triplet], float], Tensor]
    terms: Callable[[Sequence[Triplet]], int]
    whole_step: bool = False


def triplet_loss(descriptors: Tensor, triplets: Sequence[Triplet], margin: float) -> Tensor:
    """Σ over all negatives of max(0, ‖q−p‖ − ‖q−n‖ + √margin)."""
    rows = [(query, positive, negative) for query, positive, negatives in triplets for negative in negatives]
    index = torch.tensor(rows, dtype=torch.int64, device=descriptors.device).reshape(-1, 3)
    # Not by brackets: threads would add up the gradients of a row that is taken twice in any order
    query, positive, negative = (descriptors.float().index_select(0, index[:, column]) for column in range(3))
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
        # Sums, since products of one row with several are rounded by the number of threads
        similarities = (descriptors[[positive, *negatives]] * descriptors[query]).sum(dim=1) - SIMILARITY_MARGIN
        similar, different = similarities[0], similarities[1:]
        pull = F.softplus(-POSITIVE_SHARPNESS * similar) / POSITIVE_SHARPNESS
        push = F.softplus(torch.logsumexp(NEGATIVE_SHARPNESS * different, dim=0)) / NEGATIVE_SHARPNESS
        total = total + pull + push
    return total


def correspondence_loss(
    anchors: Tensor, matches: Tensor, candidates: Tensor, elsewhere: Tensor, others: Tensor
) -> Tensor:
    """Σ over points of −log softmax(a·m / T) of the true match among all that could be one (InfoNCE, T = TEMPERATURE).

    anchors, matches: n×C, features of the same n points in two views of a picture; candidates: m×C, the second view's
    whole map, and elsewhere: n×m, whether each of its positions is too far from the point to show it; others: k×C,
    features of other pictures. Rows are normalised here.
    """
    anchors, matches, candidates, others = (
        F.normalize(features.float(), dim=1) for features in (anchors, matches, candidates, others)
    )
    true = (anchors * matches).sum(dim=1, keepdim=True)
    false = _similarities(anchors, candidates).masked_fill(~elsewhere, -torch.inf)
    logits = torch.cat([true, false, _similarities(anchors, others)], dim=1) / TEMPERATURE
    return (torch.logsumexp(logits, dim=1) - logits[:, 0]).sum()


def _similarities(rows: Tensor, others: Tensor) -> Tensor:
    """n×m, the products of n×C and m×C rows; on a processor the same for any number of threads."""
    return row_products(rows[None, None], others)[0, 0] if rounds_by_threads(rows) else rows @ others.T


@dataclass(frozen=True, eq=False)
class ViewPair:
    """Two views of one picture, known by a number.

    first, second: their feature maps, C×h×w of the same size; homography: 3×3 on any device, from the pixels of the
    first view to those of the second; positions: n rows of the first map's positions, row-major, each of which the
    second map shows (`seen_positions`)."""

    picture: int
    first: Tensor
    second: Tensor
    homography: Tensor
    positions: Tensor


def view_loss(pairs: Sequence[ViewPair], grid: PatchGrid) -> Tensor:
    """Σ over pairs of the mean `correspondence_loss` of their points; grid: of single positions of the maps.

    The match of a point is interpolated in the second map; its positions more than FAR strides away could be mistaken
    for it, and so could all points of other pictures.
    """
    centers = grid.centers().to(pairs[0].first.device)
    targets = [moved(centers[pair.positions], pair.homography) for pair in pairs]
    matches = [_interpolated(pair.second, target, grid) for pair, target in zip(pairs, targets, strict=True)]
    total = pairs[0].first.new_zeros(())
    for pair, target, match in zip(pairs, targets, matches, strict=True):
        if not len(target):
            continue
        anchors, candidates = pair.first.flatten(1).T[pair.positions], pair.second.flatten(1).T
        elsewhere = torch.cdist(target, centers) > FAR * grid.geometry.stride
        of_all = zip(pairs, matches, strict=True)
        others = torch.cat([match[:0], *(points for other, points in of_all if other.picture != pair.picture)])
        total = total + correspondence_loss(anchors, match, candidates, elsewhere, others) / len(target)
    return total


def seen_positions(homography: Tensor, grid: PatchGrid) -> Tensor:
    """Rows of the positions whose points a view moved by a homography shows between the centres of its positions."""
    centers = grid.centers()
    inside = moved(centers, homography)
    low, high = centers.amin(dim=0), centers.amax(dim=0)
    return torch.nonzero(((inside >= low) & (inside <= high)).all(dim=1)).flatten()


def moved(points: Tensor, homography: Tensor) -> Tensor:
    """n×2 points through a homography, 3×3; those that come to lie behind the camera are not a number."""
    where = float64_device(points.device)
    projected = F.pad(points.to(where).double(), (0, 1), value=1.0) @ homography.to(where).double().T
    depth = projected[:, 2:]
    return (projected[:, :2] / depth.where(depth > 0, torch.nan)).to(points.dtype).to(points.device)


def _interpolated(feature_map: Tensor, points: Tensor, grid: PatchGrid) -> Tensor:
    """n×C, a map bilinearly interpolated at n points in pixels."""
    stride, first = grid.geometry.stride, grid.geometry.first_center
    span = torch.tensor([max(1, grid.columns - 1), max(1, grid.rows - 1)], device=points.device) * stride
    relative = 2 * (points - first) / span - 1
    return F.grid_sample(feature_map[None], relative[None, None].to(feature_map.dtype), align_corners=True)[0, :, 0].T


TRIPLET = Loss(triplet_loss, lambda triplets: sum(len(negatives) for _, _, negatives in triplets))
MULTI_SIMILARITY = Loss(multi_similarity_loss, len, whole_step=True)
