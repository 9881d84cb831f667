"""Patch descriptors: means of NetVLAD residuals over every window of a feature map (paper section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from patchnetvlad.netvlad import EPSILON, intra_normalised

# Residuals of as many clusters are made at once as fit into this many bytes: a processor's cache, or a share of an
# accelerator's memory. Each cluster's windows are independent of the others'.
CACHE_BYTES = 4 << 20
DEVICE_BYTES = 1 << 30
_ROWS_AT_ONCE = 64  # patches that are scaled and rounded to another type while they are in a processor's cache


def window_sums(values: Tensor, size: int, stride: int, dim: int) -> Tensor:
    """Sums of ``size`` consecutive entries along ``dim``, every ``stride``-th window, without padding.

    Windows are added up by doubling, from sums alone. Differences of cumulative sums would be cheaper and wrong: in
    an almost empty cluster they are rounding noise, which intra-normalisation turns into a unit vector.
    """
    length = values.shape[dim] - size + 1  # number of windows at stride 1
    total: Tensor | None = None
    offset, width, block = 0, 1, values  # block[i] = sum of values[i : i + width]
    remaining = size
    while True:
        if remaining & 1:
            sums = block.narrow(dim, offset, length)
            total = sums if total is None else total + sums
            offset += width
        remaining >>= 1
        if not remaining:
            break
        count = block.shape[dim] - width
        block = block.narrow(dim, 0, count) + block.narrow(dim, width, count)
        width *= 2
    assert total is not None
    if stride == 1:
        return total
    keep = torch.arange(0, length, stride, device=values.device)
    return total.index_select(dim, keep)


def patch_descriptors(
    local: Tensor,
    assignment: Tensor,
    centroids: Tensor,
    patch_sizes: Sequence[int],
    strides: Sequence[int],
    precision: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Locally-global descriptors of every patch at every size.

    local: N×H×W×C unit local descriptors; assignment: N×H×W×K; centroids: K×C.
    Returns for each patch size p with stride s a tensor N×P×(K·C) of unit rows, patches row-major,
    P = ((H−p)//s+1)·((W−p)//s+1), 0 when a patch does not fit. Computed in float32 and rounded at the end to precision.
    """
    batch, height, width, channels = local.shape
    clusters = centroids.shape[0]
    shapes = [
        (max(0, (height - p) // s + 1), max(0, (width - p) // s + 1)) for p, s in zip(patch_sizes, strides, strict=True)
    ]
    outputs = [local.new_empty(batch, rows * columns, clusters, channels) for rows, columns in shapes]
    squared_norms = [local.new_zeros(batch, rows * columns, 1, 1) for rows, columns in shapes]
    budget = CACHE_BYTES if local.device.type == "cpu" else DEVICE_BYTES
    step = max(1, budget // (local.numel() * 4))
    with torch.autocast(local.device.type, enabled=False):
        for first in range(0, clusters, step):
            chunk = slice(first, min(first + step, clusters))
            residuals = local.unsqueeze(3) - centroids[chunk]  # N×H×W×k×C
            residuals *= assignment[..., chunk].unsqueeze(4)
            for p, s, (rows, columns), output, squared in zip(
                patch_sizes, strides, shapes, outputs, squared_norms, strict=True
            ):
                if rows * columns == 0:
                    continue
                means = window_sums(window_sums(residuals, p, s, 2), p, s, 1) / (p * p)
                means = means.flatten(1, 2)  # N×P×k×C
                norms = torch.linalg.vector_norm(means, dim=-1, keepdim=True)
                scale = norms.clamp(min=EPSILON).reciprocal()
                torch.mul(means, scale, out=output[:, :, chunk])
                squared += (norms * scale).square().sum(dim=2, keepdim=True)
        return tuple(_unit_rows(*of_size, precision).flatten(2) for of_size in zip(outputs, squared_norms, strict=True))


def _unit_rows(rows: Tensor, squared_norms: Tensor, precision: torch.dtype) -> Tensor:
    """N×P×K×C rows, of squared norms N×P×1×1, as unit rows of a type; overwrites both."""
    norms = squared_norms.sqrt_().clamp_(min=EPSILON)
    if precision == rows.dtype:
        return rows.div_(norms)
    unit = torch.empty_like(rows, dtype=precision)
    for first in range(0, rows.shape[1], _ROWS_AT_ONCE):
        chunk = slice(first, first + _ROWS_AT_ONCE)
        unit[:, chunk] = rows[:, chunk] / norms[:, chunk]
    return unit


def chosen_descriptors(
    local: Tensor, assignment: Tensor, centroids: Tensor, size: int, stride: int, chosen: Tensor
) -> Tensor:
    """Some patches' rows of `patch_descriptors`, for one picture and without making the others.

    local: H×W×C unit local descriptors; assignment: H×W×K; centroids: K×C; chosen: n row-major numbers of patches of
    one size, int64. Returns n×(K·C) unit rows, float32.
    """
    columns = (local.shape[1] - size) // stride + 1
    with torch.autocast(local.device.type, enabled=False):
        windows, shares = (
            values.unfold(0, size, stride).unfold(1, size, stride)[chosen // columns, chosen % columns].flatten(2)
            for values in (local, assignment)
        )  # n×C×p², n×K×p²
        residuals = shares @ windows.transpose(1, 2) - shares.sum(dim=2)[..., None] * centroids  # n×K×C
        return intra_normalised(residuals / (size * size))
