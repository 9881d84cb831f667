"""Product-quantised patch descriptors: a few bytes in place of D numbers.

The dimensions are dealt out to N groups so that the products of their variances are about equal (the parametric form
of optimised product quantisation: WPCA has decorrelated the dimensions already, so a permutation is left of its
rotation and decoding costs no product). In each group a descriptor is replaced by the nearest of 256 centroids, which
takes one byte.

Windows that overlap have descriptors that are alike, of one patch size or of two. So not all patches are coded: those
of a coarser grid are, with many bytes each; the others are estimated from their neighbours' codes.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.faiss_library import faiss
from patchnetvlad.patch_grid import PatchGrid

CENTROIDS = 256  # in each group: one byte
SAMPLE_ROWS = 1 << 16  # descriptors that training makes use of at most, 256 for each centroid

# docs/scale.md has what these were chosen by.
ALIKE = 1.5  # ratio of the largest patch size to the smallest that are estimated from the codes of one
CODED_STEP = 0.4  # of a patch size, from one coded patch to the next

_OTHER_ERROR = 0.02  # of an estimate, besides that of the codes: windows are not quite sums

_ITERATIONS = 25
_POINTS_A_DIMENSION = 32  # of a group, for each centroid: small groups need no more
_TRIED_ROWS = 2048  # descriptors that tell the error of a codec, at least where there are so many
_SEED = 20210621


@dataclass(frozen=True, eq=False)
class PatchCodec:
    """A trained quantiser of D-dimensional descriptors into N bytes.

    groups: int64 N×⌈D/N⌉, the dimensions in each group, −1 where a group is smaller; centroids: float32
    N×256×⌈D/N⌉, 0 at the places of −1; error: share of a descriptor's square that coding loses, 0 to 1.
    """

    groups: NDArray[np.int64]
    centroids: NDArray[np.float32]
    error: float

    @property
    def num_bytes(self) -> int:
        """N, the bytes of one code."""
        return len(self.groups)

    @property
    def dtype(self) -> str:
        """The feature_dtype that it is trained for."""
        return f"pq{self.num_bytes}"

    @property
    def num_dims(self) -> int:
        """D, the length of a descriptor."""
        return int((self.groups >= 0).sum())

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that decides codes and descriptors."""
        content = hashlib.sha256(repr((self.centroids.shape, self.error)).encode("ascii"))
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

    def approximate(self, codes: NDArray[np.uint8]) -> Tensor:
        """The rows P×D float32 that P×N codes stand for, of whatever length."""
        rows = torch.from_numpy(self._quantizer.decode(np.ascontiguousarray(codes))).reshape(
            len(codes), self.groups.size
        )
        return rows.index_select(1, self._order)

    def decode(self, codes: NDArray[np.uint8]) -> Tensor:
        """The same as unit rows."""
        return F.normalize(self.approximate(codes), dim=1)

    def encode_picture(
        self, descriptors: Sequence[Tensor], grids: Sequence[PatchGrid], local: Tensor | None
    ) -> list[NDArray[np.uint8]]:
        """Codes of a picture, one array for each of its coded grids; the map is not looked at."""
        return [self.encode(rows) for rows in rows_to_code(descriptors, grids)]

    def decode_picture(
        self, codes: Sequence[NDArray[np.uint8]], coded: Sequence[PatchGrid], grids: Sequence[PatchGrid]
    ) -> tuple[Tensor, ...]:
        """The unit rows P×D of all patches of some grids, from the codes of the coded grids that they need."""
        return self.estimate([self.decode(rows) for rows in codes], coded, grids)

    def estimate(
        self, decoded: Sequence[Tensor], coded: Sequence[PatchGrid], grids: Sequence[PatchGrid]
    ) -> tuple[Tensor, ...]:
        """The unit rows P×D of all patches of some grids, from the decoded rows of the coded grids that they need."""
        signals = {grid: _signal(rows, grid, self.error) for grid, rows in zip(coded, decoded, strict=True)}
        nearest = [coded_for(grid, coded) if len(grid) else None for grid in grids]
        return tuple(
            torch.empty(0, self.num_dims) if other is None else _from_signal(signals[other], other, grid)
            for grid, other in zip(grids, nearest, strict=True)
        )


