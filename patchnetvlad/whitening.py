"""WPCA: fit a whitening projection on descriptors, and apply it (paper section 4.1)."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from patchnetvlad.errors import UserError, by_number
from patchnetvlad.netvlad import EPSILON
from patchnetvlad.products import KeptWeight, rounds_by_threads

EIGENVALUE_FLOOR = 1e-9  # added to eigenvalues before the power, so that empty directions stay finite
PLACE_DIMENSIONS = 1024  # principal directions within which differences are whitened; beyond is mostly noise
PLACE_SHRINKAGE = 0.2  # share of an even spread in what differences are taken to spread like: they are few
COLUMNS_AT_ONCE = 4096  # the same for columns, where there are more of these
ROWS_OF_A_THREAD = 256  # of a product in float64
ROWS_AT_ONCE = 1024  # rows turned into float64 at a time while the covariance is summed


class WPCA(nn.Module):
    """Projection to D whitened dimensions and L2 normalisation.

    One 1×1 convolution under its published names ``0.weight`` (D, K·C, 1, 1) and ``0.bias`` (D,). It is applied as a
    matrix product over rows: the global descriptor's and all patches' alike.
    """

    def __init__(self, input_dims: int, output_dims: int) -> None:
        super().__init__()
        self.add_module("0", nn.Conv2d(input_dims, output_dims, kernel_size=1))
        self._kept = KeptWeight()

    @property
    def weight(self) -> Tensor:
        """D×(K·C)."""
        return self.get_parameter("0.weight").flatten(1)

    @property
    def bias(self) -> Tensor:
        """D entries."""
        return self.get_parameter("0.bias")

    @property
    def output_dims(self) -> int:
        return self.weight.shape[0]

    def forward(self, descriptors: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
        """…×(K·C) rows to …×D unit rows, float32; precision: of the matrix product."""
        with torch.autocast(descriptors.device.type, enabled=False):
            rows = descriptors.to(precision)
            if precision == torch.float32 and (torch.is_grad_enabled() or not rounds_by_threads(rows)):
                projected = F.linear(rows, self.weight, self.bias)
            else:
                projected = self._kept.product(rows, self.weight, self.bias).float()
            # In place, since the patches of one picture may take 46 MB, except where gradients need the former values
            return F.normalize(projected, dim=-1, eps=EPSILON, out=None if projected.requires_grad else projected)

    @torch.no_grad()
    def set_fit(self, fit: "WPCAFit") -> None:
        """Take over a fitted projection of the same shape."""
        self.weight.copy_(torch.from_numpy(fit.weight).float())
        self.bias.copy_(torch.from_numpy(fit.bias).float())


@dataclass(frozen=True)
class WPCAFit:
    """A fitted projection, all float64.

    weight: D×dims; bias: D; mean: dims; eigenvalues: D, largest first; directions: dims×D, unit columns, orthonormal
    unless differences were whitened; total_variance: the trace of the covariance; num_samples: rows it was fitted on.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    mean: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    directions: NDArray[np.float64]
    total_variance: float
    num_samples: int

    @property
    def explained_variance(self) -> float:
        """Share of the samples' variance inside the kept dimensions, 0 to 1."""
        return float(self.eigenvalues.sum() / self.total_variance) if self.total_variance > 0 else 0.0


def fit_wpca(samples: NDArray[np.floating], num_pcs: int, whitening: float = 1.0) -> WPCAFit:
    """Principal components of samples (n×dims) and their whitening.

    The mean μ is subtracted, the covariance has divisor n−1, eigenvalues λ come from a symmetric solver (in the
    n×n dual form when n < dims). weight = diag((λ+1e-9)^(−whitening/2))·Uᵀ, bias = −weight·μ: whitening 1 makes
    every kept dimension's variance 1, 0 only rotates.

    Beside the samples it needs about 2·m²·8 bytes, m = min(n, dims): 1.1 GB for 10,000×8,192.
    Raises UserError when num_pcs is not below the number of samples, or above dims.
    """
    num_samples, dims = samples.shape
    if not 0.0 <= whitening <= 1.0:
        raise UserError(f"WPCA: whitening = {whitening:g} is outside 0 (rotate only) to 1 (whiten fully)")
    check_num_pcs(num_pcs, num_samples, dims)
    mean = samples.mean(axis=0, dtype=np.float64)
    if num_samples < dims:
        eigenvalues, directions, total = _dual_components(samples, mean, num_pcs)
    else:
        eigenvalues, directions, total = _primal_components(samples, mean, num_pcs)
    weight = (eigenvalues + EIGENVALUE_FLOOR)[:, None] ** (-whitening / 2) * directions.T
    bias = -_product(weight, mean[:, None])[:, 0]
    return WPCAFit(weight, bias, mean, eigenvalues, directions, total, num_samples)


