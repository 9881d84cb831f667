"""Where matching gets a picture's patch descriptors: from a store, from memory, or made when asked for."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.candidates import ApproximateSearch
from patchnetvlad.config import FeatureExtractConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.image_lists import ImageList
from patchnetvlad.images import prepare_image, read_image
from patchnetvlad.model import PlaceModel
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.store.arrays.codecs import CPU
from patchnetvlad.store.cache.disk_cache import DiskCache
from patchnetvlad.store.cache.memory_cache import CacheStatistics, PictureCache


class PatchSource(Protocol):
    """Patch descriptors of a list's pictures by their index; a FeatureStore is one."""

    def patches(self, index: int, device: torch.device = CPU) -> PatchFeatures:
        """Patch descriptors of one picture on a device, float32."""
        ...

    def round_references(self) -> None:
        """From now on give 8-bit descriptors too, in the role of references."""
        ...

    def prefetch(self, indices: Iterable[int]) -> None:
        """Announce the order in which pictures will be asked for."""
        ...

    def pass_over(self, index: int) -> None:
        """A picture whose turn it is in the announced order is not needed."""
        ...

    @property
    def cache_bytes(self) -> int | None:
        """What may be kept in memory; None where all pictures are there."""
        ...

    def picture_bytes(self, index: int) -> int:
        """What a picture takes of it, an estimate where it has not been described yet."""
        ...

    @property
    def statistics(self) -> CacheStatistics:
        """What the cache has done."""
        ...


@dataclass(frozen=True, eq=False)
class DescribedPictures:
    """Pictures as ranking takes them, queries or a database.

    global_: N×D float32, unit rows; patches: their patch descriptors by the same rows, None for a purely global model;
    index: a search index of global_ that was made before.
    """

    global_: NDArray[np.float32]
    patches: PatchSource | None
    index: ApproximateSearch | None = None

    def __len__(self) -> int:
        return len(self.global_)


class PatchesInMemory:
    """Pictures that are described already."""

    def __init__(self, pictures: Iterable[PatchFeatures]) -> None:
        self._pictures = list(pictures)

    def patches(self, index: int, device: torch.device = CPU) -> PatchFeatures:
        """Patch descriptors of one picture."""
        return self._pictures[index].to(device)

    def round_references(self) -> None:
        """Keep 8-bit descriptors beside the others: a quarter more memory."""
        self._pictures = [picture.round_as("reference") for picture in self._pictures]

    def prefetch(self, indices: Iterable[int]) -> None:
        """Nothing: all are here."""

    def pass_over(self, index: int) -> None:
        """Nothing: all are here."""

    @property
    def cache_bytes(self) -> None:
        """All are here."""
        return None

    def picture_bytes(self, index: int) -> int:
        """What a picture takes in memory."""
        return self._pictures[index].nbytes

    @property
    def statistics(self) -> CacheStatistics:
        """Nothing is read."""
        return CacheStatistics(0, 0, 0, len(self._pictures), sum(picture.nbytes for picture in self._pictures))


class PatchesOnDevice:
    """Pictures of a source on an accelerator: those asked for last stay there, as many as fit into max_bytes.

    So what the next query shares with this one travels once. On the CPU the source's own memory does that.
    """

    def __init__(self, source: PatchSource, device: torch.device, max_bytes: int) -> None:
        self.source = source
        self._device = device
        self._max_bytes = max_bytes
        self._held: OrderedDict[int, PatchFeatures] = OrderedDict()
        self._bytes = 0

    def patches(self, index: int) -> PatchFeatures:
        """Patch descriptors of one picture on the device."""
        features = self._held.get(index)
        if features is not None:
            self._held.move_to_end(index)
            self.source.pass_over(index)
            return features
        features = self.source.patches(index, self._device)
        if features.nbytes <= self._max_bytes:
            self._held[index] = features
            self._bytes += features.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
        return features


class OnDemandPatches:
    """Describes a picture when its patches are asked for, and keeps as many as fit into cache_bytes.

    Trades the disk that a store takes for computing: every candidate is described once while it stays in memory, or in
    `kept` on disk.
    """

    def __init__(
        self,
        model: PlaceModel,
        pictures: ImageList,
        size: FeatureExtractConfig,
        cache_bytes: int,
        kept: DiskCache | None = None,
    ) -> None:
        self._model = model
        self._pictures = pictures
        self._settings = size
        self._kept = kept
        self._rounded = False
        self._grids: dict[int, tuple[PatchGrid, ...]] = {}
        self._cache = PictureCache(self._describe, self.picture_bytes, cache_bytes, workers=0)
        self._bytes = 0  # of the picture described last

    def patches(self, index: int, device: torch.device = CPU) -> PatchFeatures:
        """Patch descriptors of one picture, float32."""
        arrays = self._cache.get(index)
        features = PatchFeatures(tuple(torch.from_numpy(array) for array in arrays), self._grids[index])
        return (features.round_as("reference") if self._rounded else features).to(device)

    def round_references(self) -> None:
        """Give 8-bit descriptors too; they are made at every `patches`, in far less time than the picture took."""
        self._rounded = True

    def prefetch(self, indices: Iterable[int]) -> None:
        """Keep what is asked for soonest; nothing is described ahead, which would take the processor from matching."""
        self._cache.prefetch(indices)

    def pass_over(self, index: int) -> None:
        """A picture whose turn it is in the announced order is not needed."""
        self._cache.pass_over(index)

    @property
    def cache_bytes(self) -> int:
        """What may be kept in memory."""
        return self._cache.max_bytes

    def picture_bytes(self, index: int) -> int:
        """That of the picture described last."""
        return self._bytes

    @property
    def statistics(self) -> CacheStatistics:
        """What the cache has done; its reads are pictures described."""
        return self._cache.statistics

    def _describe(self, index: int) -> tuple[np.ndarray, ...]:
        settings, path = self._settings, self._pictures.paths[index]
        described = None if self._kept is None else self._kept.get(path)
        if described is not None:
            map_size, arrays = described
            self._grids[index] = self._model.grids(*map_size)
            self._bytes = sum(array.nbytes for array in arrays)
            return arrays
        picture = read_image(path, settings.exif_rotation)
        tensor = prepare_image(picture, settings.imageresizeh, settings.imageresizew)
        features = self._model.describe(tensor[None].to(self._model.device)).picture(0)
        self._grids[index] = features.grids
        self._bytes = features.nbytes
        arrays = tuple(descriptors.cpu().numpy() for descriptors in features.descriptors)
        if self._kept is not None and features.grids:
            self._kept.put(path, (features.grids[0].map_height, features.grids[0].map_width), arrays)
        return arrays
