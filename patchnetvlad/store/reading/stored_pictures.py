"""Where the descriptors of a list's pictures are in a feature folder, checked against the list and the configuration.

A folder of ours has a manifest, which says so. A folder made by the published code has none; its files are found by
file stem and their shapes checked against the patch grid when they are read.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import overload

import numpy as np

from patchnetvlad.errors import UserError
from patchnetvlad.image_lists import ImageList
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.store.arrays.array_files import GLOBAL_NAME, ArrayInfo, patch_file_name, read_array
from patchnetvlad.store.arrays.blocks import BlockReader
from patchnetvlad.store.manifest import Manifest, StoreHeader, hash_names, reading_differences


@dataclass(frozen=True)
class StoredPicture:
    """Where the patch descriptors of one picture are.

    files and scales: one element for each of the stored grids that are read; grids: of the patches that these give.
    """

    files: tuple[Path, ...]
    stored: tuple[PatchGrid, ...]
    scales: tuple[tuple[float, ...] | None, ...]
    grids: tuple[PatchGrid, ...]


class PackedPictures(Sequence[StoredPicture]):
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


def check_manifest(manifest: Manifest, names: Sequence[str], expected: StoreHeader | None) -> None:
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
            f"{folder}: features are of {manifest.num_pictures} pictures, the list has {len(names)} (made from another "
            "list, or the folders of query and database are swapped)"
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
            f"{folder}: extraction is not finished, {len(manifest.entries)} of {len(names)} pictures are there "
            "(run feature_extract again with the same arguments to continue)"
        )


def manifest_pictures(folder: Path, manifest: Manifest, patch_sizes: tuple[int, ...]) -> list[StoredPicture]:
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


def published_pictures(
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


def check_files(folder: Path, names: Sequence[str], pictures: Sequence[StoredPicture]) -> None:
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


def read_global(path: Path, num_pictures: int, num_dims: int) -> np.ndarray:
    """N×D float32, C-contiguous; num_dims = 0 stands for any."""

    def check(info: ArrayInfo) -> None:
        if len(info.shape) != 2 or info.dtype.kind != "f":
            raise UserError(f"{path}: holds {info.dtype} of shape {info.shape}, expected N×D numbers (another file)")
        if info.shape[0] != num_pictures:
            raise UserError(
                f"{path}: has {info.shape[0]} rows, the list has {num_pictures} pictures (made from another list, or "
                "the folders of query and database are swapped)"
            )
        if num_dims not in (0, info.shape[1]):
            raise UserError(
                f"{path}: descriptors have {info.shape[1]} dimensions, expected {num_dims} (extracted with another "
                "num_pcs or checkpoint)"
            )

    return np.ascontiguousarray(read_array(path, check), dtype=np.float32)
