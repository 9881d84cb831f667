"""Product-quantised patch descriptors: a few bytes in place of D numbers.

The dimensions are dealt out to N groups so that the products of their variances are about equal (the parametric form
of optimised product quantisation: WPCA has decorrelated the dimensions already, so a permutation is left of its
rotation and decoding costs no product). In each group a descriptor is replaced by the nearest of 256 centroids, which
takes one byte.

Windows that overlap have descriptors that are alike, and the errors of their codes are not: `blended` takes a part of
the error away by a weighted mean over neighbours.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.faiss_library import faiss
from patchnetvlad.patch_grid import PatchGrid

CENTROIDS = 256  # in each group: one byte
SAMPLE_ROWS = 1 << 16  # descriptors that training makes use of, 256 for each centroid

NEIGHBOUR_SHARE = 0.4  # of wholly overlapping patches in a decoded one; docs/scale.md has what it was chosen by

_ITERATIONS = 25
_SEED = 20210621


@dataclass(frozen=True, eq=False)
class PatchCodec:
    """A trained quantiser of D-dimensional descriptors into N bytes.

    groups: int64 N×⌈D/N⌉, the dimensions in each group, −1 where a group is smaller; centroids: float32
    N×256×⌈D/N⌉, 0 at the places of −1.
    """

    groups: NDArray[np.int64]
    centroids: NDArray[np.float32]

    @property
    def num_bytes(self) -> int:
        """N, the bytes of one code."""
        return len(self.groups)

    @property
    def num_dims(self) -> int:
        """D, the length of a descriptor."""
        return int((self.groups >= 0).sum())

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that decides codes and descriptors."""
        content = hashlib.sha256(repr(self.centroids.shape).encode("ascii"))
        content.update(np.ascontiguousarray(self.groups, dtype="<i8").tobytes())
        content.update(np.ascontiguousarray(self.centroids, dtype="<f4").tobytes())
        return content.hexdigest()

    @cached_property
    def _quantizer(self) -> Any:  # faiss's types do not know its methods' Python forms
        quantizer = faiss.ProductQuantizer(self.groups.size, self.num_bytes, 8)
        faiss.copy_array_to_vector(self.centroids.reshape(-1), quantizer.centroids)
        return quantizer

    @cached_property
    def _order(self) -> Tensor:
        """For each dimension its place among the groups' places."""
        places = self.groups.reshape(-1)
        order = torch.empty(self.num_dims, dtype=torch.int64)
        order[torch.from_numpy(places[places >= 0])] = torch.from_numpy(np.flatnonzero(places >= 0))
        return order

    def encode(self, descriptors: Tensor) -> NDArray[np.uint8]:
        """Codes of P×D float32 descriptors on any device: P×N."""
        codes = self._quantizer.compute_codes(_dealt(descriptors.detach().cpu().numpy(), self.groups))
        return np.asarray(codes, dtype=np.uint8).reshape(len(descriptors), self.num_bytes)

    def decode(self, codes: NDArray[np.uint8]) -> Tensor:
        """The unit rows P×D float32 that P×N codes stand for."""
        rows = torch.from_numpy(self._quantizer.decode(np.ascontiguousarray(codes))).reshape(
            len(codes), self.groups.size
        )
        return F.normalize(rows.index_select(1, self._order), dim=1)


def blended(rows: Tensor, grid: PatchGrid) -> Tensor:
    """Decoded unit rows P×D of a grid's patches, nearer to what was coded: unit rows again.

    The next patch along either axis counts as much as it overlaps the patch, times NEIGHBOUR_SHARE, and a diagonal one
    the square of that; where patches do not overlap nothing changes.
    """
    share = NEIGHBOUR_SHARE * max(0, grid.patch_size - grid.stride) / grid.patch_size
    if share == 0 or len(rows) == 0:
        return rows
    field = rows.reshape(grid.rows, grid.columns, -1)
    for axis in (0, 1):
        length = field.shape[axis]
        mean = field.clone()
        mean.narrow(axis, 1, length - 1).add_(field.narrow(axis, 0, length - 1), alpha=share)
        mean.narrow(axis, 0, length - 1).add_(field.narrow(axis, 1, length - 1), alpha=share)
        field = mean
    return F.normalize(field.reshape(rows.shape), dim=1)


def train_codec(sample: Tensor, num_bytes: int) -> PatchCodec:
    """A codec of num_bytes bytes for descriptors like those of the sample, S×D float32; the same for the same sample.

    More than 65,536 descriptors are not made use of. Raises ValueError unless 1 ≤ num_bytes ≤ D, and without a sample.
    """
    count, dims = sample.shape
    if not 1 <= num_bytes <= dims:
        raise ValueError(f"{num_bytes} bytes for {dims} dimensions: expected 1 to {dims}")
    if count == 0:
        raise ValueError("a codec needs descriptors to learn from")
    rows = sample.detach().cpu().numpy().astype(np.float32, copy=False)
    groups = _balanced_groups(rows.var(axis=0, dtype=np.float64), num_bytes)
    if count < CENTROIDS:  # k-means wants as many points as centroids
        rows = np.resize(rows, (CENTROIDS, dims))
    quantizer = faiss.ProductQuantizer(groups.size, num_bytes, 8)
    quantizer.cp.niter = _ITERATIONS
    quantizer.cp.seed = _SEED
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train(_dealt(rows, groups))
    centroids = faiss.vector_to_array(quantizer.centroids).reshape(num_bytes, CENTROIDS, -1)
    return PatchCodec(groups, np.ascontiguousarray(centroids, dtype=np.float32))


def _balanced_groups(variances: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Dimensions dealt to groups of equal size, the one of largest variance first, each to the group whose variances
    have the smallest product so far; ascending within a group, −1 in the places that are left over."""
    size = math.ceil(len(variances) / count)
    logs = np.log(np.maximum(variances, 1e-12 * max(float(variances.max()), 1e-300)))
    logs -= logs.min() - 1.0  # products of factors above 1: a group with more dimensions has the larger one
    members: list[list[int]] = [[] for _ in range(count)]
    products = np.zeros(count)
    for dimension in np.argsort(-variances, kind="stable"):
        group = int(products.argmin())
        members[group].append(int(dimension))
        products[group] = products[group] + logs[dimension] if len(members[group]) < size else np.inf
    groups = np.full((count, size), -1, dtype=np.int64)
    for row, dimensions in zip(groups, members, strict=True):
        row[: len(dimensions)] = sorted(dimensions)
    return groups


def _dealt(rows: NDArray[np.float32], groups: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows P×D with their dimensions in the order of the groups, 0 in places without one: P×(N·⌈D/N⌉)."""
    places = groups.reshape(-1)
    if (places >= 0).all():
        return np.ascontiguousarray(rows[:, places], dtype=np.float32)
    padded = np.zeros((len(rows), len(places)), dtype=np.float32)
    padded[:, places >= 0] = rows[:, places[places >= 0]]
    return padded