def fit_place_whitening(
    samples: NDArray[np.floating], differences: NDArray[np.floating], num_pcs: int, whitening: float = 1.0
) -> WPCAFit:
    """Whiten what differs between descriptors of one place, then keep the principal components of all samples.

    samples: n×dims; differences: m×dims, each between two descriptors that show one place. Within the samples' first
    PLACE_DIMENSIONS principal directions the differences' scatter, drawn towards an even one by PLACE_SHRINKAGE, is
    taken to the power −whitening/2: what changes at one place counts less, what tells places apart counts more
    (linear discriminant projections: Cai, Mikolajczyk, Matas 2011). Raises UserError as `fit_wpca` does.
    """
    check_num_pcs(num_pcs, *samples.shape)
    kept = max(num_pcs, min(PLACE_DIMENSIONS, len(samples) - 1, samples.shape[1]))
    rotation = fit_wpca(samples, kept, whitening=0.0)
    scatter = np.zeros((kept, kept))
    for first in range(0, len(differences), ROWS_AT_ONCE):
        turned = _product(differences[first : first + ROWS_AT_ONCE].astype(np.float64), rotation.directions)
        scatter += _product(turned.T, turned)
    even = np.trace(scatter) / kept
    if even > 0:
        scatter /= even
    spread, axes = _largest((1 - PLACE_SHRINKAGE) * scatter + PLACE_SHRINKAGE * np.eye(kept), kept)
    whiten = axes * spread ** (-whitening / 2)
    covariance = _product(whiten.T, rotation.eigenvalues[:, None] * whiten)  # of the samples, whitened
    total = float(np.trace(covariance))
    values, vectors = _largest(covariance, num_pcs)
    weight = _product(rotation.directions, _product(whiten, vectors)).T
    directions = weight.T / np.linalg.norm(weight, axis=1)
    bias = -_product(weight, rotation.mean[:, None])[:, 0]
    return WPCAFit(weight, bias, rotation.mean, values, directions, total, len(samples))


def check_num_pcs(num_pcs: int, num_samples: int, dims: int) -> None:
    """UserError unless 0 < num_pcs < num_samples and num_pcs ≤ dims; worth a call before samples are described."""
    if num_pcs >= num_samples:
        raise UserError(
            f"WPCA: num_pcs = {num_pcs} needs more than {num_pcs} samples, and "
            f"{by_number(num_samples, 'there is', 'there are')} {num_samples} "
            "(describe more pictures, or lower num_pcs)"
        )
    if not 0 < num_pcs <= dims:
        raise UserError(f"WPCA: num_pcs = {num_pcs} is outside 1 to {dims}, the length of a descriptor")


def whiteness_error(samples: NDArray[np.floating], fit: WPCAFit) -> float:
    """How far the projected samples (n×dims) are from white: the largest entry of |covariance − identity|.

    About 0 for the samples that full whitening was fitted on, unless some kept dimension has no variance.
    """
    dims = len(fit.weight)
    covariance = np.zeros((dims, dims))
    for first in range(0, len(samples), ROWS_AT_ONCE):
        projected = samples[first : first + ROWS_AT_ONCE].astype(np.float64) @ fit.weight.T + fit.bias
        covariance += projected.T @ projected
    covariance /= len(samples) - 1
    covariance[np.diag_indices(dims)] -= 1
    return float(np.abs(covariance).max())


def _primal_components(
    samples: NDArray[np.floating], mean: NDArray[np.float64], num_pcs: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    num_samples, dims = samples.shape
    covariance = np.zeros((dims, dims))
    for first in range(0, num_samples, ROWS_AT_ONCE):
        centred = samples[first : first + ROWS_AT_ONCE].astype(np.float64) - mean
        covariance += _product(centred.T, centred)
    covariance /= num_samples - 1
    total = float(np.trace(covariance))
    values, vectors = _largest(covariance, num_pcs)
    return values, vectors, total


def _dual_components(
    samples: NDArray[np.floating], mean: NDArray[np.float64], num_pcs: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    num_samples, dims = samples.shape
    gram = np.zeros((num_samples, num_samples))
    for columns in _columns(dims):
        centred = samples[:, columns].astype(np.float64) - mean[columns]
        gram += _product(centred, centred.T)
    gram /= num_samples - 1
    total = float(np.trace(gram))
    values, vectors = _largest(gram, num_pcs)
    directions = np.empty((dims, num_pcs))
    for columns in _columns(dims):
        directions[columns] = _product((samples[:, columns].astype(np.float64) - mean[columns]).T, vectors)
    directions /= np.maximum(np.linalg.norm(directions, axis=0), EPSILON)  # they have length sqrt(λ·(n−1))
    return values, directions, total


def _columns(dims: int) -> Iterator[slice]:
    """Columns that are turned into float64 at a time."""
    return (slice(first, min(first + COLUMNS_AT_ONCE, dims)) for first in range(0, dims, COLUMNS_AT_ONCE))


def _product(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """left @ right, the same for any number of threads: each takes some rows alone, and BLAS has no other thread."""
    rows = range(0, len(left), ROWS_OF_A_THREAD)
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as threads:
        return np.concatenate(list(threads.map(lambda row: left[row : row + ROWS_OF_A_THREAD] @ right, rows)))


def _largest(symmetric: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest eigenvalues, first the largest, and their eigenvectors as columns; overwrites its input."""
    import scipy.linalg  # only where a projection is fitted: describing and comparing start without it

    size = len(symmetric)
    # One thread: the solver waits for all of its threads at every column, and beside another busy process two of
    # them took 25 times as long as one
    with threadpool_limits(limits=1, user_api="blas"):
        values, vectors = scipy.linalg.eigh(
            symmetric, subset_by_index=(size - count, size - 1), overwrite_a=True, check_finite=True
        )
    # Rounding can leave an empty direction a hair below 0
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]
