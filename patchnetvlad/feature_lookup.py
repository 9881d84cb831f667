"""Where the patch descriptors of each picture of a folder are: files, grids, scales."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

from patchnetvlad.errors import UserError
from patchnetvlad.feature_files import patch_file_name
from patchnetvlad.feature_header import Manifest, StoreHeader
from patchnetvlad.patch_grid import PatchGrid


@dataclass(frozen=True)
class StoredPicture:
    """Where the patch descriptors of one picture are, one element for each patch size that is read."""

    files: tuple[Path, ...]
    grids: tuple[PatchGrid, ...]
    scales: tuple[tuple[float, ...] | None, ...]


def manifest_pictures(folder: Path, manifest: Manifest, patch_sizes: tuple[int, ...]) -> list[StoredPicture]:
    """Pictures of a finished folder, with a selection of its patch sizes."""
    header = manifest.header
    places = [header.patch_sizes.index(patch_size) for patch_size in patch_sizes]

    @lru_cache(maxsize=1024)
    def grids(map_size: tuple[int, int] | None) -> tuple[PatchGrid, ...]:
        if map_size is None:
            return ()
        return tuple(
            PatchGrid(*map_size, header.patch_sizes[place], header.strides[place], header.geometry) for place in places
        )

    pictures = []
    for index in range(header.num_pictures):
        entry = manifest.entries[index]
        files = tuple(folder / patch_file_name(patch_size, entry.feature_name) for patch_size in patch_sizes)
        scales = tuple(entry.scales[place] if entry.scales else None for place in places)
        pictures.append(StoredPicture(files, grids(entry.map_size), scales))
    return pictures


def published_pictures(
    folder: Path,
    names: Sequence[str],
    feature_names: Sequence[str],
    expected: StoreHeader,
    map_size: tuple[int, int] | None,
) -> list[StoredPicture]:
    """Pictures of a folder without a manifest, by file stem or else by their names of our own."""
    if not expected.patch_sizes:
        return [StoredPicture((), (), ())] * len(names)
    if map_size is None:
        raise UserError(
            f"{folder}: has no manifest.jsonl, and pictures of their own size leave the patch grids unknown (give "
            "imageresizew and imageresizeh, or extract again)"
        )
    there = {path.name for path in folder.iterdir()}
    stems = [PurePath(name).stem for name in names]
    counts = Counter(PurePath(name).stem for name in set(names))  # a picture may be listed twice
    grids = expected.grids(map_size)
    scales = (None,) * len(grids)
    pictures = []
    for name, stem, feature_name in zip(names, stems, feature_names, strict=True):
        # The published code wrote pictures of one stem over each other: that file is of nobody knows which.
        candidates = (stem, feature_name) if counts[stem] == 1 else (feature_name,)
        found = candidates[0]
        for candidate in candidates:
            if patch_file_name(grids[0].patch_size, candidate) in there:
                found = candidate
                break
        else:
            if patch_file_name(grids[0].patch_size, stem) in there:
                raise UserError(
                    f"{folder}: the features of {name} may be another picture's, {counts[stem]} pictures of the list "
                    f"are called {stem} (the published code wrote them over each other; extract again)"
                )
        files = tuple(folder / patch_file_name(grid.patch_size, found) for grid in grids)
        pictures.append(StoredPicture(files, grids, scales))
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
