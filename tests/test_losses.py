"""Losses of training: by hand, against other implementations, and their gradients."""

import math

import cv2
import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import MultiSimilarityLoss

from patchnetvlad.config import LOSSES
from patchnetvlad.errors import UserError
from patchnetvlad.losses import (
    TEMPERATURE,
    ViewPair,
    correspondence_loss,
    moved,
    multi_similarity_loss,
    seen_positions,
    triplet_loss,
    view_loss,
)
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid


def test_triplet_loss_by_hand() -> None:
    descriptors = torch.tensor([[0.0, 0], [3, 4], [0, 6], [0, 5.1], [0, 1]])
    # ‖q−p‖ = 5; negatives at 6, 5.1 and 1; √0.25 = 0.5
    loss = triplet_loss(descriptors, [(0, 1, [2, 3]), (0, 1, [4])], 0.25)
    assert loss.item() == pytest.approx(0 + 0.4 + 4.5)


def test_triplet_loss_equals_torch_and_has_its_gradient() -> None:
    torch.manual_seed(0)
    descriptors = torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1).float().requires_grad_()
    ours = triplet_loss(descriptors, [(0, 1, [2, 3]), (4, 5, [3])], 0.1)
    reference = torch.nn.TripletMarginLoss(margin=0.1**0.5, reduction="sum", eps=0)
    theirs = reference(descriptors[[0, 0, 4]], descriptors[[1, 1, 5]], descriptors[[2, 3, 3]])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (our_gradient,) = torch.autograd.grad(ours, descriptors)
    (their_gradient,) = torch.autograd.grad(theirs, descriptors)
    torch.testing.assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_pictures_give_finite_gradients(name: str) -> None:
    descriptors = torch.ones(3, 4, requires_grad=True)
    LOSSES[name].total(descriptors, [(0, 1, [2])], 0.1).backward()
    assert descriptors.grad is not None and torch.isfinite(descriptors.grad).all()


def test_multi_similarity_loss_by_hand() -> None:
    descriptors = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1], [0.8, 0.6]])
    loss = multi_similarity_loss(descriptors, [(0, 1, [2, 3])], 0.1)
    expected = math.log(1 + math.exp(-0.6)) + math.log(1 + math.exp(0) + math.exp(50 * 0.8)) / 50
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_multi_similarity_loss_equals_another_and_has_its_gradient() -> None:
    torch.manual_seed(1)
    descriptors = torch.nn.functional.normalize(torch.randn(8, 16), dim=1).requires_grad_()
    triplets = [(0, 1, [2, 3, 6]), (4, 5, [3, 7])]
    ours = multi_similarity_loss(descriptors, triplets, 0.1)
    pairs = [torch.tensor(side) for side in ([0, 4], [1, 5], [0, 0, 0, 4, 4], [2, 3, 6, 3, 7])]
    reference = MultiSimilarityLoss(1, 50, 0, distance=DotProductSimilarity(normalize_embeddings=False))
    theirs = reference(descriptors, indices_tuple=tuple(pairs)) * len(descriptors)  # which takes the mean over all rows
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    (our_gradient,) = torch.autograd.grad(ours, descriptors)
    (their_gradient,) = torch.autograd.grad(theirs, descriptors)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_terms_make_shares_of_a_step_add_up() -> None:
    torch.manual_seed(2)
    descriptors = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    triplets = [(0, 1, [2, 3, 6]), (4, 5, [3, 7])]
    assert [LOSSES[name].terms(triplets) for name in ("triplet", "multi_similarity")] == [5, 2]
    for loss in LOSSES.values():
        shares = sum(loss.total(descriptors, [one], 0.1) for one in triplets)
        torch.testing.assert_close(shares, loss.total(descriptors, triplets, 0.1))


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[train\] loss = hinge: expected one of triplet, multi_similarity"):
        LOSSES.find("hinge")


def test_correspondence_loss_by_hand() -> None:
    anchors, matches = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[3.0, 0], [1, 1]])
    candidates, others = torch.tensor([[1.0, 0], [0, 5], [0, -1]]), torch.tensor([[0.6, 0.8]])
    elsewhere = torch.tensor([[False, True, True], [True, False, True]])
    first = math.log(sum(math.exp(value / TEMPERATURE) for value in (1, 0, 0, 0.6))) - 1 / TEMPERATURE
    slanted = math.sqrt(0.5)
    second = math.log(sum(math.exp(value / TEMPERATURE) for value in (slanted, 0, -1, 0.8))) - slanted / TEMPERATURE
    loss = correspondence_loss(anchors, matches, candidates, elsewhere, others)
    assert loss.item() == pytest.approx(first + second, rel=1e-5)


def test_points_move_as_opencv_moves_them() -> None:
    homography = np.array([[1.1, 0.1, 3], [-0.2, 0.9, 5], [1e-3, 2e-3, 1]])
    points = np.array([[0.0, 0], [10, 20], [33, 7]])
    expected = cv2.perspectiveTransform(points[None], homography)[0]
    ours = moved(torch.from_numpy(points).float(), torch.from_numpy(homography))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5)
    behind = moved(torch.tensor([[-2000.0, 0.0]]), torch.from_numpy(homography))
    assert torch.isnan(behind).all()


GRID = PatchGrid(6, 8, 1, geometry=EncoderGeometry(stride=16, receptive_field=1, padding=0))
SHIFT = torch.tensor([[1.0, 0, -32], [0, 1, 16], [0, 0, 1]])  # two positions to the left, one down


def test_a_view_shows_what_lies_inside() -> None:
    rows = [(row, column) for row in range(6) for column in range(8) if column >= 2 and row <= 4]
    assert seen_positions(SHIFT, GRID).tolist() == [row * 8 + column for row, column in rows]


def test_view_loss_is_small_for_the_true_homography_alone() -> None:
    """The second map is the first, shifted; a third belongs to another picture."""
    torch.manual_seed(0)
    first, other = torch.randn(2, 16, 6, 8)
    second = torch.roll(first, (1, -2), (1, 2))
    seen = seen_positions(SHIFT, GRID)
    back = torch.linalg.inv(SHIFT)
    right = view_loss(
        [ViewPair(7, first, second, SHIFT, seen), ViewPair(7, second, first, back, seen_positions(back, GRID))], GRID
    )
    stays = torch.eye(3)
    wrong = view_loss([ViewPair(7, first, second, stays, seen)], GRID)
    assert right < 0.2 < 2 < wrong
    beside = [ViewPair(number, other, other, stays, seen) for number in (7, 8)]  # the other picture's count against
    same, apart = (view_loss([ViewPair(7, first, second, SHIFT, seen), one], GRID) for one in beside)
    assert same < apart


def test_view_loss_reaches_every_map_with_its_gradient() -> None:
    torch.manual_seed(1)
    maps = torch.randn(4, 4, 6, 8, requires_grad=True)
    seen = seen_positions(SHIFT, GRID)[:5]
    pairs = [ViewPair(0, maps[0], maps[1], SHIFT, seen), ViewPair(1, maps[2], maps[3], SHIFT, seen)]
    view_loss(pairs, GRID).backward()
    assert maps.grad is not None and torch.isfinite(maps.grad).all()
    assert (maps.grad.flatten(1).abs().amax(dim=1) > 0).all()
    nothing = view_loss([ViewPair(0, maps[0], maps[1], SHIFT, seen[:0])], GRID)
    assert nothing.item() == 0
