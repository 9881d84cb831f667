"""Losses of training: by hand, against other implementations, and their gradients."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import MultiSimilarityLoss

from patchnetvlad.errors import UserError
from patchnetvlad.losses import LOSSES, find_loss, multi_similarity_loss, triplet_loss


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
        find_loss("hinge")
