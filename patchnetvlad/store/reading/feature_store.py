"""Descriptors on disk, for those who read them; writing is `FeatureWriter`'s, and both speak of one StoreHeader."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.image_lists import ImageList
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.patch_rounding import RoundedPatches, round_patches, rounded_bytes
from patchnetvlad.store.arrays.array_files import GLOBAL_NAME, ArrayInfo, map_rows, read_array
from patchnetvlad.store.arrays.codecs import CODECS, CPU, Codec, LearnedCodec, StoredArray, stored_codec
from patchnetvlad.store.cache.memory_cache import Arrays, CacheStatistics, PictureCache
from patchnetvlad.store.manifest import StoreHeader, read_manifest
from patchnetvlad.store.reading.stored_pictures import (
    PackedPictures,
    StoredPicture,
    check_files,
    check_manifest,
    manifest_pictures,
    published_pictures,
    read_global,
)


class FeatureStore:
    """Finished features of one picture list.

    global_: N×D float32, row = line of the list; names: the list; num_dims: D; patch_sizes: those that
    `patches` gives, in this order.
    Patch descriptors are read when asked for and kept, as they are stored, in a least-recently-used cache: float16,
    int8 and codes take less of the memory there and become float32 at every `patches`. After `round_references` the
    cache keeps 8-bit descriptors for matching beside them, except beside codes, where they are made at every `patches`.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        global_: np.ndarray,
        pictures: Sequence[StoredPicture],
        patch_sizes: tuple[int, ...],
        codec: Codec | LearnedCodec | None,
        cache_gb: float,
        workers: int,
    ) -> None:
        """Use `open`; codec: how the manifest says that descriptors are stored, None for any float."""
        self.folder = folder
        self.names = names
        self.global_ = global_
        self.num_dims = int(global_.shape[1])
        self.patch_sizes = patch_sizes
        self._pictures = pictures
        self._codec = codec or CODECS["float32"]
        self._dtype = None if codec is None else codec.dtype
        self._rounded = False
        self._cache = PictureCache(self._load, self._size, int(cache_gb * 1e9), workers)

    @classmethod
    def open(
        cls,
        folder: Path,
        pictures: ImageList,
        expected: StoreHeader | None = None,
        *,
        map_size: tuple[int, int] | None = None,
        cache_gb: float = 4.0,
        workers: int = 2,
    ) -> "FeatureStore":
        """Open a folder for a picture list and check that it is what the configuration expects.

        expected: what the configuration would make (its patch sizes may be a selection of the stored ones, whose
        order is then that of `expected`), None to take the folder as its manifest says; map_size: (height, width) of
        the feature maps, needed for patches in a folder without a manifest; cache_gb: limit of the cache in 10⁹
        bytes; workers: threads that read ahead.

        Raises UserError, in one line, when files are missing or the folder is of another list, model or setting.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder (features not extracted yet, or another path)")
        manifest = read_manifest(folder)
        stored: Sequence[StoredPicture]
        codec: Codec | LearnedCodec | None = None
        if manifest is not None:
            check_manifest(manifest, pictures.names, expected)
            sizes = manifest.header.patch_sizes if expected is None else expected.patch_sizes
            packed = manifest.header.layout == "packed"
            rows, shape = folder / GLOBAL_NAME, (len(pictures), manifest.header.num_dims)
            global_ = map_rows(rows, shape, "another file") if packed else read_global(rows, *shape)
            stored = PackedPictures(folder, manifest, sizes) if packed else manifest_pictures(folder, manifest, sizes)
            dtype = manifest.header.dtype if sizes else "float32"  # global descriptors need no quantiser
            codec = stored_codec(folder, dtype, manifest.header.codec_sha256)
        elif expected is not None:
            sizes = expected.patch_sizes
            global_ = read_global(folder / GLOBAL_NAME, len(pictures), expected.num_dims)
            stored = published_pictures(folder, pictures, expected, map_size)
        else:
            raise UserError(f"{folder}: has no manifest.jsonl, so what made it is unknown (give the configuration)")
        if not isinstance(stored, PackedPictures):
            check_files(folder, pictures.names, stored)
        return cls(folder, pictures.names, global_, stored, sizes, codec, cache_gb, workers)

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def coded(self) -> bool:
        """Whether patch descriptors are stored as codes."""
        return isinstance(self._codec, LearnedCodec)

    @property
    def statistics(self) -> CacheStatistics:
        """What the cache has done since the store was opened."""
        return self._cache.statistics

    @property
    def cache_bytes(self) -> int:
        """What the cache may hold."""
        return self._cache.max_bytes

    def picture_bytes(self, index: int) -> int:
        """What a picture takes in the cache."""
        return self._size(index)

    def patches(self, index: int, device: torch.device = CPU) -> PatchFeatures:
        """Patch descriptors of a picture as float32 on a device; no patch sizes in a purely global store.

        Only on the CPU there are 8-bit descriptors too.

        The tensors may share the cache's memory: do not change them. In a published folder with C-ordered files they
        are transposed views. Raises UserError when a file is damaged or of the wrong shape.
        """
        picture = self._pictures[index]
        count = len(picture.stored)
        arrays = self._cache.get(index)
        if isinstance(self._codec, LearnedCodec):
            descriptors = self._codec.decode_picture(arrays, picture.stored, picture.grids, device)
        else:
            stored = zip(arrays[:count], picture.scales, strict=True)
            descriptors = tuple(self._codec.decode(StoredArray(array, scales), device) for array, scales in stored)
        if device.type != "cpu":
            return PatchFeatures(descriptors, picture.grids)
        if self._rounded and self.coded:
            return PatchFeatures(descriptors, picture.grids).round_as("reference")
        tensors = [torch.from_numpy(array) for array in arrays[count:]]
        rounded = tuple(RoundedPatches(*tensors[first : first + 4]) for first in range(0, len(tensors), 4))
        return PatchFeatures(descriptors, picture.grids, rounded)

    def round_references(self) -> None:
        """Give 8-bit descriptors too, made when a picture is read, in the role of references."""
        self._rounded = True
        self._cache.forget()

    def prefetch(self, indices: Iterable[int]) -> None:
        """Read pictures in the background, in the order in which `patches` will ask for them.

        Reads at most half the cache ahead and moves on with every `patches`, so the order of a whole run may be
        given, repetitions included, as an iterator too. Takes the place of an earlier call.
        """
        self._cache.prefetch(indices)

    def pass_over(self, index: int) -> None:
        """A picture whose turn it is in the announced order is not needed."""
        self._cache.pass_over(index)

    def close(self) -> None:
        """Stop reading ahead and empty the cache; `global_` stays."""
        self._cache.close()

    def _size(self, index: int) -> int:
        counts = [len(grid) for grid in self._pictures[index].stored]
        keeps_rounded = self._rounded and not self.coded
        rounded = sum(rounded_bytes(count, self.num_dims) for count in counts) if keeps_rounded else 0
        return sum(counts) * self._codec.width(self.num_dims) * self._codec.dtype.itemsize + rounded

    def _load(self, index: int) -> Arrays:
        picture = self._pictures[index]
        if isinstance(self._pictures, PackedPictures):
            arrays = self._pictures.read(index)
        else:
            arrays = [self._load_array(path, grid) for path, grid in zip(picture.files, picture.stored, strict=True)]
        if self._rounded and not isinstance(self._codec, LearnedCodec):  # beside codes they would fill the cache
            for array, scales in zip(tuple(arrays), picture.scales, strict=True):
                rounded = round_patches(self._codec.decode(StoredArray(array, scales)), "reference")
                arrays += [tensor.numpy() for tensor in (rounded.levels, rounded.scale, rounded.norm, rounded.offset)]
        return tuple(arrays)

    def _load_array(self, path: Path, grid: PatchGrid) -> np.ndarray:
        width = self._codec.width(self.num_dims)

        def check(info: ArrayInfo) -> None:
            if info.shape != (width, len(grid)):
                raise UserError(
                    f"{path}: has shape {info.shape}, expected {width} numbers for each of {len(grid)} patches of "
                    f"size {grid.patch_size}, stride {grid.stride} on a {grid.map_height}×{grid.map_width} map "
                    "(extracted with another picture size, stride or num_pcs)"
                )
            if self._dtype is None and info.dtype.kind != "f":
                raise UserError(f"{path}: holds {info.dtype} without a manifest (its scales are lost; extract again)")
            if self._dtype is not None and info.dtype != self._dtype:
                raise UserError(
                    f"{path}: holds {info.dtype}, the manifest says {self._dtype} (written by another run or program)"
                )

        return read_array(path, check).T  # W×P to P×W
