"""The types that carry descriptors from the model to the store and on to matching."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchnetvlad.patch_grid import PatchGrid


@dataclass(frozen=True)
class PatchFeatures:
    """Patch descriptors of one picture.

    descriptors: one P×D tensor of unit rows for each patch size; grids: where these patches lie, in the same order.
    """

    descriptors: tuple[Tensor, ...]
    grids: tuple[PatchGrid, ...]

    def to(self, device: torch.device) -> "PatchFeatures":
        """The same on another device."""
        return PatchFeatures(tuple(some.to(device) for some in self.descriptors), self.grids)


@dataclass(frozen=True)
class Descriptors:
    """What a model says of a batch of N pictures of one size.

    global_: N×D, unit rows; patches: one N×P×D tensor for each patch size, empty for a purely global model;
    grids: one for each patch size.
    """

    global_: Tensor
    patches: tuple[Tensor, ...]
    grids: tuple[PatchGrid, ...]

    def picture(self, index: int) -> PatchFeatures:
        """Patch descriptors of one picture of the batch."""
        return PatchFeatures(tuple(patches[index] for patches in self.patches), self.grids)