def coded_grids(grids: Sequence[PatchGrid]) -> tuple[PatchGrid, ...]:
    """Whose patches are coded so that those of all these grids can be estimated, ascending by patch size.

    Of patch sizes within a factor of 1.5 the middle one stands for all, and of its grid every second patch or so along
    either axis. Grids without patches need none.
    """
    left = sorted((grid for grid in grids if len(grid)), key=lambda grid: grid.patch_size)
    coded = []
    while left:
        alike = [grid for grid in left if grid.patch_size <= ALIKE * left[0].patch_size]
        chosen = alike[(len(alike) - 1) // 2]
        step = max(1, round(CODED_STEP * chosen.patch_size / chosen.stride))
        coded.append(replace(chosen, stride=chosen.stride * step))
        left = left[len(alike) :]
    return tuple(coded)


def rows_to_code(descriptors: Sequence[Tensor], grids: Sequence[PatchGrid]) -> tuple[Tensor, ...]:
    """The descriptors of the coded grids, out of all of a picture (P×D for each grid)."""
    places = {grid.patch_size: place for place, grid in enumerate(grids)}
    rows = []
    for coded in coded_grids(grids):
        place = places[coded.patch_size]
        step = coded.stride // grids[place].stride
        field = descriptors[place].reshape(grids[place].rows, grids[place].columns, -1)
        rows.append(field[::step, ::step].reshape(len(coded), -1))
    return tuple(rows)


def coded_for(grid: PatchGrid, coded: Sequence[PatchGrid]) -> PatchGrid:
    """That of the coded grids whose patch size is nearest to a grid's, in proportion."""
    return min(coded, key=lambda other: abs(math.log(other.patch_size / grid.patch_size)))


def estimated(rows: Tensor, coded: PatchGrid, grid: PatchGrid, error: float) -> Tensor:
    """Unit rows P×D of all patches of a grid, from the decoded rows of a coded grid of the same map.

    A patch is a sum over its window, so that two patches are correlated as far as their windows overlap. The estimate
    is the linear one of least mean square error (Kriging) for cells that are independent of one another. error: share
    of a coded row's square that coding lost, 0 to 1; the larger it is, the more neighbours are averaged.
    """
    return _from_signal(_signal(rows, coded, error), coded, grid)


def _signal(rows: Tensor, coded: PatchGrid, error: float) -> Tensor:
    """Decoded rows P×D, in terms of the eigenvectors of their patches' correlation, each divided by its variance."""
    (values, into_rows), (others, into_columns) = (_spectrum(count, coded) for count in (coded.rows, coded.columns))
    trust = 1 / (np.outer(values, others) + error / (1 - error) + _OTHER_ERROR)
    lines = (_sent(into_rows.T, rows) @ rows.reshape(coded.rows, -1)).reshape(coded.rows, coded.columns, -1)
    return (_sent(into_columns.T, rows) @ lines).mul_(_sent(trust, rows)[..., None])


def _from_signal(signal: Tensor, coded: PatchGrid, grid: PatchGrid) -> Tensor:
    """Unit rows P×D of a grid's patches: what each has in common with the coded ones."""
    from_rows, from_columns = _common(coded, grid)
    lines = _sent(from_columns, signal) @ signal
    estimate = (_sent(from_rows, signal) @ lines.reshape(coded.rows, -1)).reshape(len(grid), -1)
    norms = torch.linalg.vector_norm(estimate, dim=1, keepdim=True)
    return estimate.div_(norms.clamp_(min=1e-12))


@lru_cache(maxsize=256)
def _spectrum(count: int, coded: PatchGrid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues and eigenvectors (columns) of the correlation of so many coded patches along an axis."""
    known = np.arange(count) * coded.stride
    values, vectors = np.linalg.eigh(_overlaps(known, coded.patch_size, known, coded.patch_size))
    return values, vectors


@lru_cache(maxsize=256)
def _common(coded: PatchGrid, grid: PatchGrid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Along either axis, the correlation of a grid's patches with the eigenvectors of the coded ones."""
    counts = (coded.rows, grid.rows), (coded.columns, grid.columns)
    rows, columns = (
        _overlaps(np.arange(wanted) * grid.stride, grid.patch_size, np.arange(known) * coded.stride, coded.patch_size)
        @ _spectrum(known, coded)[1]
        for known, wanted in counts
    )
    return rows, columns


def _sent(matrix: NDArray[np.float64], beside: Tensor) -> Tensor:
    """A matrix in float32 on the device of a tensor."""
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32)).to(beside.device)


def _overlaps(
    first: NDArray[np.int64], first_size: int, second: NDArray[np.int64], second_size: int
) -> NDArray[np.float64]:
    """Correlation of sums over intervals of independent numbers, from where the intervals begin."""
    ends = np.minimum(first[:, None] + first_size, second + second_size)
    return np.maximum(0, ends - np.maximum(first[:, None], second)) / math.sqrt(first_size * second_size)


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
    quantizer.cp.max_points_per_centroid = min(SAMPLE_ROWS // CENTROIDS, _POINTS_A_DIMENSION * groups.shape[1])
    quantizer.train(_dealt(rows, groups))
    centroids = faiss.vector_to_array(quantizer.centroids).reshape(num_bytes, CENTROIDS, -1)
    codec = PatchCodec(groups, np.ascontiguousarray(centroids, dtype=np.float32), 0.0)
    tried = sample[:: max(1, count // _TRIED_ROWS)].detach().cpu().float()
    likeness = float((codec.decode(codec.encode(tried)) * F.normalize(tried, dim=1)).sum(dim=1).mean())
    return replace(codec, error=min(max(0.0, 1 - likeness**2), 0.99))


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
