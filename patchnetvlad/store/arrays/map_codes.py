"""The feature map in codes, from which a picture's patch descriptors are made when they are asked for.

Patches overlap: those of one size at stride 1 are about as many as the map's positions, each with several times the
numbers, and of several sizes there are several times as many. What they hold is in the map. So its positions are
coded, and pooling and WPCA follow when a picture is read (docs/scale.md has what that costs, and what the codes of
patches themselves lose).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.netvlad import EPSILON, NetVLAD
from patchnetvlad.patch_codes import PatchCodec, train_codec
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.patch_netvlad import patch_descriptors
from patchnetvlad.patch_rounding import integer_products
from patchnetvlad.whitening import WPCA

LEVELS = 127  # of the 8-bit numbers that the WPCA product takes


@dataclass(frozen=True, eq=False)
class PatchHead:
    """What makes patch descriptors of a map of local descriptors; float32.

    assignment: K×C and bias: (K,), empty without one, of NetVLAD's soft assignment; clusters: K×C; projection: D×(K·C)
    and offset: (D,), both of length 0 without WPCA.
    """

    assignment: NDArray[np.float32]
    bias: NDArray[np.float32]
    clusters: NDArray[np.float32]
    projection: NDArray[np.float32]
    offset: NDArray[np.float32]

    @classmethod
    def of(cls, pool: NetVLAD, wpca: WPCA | None) -> "PatchHead":
        """That of a model's layers."""

        def numbers(values: Tensor) -> NDArray[np.float32]:
            return np.ascontiguousarray(values.detach().cpu().float().numpy())

        clusters = numbers(pool.centroids)
        return cls(
            numbers(pool.conv.weight.flatten(1)),
            np.empty(0, np.float32) if pool.conv.bias is None else numbers(pool.conv.bias),
            clusters,
            np.empty((0, clusters.size), np.float32) if wpca is None else numbers(wpca.weight),
            np.empty(0, np.float32) if wpca is None else numbers(wpca.bias),
        )

    @property
    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """All of it by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def num_dims(self) -> int:
        """D, the length of a descriptor."""
        return len(self.projection) or self.clusters.size

    @cached_property
    def _pool(self) -> NetVLAD:
        clusters, channels = self.clusters.shape
        pool = NetVLAD(clusters, channels, vladv2=len(self.bias) > 0)
        with torch.no_grad():
            pool.conv.weight.copy_(torch.from_numpy(self.assignment)[:, :, None, None])
            pool.centroids.copy_(torch.from_numpy(self.clusters))
            if pool.conv.bias is not None:
                pool.conv.bias.copy_(torch.from_numpy(self.bias))
        return pool

    @cached_property
    def _rounded(self) -> tuple[Tensor, Tensor]:
        """The projection in 8 bits, D×(K·C), and the step of each of its rows, (D,)."""
        return _in_levels(torch.from_numpy(self.projection))

    @torch.no_grad()
    def descriptors(self, local: Tensor, grids: Sequence[PatchGrid]) -> tuple[Tensor, ...]:
        """Unit rows P×D of the patches of some grids, from the H×W×C map of local descriptors.

        The WPCA product is one of 8-bit numbers, exact on every processor, and loses far less than the codes do.
        """
        unit, assignment = self._pool.assign(local.permute(2, 0, 1)[None])
        sizes, strides = [grid.patch_size for grid in grids], [grid.stride for grid in grids]
        pooled = patch_descriptors(unit, assignment, self._pool.centroids, sizes, strides)
        return tuple(self._projected(rows[0]) for rows in pooled)

    def _projected(self, pooled: Tensor) -> Tensor:
        if len(self.projection) == 0 or len(pooled) == 0:
            return pooled.reshape(len(pooled), self.num_dims)
        (levels, steps), (weight, weight_steps) = _in_levels(pooled), self._rounded
        rows = integer_products(levels, weight).mul_(steps[:, None]).mul_(weight_steps)
        rows.add_(torch.from_numpy(self.offset))
        return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=EPSILON))


@dataclass(frozen=True, eq=False)
class MapCodec:
    """A trained quantiser of the C numbers of a map's position into N bytes, and what makes patches of such a map.

    mean: (C,) and axes: C×C, columns, of the principal axes along which a local descriptor is coded; float32; codes:
    of the coordinates along them; head: the model's.
    """

    mean: NDArray[np.float32]
    axes: NDArray[np.float32]
    codes: PatchCodec
    head: PatchHead

    @property
    def dtype(self) -> str:
        """The feature_dtype that it is trained for."""
        return f"map{self.codes.num_bytes}"

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that decides codes and descriptors."""
        content = hashlib.sha256(self.codes.sha256.encode("ascii"))
        for array in (self.mean, self.axes, *self.head.arrays.values()):
            content.update(repr(array.shape).encode("ascii"))
            content.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return content.hexdigest()

    def encode(self, local: Tensor) -> NDArray[np.uint8]:
        """Codes of H×W×C unit local descriptors on any device: (H·W)×N."""
        rows = local.detach().cpu().float().flatten(0, 1)
        return self.codes.encode((rows - torch.from_numpy(self.mean)) @ torch.from_numpy(self.axes))

    def encode_picture(
        self, descriptors: Sequence[Tensor], grids: Sequence[PatchGrid], local: Tensor | None
    ) -> list[NDArray[np.uint8]]:
        """The codes of a picture's map, where it has patches; its descriptors are not looked at."""
        if local is None:
            raise ValueError("a picture without its map cannot be coded")
        return [self.encode(local)] if any(map(len, grids)) else []

    def decode(self, codes: NDArray[np.uint8]) -> Tensor:
        """The unit local descriptors, P×C float32, that P×N codes stand for."""
        turned = self.codes.approximate(codes)
        return F.normalize(turned @ torch.from_numpy(self.axes).T + torch.from_numpy(self.mean), dim=1)

    def decode_picture(
        self, codes: Sequence[NDArray[np.uint8]], coded: Sequence[PatchGrid], grids: Sequence[PatchGrid]
    ) -> tuple[Tensor, ...]:
        """The unit rows P×D of all patches of some grids, from the codes of the map."""
        if not codes:
            return tuple(torch.empty(0, self.head.num_dims) for _ in grids)
        local = self.decode(codes[0]).reshape(coded[0].map_height, coded[0].map_width, -1)
        return self.head.descriptors(local, grids)


