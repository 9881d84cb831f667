"""Descriptors on disk, for those who read them; writing is `FeatureWriter`'s, and both speak of one StoreHeader.

A folder of ours has a manifest, which is checked against the picture list and the configuration. A folder made by the
published code has none; its files are found by file stem and their shapes checked against the patch grid.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePath
from types import TracebackType
from typing import overload

import numpy as np
import torch

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError, counted
from patchnetvlad.image_lists import ImageList
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.patch_rounding import RoundedPatches, round_patches, rounded_bytes
from patchnetvlad.store.feature_blocks import BlockReader
from patchnetvlad.store.feature_cache import Arrays, CacheStatistics, PictureCache
from patchnetvlad.store.feature_files import (
    CODECS,
    CPU,
    GLOBAL_NAME,
    ArrayInfo,
    Codec,
    ProductCodec,
    StoredArray,
    patch_file_name,
    read_array,
    read_array_info,
    stored_codec,
)
from patchnetvlad.store.feature_header import Manifest, StoreHeader, hash_names, read_manifest, reading_differences


class FeatureStore:
    """Finished features of one picture list.

    global_: N×D float32, row = line of the list; names: the list; num_dims: D; patch_sizes: those that
    `patches` gives, in this order.
    Patch descriptors are read when asked for and kept, as they are stored, in a least-recently-used cache: float16
    int8 and codes take less of the memory there and become float32 at every `patches`. After `round_references` the
    cache keeps 8-bit descriptors for matching beside them, except beside codes, where they are made at every `patches`.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        global_: np.ndarray,
        pictures: Sequence["StoredPicture"],
        patch_sizes: tuple[int, ...],
        codec: Codec | None,
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
        codec: Codec | None = None
        if manifest is not None:
            _check_manifest(manifest, pictures.names, expected)
            sizes = manifest.header.patch_sizes if expected is None else expected.patch_sizes
            packed = manifest.header.layout == "packed"
            read = _map_global if packed else _read_global
            global_ = read(folder / GLOBAL_NAME, len(pictures), manifest.header.num_dims)
            stored = _PackedPictures(folder, manifest, sizes) if packed else _manifest_pictures(folder, manifest, sizes)
            dtype = manifest.header.dtype if sizes else "float32"  # global descriptors need no quantiser
            codec = stored_codec(folder, dtype, manifest.header.codec_sha256)
        elif expected is not None:
            sizes = expected.patch_sizes
            global_ = _read_global(folder / GLOBAL_NAME, len(pictures), expected.num_dims)
            stored = _published_pictures(folder, pictures, expected, map_size)
        else:
            raise UserError(f"{folder}: has no manifest.jsonl, so what made it is unknown (give the configuration)")
        if not isinstance(stored, _PackedPictures):
            _check_files(folder, pictures.names, stored)
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
        return isinstance(self._codec, ProductCodec)

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
        stored = zip(arrays[:count], picture.scales, strict=True)
        descriptors = tuple(self._codec.decode(StoredArray(array, scales), device) for array, scales in stored)
        if isinstance(self._codec, ProductCodec):
            every = self._codec.estimate(descriptors, picture.stored, picture.grids)
            descriptors = tuple(rows.to(device) for rows in every)
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
        if isinstance(self._pictures, _PackedPictures):
            arrays = self._pictures.read(index)
        else:
            arrays = [self._load_array(path, grid) for path, grid in zip(picture.files, picture.stored, strict=True)]
        if self._rounded and not self.coded:  # beside codes they would fill the cache
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


@dataclass(frozen=True)
class StoredPicture:
    """Where the patch descriptors of one picture are.

    files and scales: one element for each of the stored grids that are read; grids: of the patches that these give.
    """

    files: tuple[Path, ...]
    stored: tuple[PatchGrid, ...]
    scales: tuple[tuple[float, ...] | None, ...]
    grids: tuple[PatchGrid, ...]


