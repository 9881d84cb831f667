"""Descriptors on disk, for those who read them; writing is `FeatureWriter`'s, both speak of the same StoreHeader.

A folder of ours has a manifest, which is checked against the picture list and the configuration. A folder made by the
published code has none; its files are found by file stem and their shapes checked against the patch grid.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.feature_cache import Arrays, CacheStatistics, PictureCache
from patchnetvlad.feature_files import (
    GLOBAL_NAME,
    ArrayInfo,
    StoredArray,
    decode,
    read_array,
    read_array_info,
)
from patchnetvlad.feature_folder import check_disk, estimate_bytes
from patchnetvlad.feature_header import FEATURE_DTYPES, Manifest, StoreHeader, read_manifest, reading_differences
from patchnetvlad.feature_lookup import StoredPicture, check_files, manifest_pictures, published_pictures
from patchnetvlad.feature_writer import FeatureWriter
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.patch_rounding import RoundedPatches, round_patches, rounded_bytes

__all__ = [
    "FEATURE_DTYPES",
    "CacheStatistics",
    "FeatureStore",
    "FeatureWriter",
    "StoreHeader",
    "check_disk",
    "estimate_bytes",
    "stored_dims",
]


class FeatureStore:
    """Finished features of one picture list.

    global_: N×D float32, row = line of the list; names: the list; num_dims: D; patch_sizes: those that
    `patches` gives, in this order.
    Patch descriptors are read when asked for and kept, as they are stored, in a least-recently-used cache: float16
    and int8 take a half and a quarter of the memory there and become float32 at every `patches`. After
    `round_references` the cache keeps 8-bit descriptors for matching beside them.
    """

    def __init__(
        self,
        folder: Path,
        names: tuple[str, ...],
        global_: np.ndarray,
        pictures: Sequence[StoredPicture],
        patch_sizes: tuple[int, ...],
        dtype: str | None,
        cache_gb: float,
        workers: int,
    ) -> None:
        """Use `open`; dtype: what the patch files must hold, None for any float."""
        self.folder = folder
        self.names = names
        self.global_ = global_
        self.num_dims = int(global_.shape[1])
        self.patch_sizes = patch_sizes
        self._pictures = pictures
        self._dtype = dtype
        self._rounded = False
        self._cache = PictureCache(self._load, self._size, int(cache_gb * 1e9), workers)

    @classmethod
    def open(
        cls,
        folder: Path,
        names: Sequence[str],
        feature_names: Sequence[str],
        expected: StoreHeader | None = None,
        *,
        map_size: tuple[int, int] | None = None,
        cache_gb: float = 4.0,
        workers: int = 2,
    ) -> "FeatureStore":
        """Open a folder for a picture list and check that it is what the configuration expects.

        names and feature_names: of the list, in its order; expected: what the configuration would make (its own
        names do not matter, so that one serves both sides; its patch sizes may be a selection of the stored ones,
        whose order is then that of `expected`), None to take the folder as its manifest says; map_size: (height,
        width) of the feature maps, needed for patches in a folder without a manifest; cache_gb: limit of the cache
        in 10⁹ bytes; workers: threads that read ahead.

        Raises UserError, in one line, when files are missing or the folder is of another list, model or setting.
        """
        names = tuple(names)
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder (features not extracted yet, or another path)")
        manifest = read_manifest(folder)
        pictures: Sequence[StoredPicture]
        if manifest is not None:
            _check_manifest(manifest, names, expected)
            sizes = manifest.header.patch_sizes if expected is None else expected.patch_sizes
            global_ = _read_global(folder / GLOBAL_NAME, len(names), manifest.header.num_dims)
            pictures, dtype = manifest_pictures(folder, manifest, sizes), manifest.header.dtype
        elif expected is not None:
            sizes, dtype = expected.patch_sizes, None
            global_ = _read_global(folder / GLOBAL_NAME, len(names), expected.num_dims)
            pictures = published_pictures(folder, names, feature_names, expected, map_size)
        else:
            raise UserError(f"{folder}: has no manifest.jsonl, so what made it is unknown (give the configuration)")
        check_files(folder, names, pictures)
        return cls(folder, names, global_, pictures, sizes, dtype, cache_gb, workers)

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def statistics(self) -> CacheStatistics:
        """What the cache has done since the store was opened."""
        return self._cache.statistics

    def patches(self, index: int) -> PatchFeatures:
        """Patch descriptors of a picture as float32; no patch sizes in a purely global store.

        The tensors may share the cache's memory: do not change them. In a published folder with C-ordered files they
        are transposed views. Raises UserError when a file is damaged or of the wrong shape.
        """
        picture = self._pictures[index]
        count = len(picture.grids)
        arrays = self._cache.get(index)
        stored = zip(arrays[:count], picture.scales, strict=True)
        descriptors = tuple(decode(StoredArray(array, scales)) for array, scales in stored)
        parts = [torch.from_numpy(array) for array in arrays[count:]]
        rounded = tuple(RoundedPatches(*parts[first : first + 4]) for first in range(0, len(parts), 4))
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

    def close(self) -> None:
        """Stop reading ahead and empty the cache; `global_` stays."""
        self._cache.close()

    def _size(self, index: int) -> int:
        itemsize = np.dtype(self._dtype or np.float32).itemsize
        counts = [len(grid) for grid in self._pictures[index].grids]
        rounded = sum(rounded_bytes(count, self.num_dims) for count in counts) if self._rounded else 0
        return sum(counts) * self.num_dims * itemsize + rounded

    def _load(self, index: int) -> Arrays:
        picture = self._pictures[index]
        arrays = [self._load_array(path, grid) for path, grid in zip(picture.files, picture.grids, strict=True)]
        if self._rounded:
            for array, scales in zip(tuple(arrays), picture.scales, strict=True):
                rounded = round_patches(decode(StoredArray(array, scales)), "reference")
                arrays += [part.numpy() for part in (rounded.levels, rounded.scale, rounded.norm, rounded.offset)]
        return tuple(arrays)

    def _load_array(self, path: Path, grid: PatchGrid) -> np.ndarray:
        def check(info: ArrayInfo) -> None:
            if info.shape != (self.num_dims, len(grid)):
                raise UserError(
                    f"{path}: has shape {info.shape}, expected {self.num_dims} dimensions × {len(grid)} patches of "
                    f"size {grid.patch_size}, stride {grid.stride} on a {grid.map_height}×{grid.map_width} map "
                    "(extracted with another picture size, stride or num_pcs)"
                )
            if self._dtype is None and info.dtype.kind != "f":
                raise UserError(f"{path}: holds {info.dtype} without a manifest (its scales are lost; extract again)")
            if self._dtype is not None and info.dtype != np.dtype(self._dtype):
                raise UserError(
                    f"{path}: holds {info.dtype}, the manifest says {self._dtype} (written by another run or program)"
                )

        return read_array(path, check).T  # D×P to P×D


def stored_dims(folder: Path) -> int:
    """Dimensions D of the descriptors in a folder, for when the configuration does not say (num_pcs = 0).

    Raises UserError when the folder holds no features.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest.header.num_dims
    path = folder / GLOBAL_NAME
    shape = read_array_info(path).shape
    if len(shape) != 2:
        raise UserError(f"{path}: has shape {shape}, expected N×D numbers (another file)")
    return shape[1]


