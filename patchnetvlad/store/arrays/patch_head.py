"""What makes patch descriptors of a map of local descriptors without the model: clusters, and WPCA in 8 bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.netvlad import EPSILON, NetVLAD
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

    def weights(self) -> NDArray[np.float64]:
        """How errors of a local descriptor weigh in patches, C×C: as the projection of all clusters takes them."""
        channels = self.clusters.shape[1]
        if len(self.projection) == 0:
            return np.eye(channels)
        blocks = self.projection.reshape(-1, channels).astype(np.float64)  # (D·K)×C
        found: NDArray[np.float64] = blocks.T @ blocks
        return found / np.trace(found) * channels

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


def _in_levels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, P×D, and the step of each, (P,)."""
    steps = torch.maximum(-rows.amin(dim=1), rows.amax(dim=1)).div_(LEVELS).clamp_(min=1e-30)
    return (rows * steps.reciprocal()[:, None]).round_().to(torch.int8), steps