class _PackedPictures(Sequence[StoredPicture]):
    """Pictures of a packed folder, with a selection of its patch sizes; each is made when it is asked for."""

    def __init__(self, folder: Path, manifest: Manifest, patch_sizes: tuple[int, ...]) -> None:
        """Raises UserError when blocks are missing or damaged."""
        self._header = manifest.header
        self._count = manifest.num_pictures
        self._reader = BlockReader(folder, self._header.block_layout(self._count), manifest.blocks.values())
        self._read = lru_cache(maxsize=1024)(partial(_read_grids, self._header, patch_sizes))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> StoredPicture: ...

    @overload
    def __getitem__(self, index: slice) -> list[StoredPicture]: ...

    def __getitem__(self, index: int | slice) -> StoredPicture | list[StoredPicture]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        stored, places, grids = self._read(self._reader.map_size(index))
        table = self._reader.scales(index)
        scales: tuple[tuple[float, ...] | None, ...] = (None,) * len(places)
        if table is not None:
            rows = table.reshape(len(self._header.patch_sizes), -1)
            scales = tuple(tuple(rows[place].tolist()) for place in places)
        return StoredPicture((), stored, scales, grids)

    def read(self, index: int) -> list[np.ndarray]:
        """Stored arrays of a picture, in one read whatever the selection."""
        arrays = self._reader.read(index)
        return [arrays[place] for place in self._read(self._reader.map_size(index))[1]]


def _read_grids(
    header: StoreHeader, patch_sizes: tuple[int, ...], map_size: tuple[int, int] | None
) -> tuple[tuple[PatchGrid, ...], tuple[int, ...], tuple[PatchGrid, ...]]:
    """For a selection of patch sizes: the grids to read, their places among the stored ones, and what they give."""
    if map_size is None:
        return (), (), ()
    all_stored = header.stored_grids(map_size)
    stored = header.grids_to_read(map_size, patch_sizes)
    given = {grid.patch_size: grid for grid in header.grids(map_size)}
    return stored, tuple(map(all_stored.index, stored)), tuple(given[size] for size in patch_sizes)


def _check_manifest(manifest: Manifest, names: Sequence[str], expected: StoreHeader | None) -> None:
    folder = manifest.path.parent
    if expected is not None:
        differences = reading_differences(manifest.header, expected)
        if differences:
            raise UserError(
                f"{folder}: features do not fit the configuration, {'; '.join(differences)} (extracted with another "
                "configuration or checkpoint: give the same one, or extract again)"
            )
    if manifest.num_pictures != len(names):
        raise UserError(
            f"{folder}: features are of {counted(manifest.num_pictures, 'picture')}, the list has {len(names)} (made "
            "from another list, or the folders of query and database are swapped)"
        )
    if manifest.header.layout == "packed":
        if manifest.names_sha256 != hash_names(names):
            raise UserError(
                f"{folder}: features are of other pictures than the list names, or in another order (made from another "
                "list, or the folders of query and database are swapped)"
            )
        if not (folder / GLOBAL_NAME).exists():
            raise UserError(
                f"{folder}: extraction is not finished (run feature_extract again with the same arguments to continue)"
            )
        return
    for index, name in enumerate(names):
        entry = manifest.entries.get(index)
        if entry is not None and entry.name != name:
            raise UserError(
                f"{folder}: picture {index + 1} is {entry.name} there and {name} in the list (made from another "
                "list, or the folders of query and database are swapped)"
            )
    if len(manifest.entries) < len(names) or not (folder / GLOBAL_NAME).exists():
        raise UserError(
            f"{folder}: extraction is not finished, {len(manifest.entries)} of {counted(len(names), 'picture')} are "
            "there (run feature_extract again with the same arguments to continue)"
        )


def _manifest_pictures(folder: Path, manifest: Manifest, patch_sizes: tuple[int, ...]) -> list[StoredPicture]:
    """Pictures of a finished folder, with a selection of its patch sizes."""
    read = lru_cache(maxsize=1024)(partial(_read_grids, manifest.header, patch_sizes))
    pictures = []
    for index in range(manifest.num_pictures):
        entry = manifest.entries[index]
        stored, places, grids = read(entry.map_size)
        files = tuple(folder / patch_file_name(grid.patch_size, entry.feature_name) for grid in stored)
        scales = tuple(entry.scales[place] if entry.scales else None for place in places)
        pictures.append(StoredPicture(files, stored, scales, grids))
    return pictures


