"""Preparing a feature folder for writing: one process at a time, no mixing, resuming where a run was killed."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from patchnetvlad.errors import UserError
from patchnetvlad.feature_files import (
    GLOBAL_NAME,
    PATCH_GLOB,
    array_file_bytes,
    create_rows_file,
    num_bands,
    patch_file_name,
    read_array_info,
    remove_temporary_files,
    write_atomically,
)
from patchnetvlad.feature_header import (
    MANIFEST_NAME,
    ManifestEntry,
    ManifestHeader,
    StoreHeader,
    entry_line,
    header_line,
    read_manifest,
    writing_differences,
)

PARTIAL_NAME = GLOBAL_NAME + ".partial"

_LOCK_NAME = ".writing.lock"
_WAYS_OUT = "choose another --output_features_dir, or replace these features with --overwrite"


@dataclass(frozen=True)
class WritableFolder:
    """A folder that is ready for the features of a header.

    manifest: open at its end; rows: the global descriptors' partial file, None when they are complete already;
    rows_offset: where its first row begins, in bytes; missing: the pictures still to be made. The files are
    unbuffered and closed, and the folder released, by the exit stack they were opened with.
    """

    manifest: BinaryIO
    rows: BinaryIO | None
    rows_offset: int
    missing: frozenset[int]


def estimate_bytes(header: StoreHeader, map_size: tuple[int, int], num_pictures: int | None = None) -> int:
    """Bytes on disk for the features of pictures with a feature map of (height, width).

    num_pictures: how many, by default all of the list; a resumed run gives the number of missing ones.
    """
    num_pictures = len(header.names) if num_pictures is None else num_pictures
    scales = ((1e-5 / 3,) * num_bands(header.num_dims),) * len(header.strides) if header.dtype == "int8" else ()
    line = entry_line(ManifestEntry(num_pictures, "n" * 64, "n" * 64, map_size, scales))
    one = sum(array_file_bytes((header.num_dims, len(grid)), header.dtype) for grid in header.grids(map_size))
    return num_pictures * (one + 4 * header.num_dims + len(line))


def check_disk(folder: Path, num_bytes: int) -> None:
    """Raise UserError when the disk of a folder, which need not exist yet, has less than num_bytes free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError(
            f"{folder}: the features need about {num_bytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free "
            "(use another disk, feature_dtype = float16 or int8, a configuration with fewer dimensions or patch "
            "sizes, or local_features = on_demand)"
        )


def open_folder(folder: Path, header: StoreHeader, overwrite: bool, files: ExitStack) -> WritableFolder:
    """Make a folder, or check that it holds the same features and see which are missing.

    Raises UserError when it holds others (overwrite=True removes them), features without a manifest, or when
    another process writes there; OSError as the disk does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder, files)
    remove_temporary_files(folder)
    if overwrite:
        _remove_features(folder)
    finished = _resume(folder, header)
    shape = len(header.names), header.num_dims
    complete, partial = folder / GLOBAL_NAME, folder / PARTIAL_NAME
    source = partial if partial.exists() else complete
    if source.exists():
        info = read_array_info(source)
        if info.shape != shape or info.dtype != np.float32 or info.fortran_order:
            raise UserError(f"{source}: is not the {shape[0]}×{shape[1]} float32 table of the manifest ({_WAYS_OUT})")
        finished = _with_rows(source, info.offset, shape, finished)
    else:
        finished = frozenset()
        create_rows_file(partial, shape)
    missing = frozenset(range(len(header.names))) - finished
    if missing and not partial.exists():
        complete.replace(partial)
    rows = files.enter_context(partial.open("r+b", buffering=0)) if partial.exists() else None
    manifest = files.enter_context((folder / MANIFEST_NAME).open("ab", buffering=0))
    rows_offset = 0 if rows is None else read_array_info(partial).offset
    return WritableFolder(manifest, rows, rows_offset, missing)


def _resume(folder: Path, header: StoreHeader) -> frozenset[int]:
    """Check the manifest against the header, or start it; the pictures whose patch files are all there."""
    manifest = read_manifest(folder)
    if manifest is None:
        foreign = next(_feature_files(folder), None)
        if foreign is not None:
            raise UserError(
                f"{folder}: holds features without a manifest, such as {foreign.name}, and two kinds must not be "
                f"mixed (made by the published code? {_WAYS_OUT})"
            )
        (folder / PARTIAL_NAME).unlink(missing_ok=True)
        write_atomically(folder / MANIFEST_NAME, lambda file: file.write(header_line(header)))
        return frozenset()
    differences = writing_differences(manifest.header, ManifestHeader.of(header))
    if differences:
        raise UserError(f"{folder}: holds other features, {'; '.join(differences)} ({_WAYS_OUT})")
    os.truncate(manifest.path, manifest.whole_bytes)  # a torn last line must not run into the next one
    return frozenset(entry.index for entry in manifest.entries.values() if _has_files(folder, header, entry))


def _has_files(folder: Path, header: StoreHeader, entry: ManifestEntry) -> bool:
    """Whether a picture's patch files are there and whole: a lost machine or a user may have removed them."""
    # The files of another name would be left behind, and the manifest line must name those that are read.
    if entry.feature_name != header.feature_names[entry.index]:
        return False
    for grid in header.grids(entry.map_size) if entry.map_size is not None else ():
        try:
            info = read_array_info(folder / patch_file_name(grid.patch_size, entry.feature_name))
        except UserError:
            return False
        if info.shape != (header.num_dims, len(grid)) or info.dtype != np.dtype(header.dtype):
            return False
    return True


def _with_rows(path: Path, offset: int, shape: tuple[int, int], finished: Iterable[int]) -> frozenset[int]:
    """Those pictures whose global descriptor was written: a row that a lost machine did not write is all zero."""
    with path.open("rb") as file:
        rows = np.memmap(file, np.float32, "r", offset, shape) if shape[0] else np.empty(shape, np.float32)
        return frozenset(index for index in finished if rows[index].any())


def _feature_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob(GLOBAL_NAME)
    yield from folder.glob(PATCH_GLOB)


def _remove_features(folder: Path) -> None:
    # The manifest goes first: what a killed run leaves then counts as foreign, never as finished.
    for name in (MANIFEST_NAME, PARTIAL_NAME):
        (folder / name).unlink(missing_ok=True)
    for path in list(_feature_files(folder)):
        path.unlink()


def _lock(folder: Path, files: ExitStack) -> None:
    """Keep other processes from writing into the folder until `files` is closed, or this process ends in any way."""
    if sys.platform == "win32":
        return
    import fcntl

    path = folder / _LOCK_NAME
    lock = files.enter_context(path.open("wb"))
    try:
        # lockf, unlike flock, is not inherited by forked data loaders, which outlive a killed parent for a while.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"{folder}: another process writes features there (wait for it, or end it)") from error
    except OSError:
        pass  # a network file system without locks
    files.callback(path.unlink, missing_ok=True)
