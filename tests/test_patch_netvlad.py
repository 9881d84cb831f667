"""Patch descriptors: windows written out, symmetries, and precision where clusters are almost empty."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_netvlad import chosen_descriptors, patch_descriptors, window_sums


def written_out(local, assignment, centroids, size, stride):
    """One picture, float64, window by window: P×(K·C)."""
    local, assignment, centroids = local.double(), assignment.double(), centroids.double()
    height, width = local.shape[:2]
    rows = []
    for y in range(0, height - size + 1, stride):
        for x in range(0, width - size + 1, stride):
            window = local[y : y + size, x : x + size].flatten(0, 1)
            share = assignment[y : y + size, x : x + size].flatten(0, 1)
            residuals = window[:, None] - centroids
            mean = (share[:, :, None] * residuals).mean(0)
            rows.append(F.normalize(F.normalize(mean, dim=1, eps=1e-12).flatten(), dim=0, eps=1e-12))
    return torch.stack(rows) if rows else torch.empty(0, centroids.numel(), dtype=torch.float64)


def scene(batch=1, height=7, width=9, channels=6, clusters=5, sharpness=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    local = F.normalize(torch.rand(batch, height, width, channels, generator=generator), dim=-1)
    centroids = torch.rand(clusters, channels, generator=generator)
    assignment = (sharpness * local @ centroids.T).softmax(-1)
    return local, assignment, centroids


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 9), stride=st.integers(1, 4), length=st.integers(1, 12))
def test_window_sums_are_sums_of_windows(size, stride, length):
    values = torch.arange(length * 2, dtype=torch.float32).square().reshape(length, 2)
    if length < size:
        return
    expected = torch.stack([values[i : i + size].sum(0) for i in range(0, length - size + 1, stride)])
    torch.testing.assert_close(window_sums(values, size, stride, 0), expected)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 1), (3, 2), (5, 3), (7, 1), (8, 1)])
def test_descriptors_are_normalised_window_means(size, stride):
    local, assignment, centroids = scene(batch=2)
    (patches,) = patch_descriptors(local, assignment, centroids, [size], [stride])
    for picture in range(2):
        expected = written_out(local[picture], assignment[picture], centroids, size, stride)
        assert patches[picture].shape == expected.shape
        torch.testing.assert_close(patches[picture].double(), expected, atol=1e-6, rtol=1e-5)


def test_another_precision_rounds_the_same_descriptors():
    local, assignment, centroids = scene(batch=2, height=14, width=13)
    exact = patch_descriptors(local, assignment, centroids, [2, 6], [1, 3])
    rounded = patch_descriptors(local, assignment, centroids, [2, 6], [1, 3], torch.bfloat16)
    assert exact[0].shape[1] > 2 * 64 and exact[0].dtype == torch.float32
    for of_size, rough in zip(exact, rounded, strict=True):
        assert rough.dtype == torch.bfloat16 and torch.equal(of_size.bfloat16(), rough)


@pytest.mark.parametrize("sharpness", [100.0, 1000.0])
def test_almost_empty_clusters_keep_their_direction(sharpness):
    local, assignment, centroids = scene(height=12, width=12, channels=32, clusters=16, sharpness=sharpness)
    for size, patches in zip((2, 5), patch_descriptors(local, assignment, centroids, [2, 5], [1, 1]), strict=True):
        expected = written_out(local[0], assignment[0], centroids, size, 1)
        assert F.cosine_similarity(patches[0].double(), expected).min() > 0.99999


@torch.inference_mode()
def test_a_window_as_large_as_the_map_is_the_global_descriptor():
    torch.manual_seed(0)
    pool = NetVLAD(4, 8)
    local, assignment = pool.assign(torch.rand(2, 8, 6, 6))
    (patches,) = patch_descriptors(local, assignment, pool.centroids, [6], [1])
    torch.testing.assert_close(patches[:, 0], pool.aggregate(local, assignment), atol=1e-6, rtol=1e-5)


def test_a_shifted_map_gives_shifted_patches():
    local, assignment, centroids = scene(height=9, width=10)
    (whole,) = patch_descriptors(local, assignment, centroids, [3], [1])
    (part,) = patch_descriptors(local[:, 2:, 1:], assignment[:, 2:, 1:], centroids, [3], [1])
    whole = whole.reshape(7, 8, -1)
    torch.testing.assert_close(part.reshape(5, 7, -1), whole[2:, 1:])


def test_scales_together_equal_scales_alone():
    local, assignment, centroids = scene()
    together = patch_descriptors(local, assignment, centroids, [2, 5, 8], [1, 2, 1])
    assert [patches.shape[1] for patches in together] == [48, 6, 0]
    for patches, size, stride in zip(together, [2, 5, 8], [1, 2, 1], strict=True):
        torch.testing.assert_close(patches, patch_descriptors(local, assignment, centroids, [size], [stride])[0])


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 3), (5, 2)])
def test_chosen_patches_are_rows_of_all_patches(size, stride):
    local, assignment, centroids = scene(batch=2)
    (patches,) = patch_descriptors(local, assignment, centroids, [size], [stride])
    chosen = torch.tensor([len(patches[1]) - 1, 0, len(patches[1]) // 2])
    found = chosen_descriptors(local[1], assignment[1], centroids, size, stride, chosen)
    torch.testing.assert_close(found, patches[1, chosen], atol=2e-6, rtol=1e-5)
    assert chosen_descriptors(local[1], assignment[1], centroids, size, stride, chosen[:0]).shape == (0, 30)
