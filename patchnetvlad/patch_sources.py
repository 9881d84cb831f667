"""Where matching gets a picture's patch descriptors: read from a store, or made when asked for."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from patchnetvlad.config import FeatureExtractConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.feature_cache import PictureCache
from patchnetvlad.image_lists import ImageList
from patchnetvlad.images import prepare_image, read_image
from patchnetvlad.model import PlaceModel
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.patch_rounding import Role


class PatchSource(Protocol):
    """Patch descriptors of a list's pictures by their index; a FeatureStore is one."""

    def patches(self, index: int) -> PatchFeatures:
        """Patch descriptors of one picture, float32."""
        ...

    def round_as(self, role: Role) -> None:
        """Give 8-bit descriptors too, in the role of query or reference."""
        ...

    def prefetch(self, indices: Iterable[int]) -> None:
        """Announce the order in which pictures will be asked for."""
        ...


class OnDemandPatches:
    """Describes a picture when its patches are asked for, and keeps as many as fit into cache_gb.

    Trades the disk that a store takes for computing: every candidate is described once while it stays in memory.
    """

    def __init__(self, model: PlaceModel, pictures: ImageList, size: FeatureExtractConfig, cache_gb: float) -> None:
        self._model = model
        self._pictures = pictures
        self._settings = size
        self._role: Role | None = None
        self._grids: dict[int, tuple[PatchGrid, ...]] = {}
        self._cache = PictureCache(self._describe, lambda index: 0, int(cache_gb * 1e9))

    def patches(self, index: int) -> PatchFeatures:
        """Patch descriptors of one picture, float32, on the CPU."""
        arrays = self._cache.get(index)
        features = PatchFeatures(tuple(torch.from_numpy(array) for array in arrays), self._grids[index])
        return features if self._role is None else features.round_as(self._role)

    def round_as(self, role: Role) -> None:
        """Give 8-bit descriptors too; they are made at every `patches`, in far less time than the picture took."""
        self._role = role

    def prefetch(self, indices: Iterable[int]) -> None:
        """Nothing: describing ahead would take the processor from matching."""

    def _describe(self, index: int) -> tuple[np.ndarray, ...]:
        settings = self._settings
        picture = read_image(self._pictures.paths[index], settings.exif_rotation)
        tensor = prepare_image(picture, settings.imageresizeh, settings.imageresizew)
        features = self._model.describe(tensor[None].to(self._model.device)).picture(0)
        self._grids[index] = features.grids
        return tuple(descriptors.cpu().numpy() for descriptors in features.descriptors)