def _check_manifest(manifest: Manifest, names: tuple[str, ...], expected: StoreHeader | None) -> None:
    folder, header = manifest.path.parent, manifest.header
    if expected is not None:
        differences = reading_differences(header, expected)
        if differences:
            raise UserError(
                f"{folder}: features do not fit the configuration, {'; '.join(differences)} (extracted with another "
                "configuration or checkpoint: give the same one, or extract again)"
            )
    if header.num_pictures != len(names):
        raise UserError(
            f"{folder}: features are of {header.num_pictures} pictures, the list has {len(names)} (made from another "
            "list, or the folders of query and database are swapped)"
        )
    for index, name in enumerate(names):
        entry = manifest.entries.get(index)
        if entry is not None and entry.name != name:
            raise UserError(
                f"{folder}: picture {index + 1} is {entry.name} there and {name} in the list (made from another "
                "list, or the folders of query and database are swapped)"
            )
    if len(manifest.entries) < len(names) or not (folder / GLOBAL_NAME).exists():
        raise UserError(
            f"{folder}: extraction is not finished, {len(manifest.entries)} of {len(names)} pictures are there "
            "(run feature_extract again with the same arguments to continue)"
        )


def _read_global(path: Path, num_pictures: int, num_dims: int) -> np.ndarray:
    """N×D float32, C-contiguous."""

    def check(info: ArrayInfo) -> None:
        if len(info.shape) != 2 or info.dtype.kind != "f":
            raise UserError(f"{path}: holds {info.dtype} of shape {info.shape}, expected N×D numbers (another file)")
        if info.shape[0] != num_pictures:
            raise UserError(
                f"{path}: has {info.shape[0]} rows, the list has {num_pictures} pictures (made from another list, or "
                "the folders of query and database are swapped)"
            )
        if info.shape[1] != num_dims:
            raise UserError(
                f"{path}: descriptors have {info.shape[1]} dimensions, expected {num_dims} (extracted with another "
                "num_pcs or checkpoint)"
            )

    return np.ascontiguousarray(read_array(path, check), dtype=np.float32)