def train_map_codec(sample: Tensor, num_bytes: int, head: PatchHead) -> MapCodec:
    """A codec of num_bytes bytes for maps whose positions are like those of the sample, S×C float32 unit rows.

    Raises ValueError unless 1 ≤ num_bytes ≤ C, and without a sample.
    """
    if len(sample) == 0:
        raise ValueError("a codec needs descriptors to learn from")
    rows = sample.detach().cpu().double().numpy()
    mean = rows.mean(axis=0)
    _, axes = np.linalg.eigh((rows - mean).T @ (rows - mean))
    turned = torch.from_numpy(((rows - mean) @ axes).astype(np.float32))
    codes = train_codec(turned, num_bytes)
    return MapCodec(mean.astype(np.float32), np.ascontiguousarray(axes, dtype=np.float32), codes, head)


def map_grid(grids: Sequence[PatchGrid]) -> tuple[PatchGrid, ...]:
    """The positions of the map that grids lie on, as patches of one position; none where there are no patches."""
    for grid in grids:
        if len(grid):
            return (PatchGrid(grid.map_height, grid.map_width, 1, 1, grid.geometry),)
    return ()


def _in_levels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, P×D, and the step of each, (P,)."""
    steps = torch.maximum(-rows.amin(dim=1), rows.amax(dim=1)).div_(LEVELS).clamp_(min=1e-30)
    return (rows * steps.reciprocal()[:, None]).round_().to(torch.int8), steps