def _published_pictures(
    folder: Path,
    listed: ImageList,
    expected: StoreHeader,
    map_size: tuple[int, int] | None,
) -> list[StoredPicture]:
    """Pictures of a folder without a manifest, by file stem or else by their names of our own."""
    if not expected.patch_sizes:
        return [StoredPicture((), (), (), ())] * len(listed)
    if map_size is None:
        raise UserError(
            f"{folder}: has no manifest.jsonl, and pictures of their own size leave the patch grids unknown (give "
            "imageresizew and imageresizeh, or extract again)"
        )
    there = {path.name for path in folder.iterdir()}
    stems = [PurePath(name).stem for name in listed.names]
    counts = Counter(PurePath(name).stem for name in set(listed.names))  # a picture may be listed twice
    grids = expected.grids(map_size)
    scales = (None,) * len(grids)
    pictures = []
    for name, stem, feature_name in zip(listed.names, stems, listed.feature_names, strict=True):
        # The published code wrote pictures of one stem over each other: that file is of nobody knows which.
        candidates = (stem, feature_name) if counts[stem] == 1 else (feature_name,)
        file_stem = candidates[0]
        for candidate in candidates:
            if patch_file_name(grids[0].patch_size, candidate) in there:
                file_stem = candidate
                break
        else:
            if patch_file_name(grids[0].patch_size, stem) in there:
                raise UserError(
                    f"{folder}: the features of {name} may be another picture's, {counts[stem]} pictures of the list "
                    f"are called {stem} (the published code wrote them over each other; extract again)"
                )
        files = tuple(folder / patch_file_name(grid.patch_size, file_stem) for grid in grids)
        pictures.append(StoredPicture(files, grids, scales, grids))
    return pictures


def _check_files(folder: Path, names: Sequence[str], pictures: Sequence[StoredPicture]) -> None:
    """UserError unless every file is there: better now than after hours of matching."""
    there = {path.name for path in folder.iterdir()}
    missing = [
        (path, name)
        for name, picture in zip(names, pictures, strict=True)
        for path in picture.files
        if path.name not in there and not path.exists()  # file systems may spell a name their own way
    ]
    if missing:
        path, name = missing[0]
        raise UserError(
            f"{path}: is missing, the patch features of {name}, as are {len(missing) - 1} further files (extracted "
            "with other patch sizes, not finished, or removed)"
        )


def _map_global(path: Path, num_pictures: int, num_dims: int) -> np.ndarray:
    """N×D float32 that stay on disk."""
    info = read_array_info(path)
    if info.shape != (num_pictures, num_dims) or info.dtype != np.float32 or info.fortran_order:
        raise UserError(
            f"{path}: holds {info.dtype} of shape {info.shape}, expected {num_pictures}×{num_dims} float32 (another "
            "file)"
        )
    return np.memmap(path, np.float32, "r", info.offset, info.shape)


def _read_global(path: Path, num_pictures: int, num_dims: int) -> np.ndarray:
    """N×D float32, C-contiguous; num_dims = 0 stands for any."""

    def check(info: ArrayInfo) -> None:
        if len(info.shape) != 2 or info.dtype.kind != "f":
            raise UserError(f"{path}: holds {info.dtype} of shape {info.shape}, expected N×D numbers (another file)")
        if info.shape[0] != num_pictures:
            raise UserError(
                f"{path}: has {counted(info.shape[0], 'row')}, the list has {counted(num_pictures, 'picture')} (made "
                "from another list, or the folders of query and database are swapped)"
            )
        if num_dims not in (0, info.shape[1]):
            raise UserError(
                f"{path}: descriptors have {info.shape[1]} dimensions, expected {num_dims} (extracted with another "
                "num_pcs or checkpoint)"
            )

    return np.ascontiguousarray(read_array(path, check), dtype=np.float32)
