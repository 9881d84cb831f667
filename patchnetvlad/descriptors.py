"""The types that carry descriptors from the model to the store and on to matching."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.patch_rounding import Role, RoundedPatches, round_patches


@dataclass(frozen=True)
class PatchFeatures:
    """Patch descriptors of one picture.

    descriptors: one P×D tensor of unit rows for each patch size; grids: where these patches lie, in the same order;
    rounded: the same descriptors in 8 bits where matching is to use them, otherwise empty; local: H×W×C unit local
    descriptors that patches are made from, where they are to be stored.
    """

    descriptors: tuple[Tensor, ...]
    grids: tuple[PatchGrid, ...]
    rounded: tuple[RoundedPatches, ...] = ()
    local: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """What the descriptors take in memory."""
        rounded = sum(patches.levels.nbytes + patches.scale.nbytes + patches.norm.nbytes for patches in self.rounded)
        return sum(rows.nbytes for rows in self.descriptors) + rounded

    def round_as(self, role: Role) -> "PatchFeatures":
        """With 8-bit descriptors beside the others, for pictures on the CPU in the role of query or reference."""
        return replace(self, rounded=tuple(round_patches(rows, role) for rows in self.descriptors))

    def to(self, device: torch.device) -> "PatchFeatures":
        """The same on another device, where there are no 8-bit descriptors."""
        if all(rows.device == device for rows in self.descriptors):
            return self
        return PatchFeatures(tuple(rows.to(device) for rows in self.descriptors), self.grids)


@dataclass(frozen=True)
class Descriptors:
    """What a model says of a batch of N pictures of one size.

    global_: N×D, unit rows; patches: one N×P×D tensor for each patch size, empty for a purely global model;
    grids: one for each patch size; local: N×H×W×C, the unit local descriptors that patches are made from, None without
    patches.
    """

    global_: Tensor
    patches: tuple[Tensor, ...]
    grids: tuple[PatchGrid, ...]
    local: Tensor | None = None

    def picture(self, index: int, with_map: bool = False) -> PatchFeatures:
        """Patch descriptors of one picture of the batch; with_map: and what they are made from."""
        local = self.local[index] if with_map and self.local is not None else None
        return PatchFeatures(tuple(patches[index] for patches in self.patches), self.grids, local=local)
