"""NetVLAD against the published values and against sums written out."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from patchnetvlad.netvlad import NetVLAD, intra_normalised


def test_initialisation_and_forward_equal_the_published_values(reference):
    pool = NetVLAD(16, 32)
    alpha = pool.initialise(
        torch.from_numpy(reference["vlad_clusters"]), torch.from_numpy(reference["vlad_descriptors"])
    )
    np.testing.assert_allclose(alpha, reference["vlad_alpha"], rtol=1e-5)
    np.testing.assert_allclose(pool.conv.weight.detach(), reference["vlad_conv_weight"], rtol=1e-5)
    output = pool(torch.from_numpy(reference["vlad_input"])).detach()
    np.testing.assert_allclose(output, reference["vlad_output"], atol=1e-5)


def test_forward_is_the_written_out_sum():
    torch.manual_seed(0)
    pool = NetVLAD(3, 4, vladv2=True)
    features = torch.randn(2, 4, 5, 6)
    for picture in range(2):
        expected = torch.zeros(3, 4)
        for y in range(5):
            for x in range(6):
                local = F.normalize(features[picture, :, y, x], dim=0)
                share = (pool.conv.weight[:, :, 0, 0] @ local + pool.conv.bias).softmax(0)
                expected += share[:, None] * (local - pool.centroids)
        expected = F.normalize(F.normalize(expected, dim=1).flatten(), dim=0)
        torch.testing.assert_close(pool(features)[picture], expected, atol=1e-6, rtol=1e-5)


def test_an_empty_cluster_stays_near_zero():
    residuals = torch.tensor([[[3.0, 4.0], [1e-15, 0.0]]])
    normalised = intra_normalised(residuals)
    torch.testing.assert_close(normalised, torch.tensor([[0.6, 0.8, 1e-3, 0.0]]), atol=1e-6, rtol=1e-3)


def test_v2_initialisation_makes_softmax_a_function_of_distances():
    torch.manual_seed(1)
    centers, samples = torch.rand(5, 8), F.normalize(torch.rand(200, 8), dim=1)
    pool = NetVLAD(5, 8, vladv2=True)
    alpha = pool.initialise(centers, samples)
    distances = torch.cdist(samples, centers).square()
    nearest = distances.topk(2, largest=False).values
    assert math.isclose(alpha, -math.log(0.01) / (nearest[:, 1] - nearest[:, 0]).mean().item(), rel_tol=1e-4)
    _, assignment = pool.assign(samples.T.reshape(1, 8, 10, 20))
    torch.testing.assert_close(assignment.reshape(200, 5), (-alpha * distances).softmax(1), atol=1e-4, rtol=1e-3)


def test_autocast_around_it_changes_nothing():
    torch.manual_seed(2)
    pool, features = NetVLAD(4, 16), torch.randn(1, 16, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = pool(features)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, pool(features))


def test_gradients_reach_every_parameter_and_the_input():
    torch.manual_seed(3)
    pool, features = NetVLAD(3, 4), torch.randn(1, 4, 2, 2, requires_grad=True)
    pool(features).square().mul(torch.rand(12)).sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in pool.parameters())
