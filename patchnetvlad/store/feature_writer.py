"""Writing a feature folder so that a run of hours may be killed at any moment and continued, or grow with its list.

A picture counts as finished once its line is in the manifest, and the line is written after its files have their
names and are on the disk. Global descriptors are rows of ``globalfeats.npy.partial``, which becomes
``globalfeats.npy`` when all pictures are there: whoever finds that file may trust all of them.

A folder grows when it is opened for a list that has more pictures: rows take their new places in a file beside the
others, and the new manifest, put in place by one rename, decides which of the two belongs to it.
"""

import contextlib
import errno
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, Protocol

import numpy as np
from torch import Tensor

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.files import (
    locked,
    make_folder,
    reason,
    remove_temporary_files,
    some_of,
    sync_files,
    sync_folder,
    told,
    writing,
)
from patchnetvlad.image_lists import ImageList, hash_names, unique_feature_names
from patchnetvlad.patch_codes import PatchCodec
from patchnetvlad.store.feature_blocks import (
    BLOCK_GLOB,
    PICTURES_IN_BLOCK,
    BlockLayout,
    BlockWriter,
    damaged_file,
    file_sizes,
)
from patchnetvlad.store.feature_files import (
    CODEC_NAME,
    GLOBAL_NAME,
    PATCH_GLOB,
    StoredArray,
    codec_of,
    create_rows_file,
    patch_file_name,
    read_array_info,
    stored_codec,
    write_patch_array,
    write_patch_codec,
)
from patchnetvlad.store.feature_header import (
    MANIFEST_NAME,
    Manifest,
    ManifestEntry,
    StoreHeader,
    block_line,
    entry_line,
    header_line,
    read_manifest,
    writing_differences,
)

PARTIAL_NAME = GLOBAL_NAME + ".partial"
GROWN_NAME = GLOBAL_NAME + ".grown"

logger = logging.getLogger(__name__)

_WAYS_OUT = "choose another --output_features_dir, or replace these features with --overwrite"

# Pictures are put on the disk together, in a fraction of the time that each alone would take. A killed process loses
# no more than these, or those of so many seconds.
_TOGETHER = 64
_SECONDS = 2.0


class FeatureWriter:
    """Writes the features of a picture list into a folder, beside the computation that makes them.

        with FeatureWriter(folder, pictures, header) as writer:
            for index in writer.missing:
                writer.write(index, global_row, patch_features)
            writer.finish()

    Opening a folder with an equal header resumes there: finished pictures are not in `missing`, also those of a
    shorter list whose pictures are all in this one, in whatever order. They keep their files, and new pictures stay
    apart from them: `pictures` says what all are called. Files are written
    by a background thread, in the order of `write`, at most `queue_size` pictures behind; its errors are raised by
    a following `write`, `finish` or `close`, and nothing is written after one. Leaving the block without `finish`,
    by an exception too, keeps every picture that was handed over.

    Raises UserError when the folder holds other features, or features without a manifest (overwrite=True removes
    either), when another process writes there, when the disk fails or is full, and for NaN or infinity.
    """

    def __init__(
        self,
        folder: Path,
        pictures: ImageList,
        header: StoreHeader,
        *,
        trained: PatchCodec | None = None,
        overwrite: bool = False,
        queue_size: int = 4,
    ) -> None:
        """trained: the quantiser of a header with codes, which is kept in the folder."""
        if header.layout == "files":
            _check_list(pictures)
        self._codec = codec_of(header.dtype, trained)
        if header.codec_sha256 != (trained.sha256 if trained else ""):
            raise ValueError("the quantiser is not that of the header")
        if header.checkpoint_sha256 is None or header.num_dims < 1:
            raise ValueError("the header says not what makes the features")
        self.folder = folder
        self.header = header
        self._queue_size = max(1, queue_size)
        with ExitStack() as files, told(folder, "features cannot be written there"):
            self._opened = _open_folder(folder, pictures, header, trained, overwrite, files)
            self._files = files.pop_all()
        self.pictures = replace(pictures, feature_names=self._opened.feature_names)
        self._lock = Lock()
        self._missing = set(self._opened.missing)
        writes = _Blocks if header.layout == "packed" else _PictureFiles
        self._layout: _Layout = writes(folder, pictures, header, sorted(self._missing))
        self._unrecorded: list[_Finished] = []
        self._recorded_at = time.monotonic()
        self._failure: UserError | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feature-writer")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(UserError):  # the first error is the one to tell
                self.close()

    @property
    def missing(self) -> list[int]:
        """Indices of the pictures without finished features, ascending; those in the queue are still among them."""
        with self._lock:
            return sorted(self._missing)

    def write(self, index: int, global_: Tensor, patches: PatchFeatures | None = None) -> None:
        """Hand over one missing picture: its global descriptor (D,) and, unless the store is global, its patches.

        Tensors may be on any device. Patch descriptors on the CPU are taken as they are: do not change them
        afterwards. Returns at once unless the queue is full.
        """
        patches = patches or PatchFeatures((), ())
        self._check(index, global_, patches)
        encoded = None
        if any(tensor.device.type != "cpu" for tensor in patches.descriptors):
            encoded = self._encode(index, patches.descriptors)  # made small before they are transferred
        row = global_.detach().cpu().numpy().astype(np.float32)
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._queue_size):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._store, index, row, patches, encoded))

    def finish(self) -> None:
        """Wait for the background thread and give the complete global descriptors their name.

        Raises ValueError when pictures are missing.
        """
        self._wait()
        if self._failure is not None:
            raise self._failure
        if self._missing:
            raise ValueError(f"{len(self._missing)} pictures were not written, the first is {min(self._missing)}")
        partial = self.folder / PARTIAL_NAME
        if self._opened.rows is None or not partial.exists():
            return
        try:
            os.fsync(self._opened.rows.fileno())
            self._opened.rows.close()
            partial.replace(self.folder / GLOBAL_NAME)
        except OSError as error:
            raise self._disk_error(error, GLOBAL_NAME) from error

    def close(self) -> None:
        """Wait for the background thread and release the folder; a with block calls it."""
        try:
            self._wait()
        finally:
            self._pool.shutdown(wait=True)
            self._layout.close()
            self._files.close()

    def _wait(self) -> None:
        """Let the background thread do what it was given, and record it; raises its error."""
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.submit(self._record).result()

    def _check(self, index: int, global_: Tensor, patches: PatchFeatures) -> None:
        """ValueError when what the program hands over does not fit the header."""
        header = self.header
        if index not in self._missing:
            raise ValueError(f"picture {index} is finished already, or not in the list")
        if tuple(global_.shape) != (header.num_dims,):
            raise ValueError(f"global descriptor has shape {tuple(global_.shape)}, expected ({header.num_dims},)")
        expected = header.grids(_map_size(patches) or (0, 0))
        if patches.grids != expected or len(patches.descriptors) != len(expected):
            raise ValueError(f"grids are {patches.grids}, expected {expected}")
        for tensor, grid in zip(patches.descriptors, expected, strict=True):
            if tuple(tensor.shape) != (len(grid), header.num_dims):
                raise ValueError(f"patch descriptors have shape {tuple(tensor.shape)} on {grid}")

    def _encode(self, index: int, descriptors: Sequence[Tensor]) -> list[StoredArray]:
        try:
            return [self._codec.encode(tensor) for tensor in descriptors]
        except ValueError as error:
            raise self._not_finite(index) from error

    def _store(self, index: int, row: np.ndarray, patches: PatchFeatures, encoded: list[StoredArray] | None) -> None:
        """Write one picture; runs in the background thread."""
        if self._failure is not None:
            raise self._failure
        name = self.pictures.names[index]
        try:
            if not np.isfinite(row).all():
                raise self._not_finite(index)
            stored = self._encode(index, patches.descriptors) if encoded is None else encoded
            finished = self._layout.add(index, _map_size(patches), stored)
            assert self._opened.rows is not None  # this picture is missing, so the rows are not complete
            self._opened.rows.seek(self._opened.rows_offset + index * row.nbytes)
            _write_all(self._opened.rows, row.tobytes())
        except (UserError, OSError) as error:
            with contextlib.suppress(UserError):
                self._record()
            self._failure = self._told(error, name)
            raise self._failure from error
        self._unrecorded += finished
        if len(self._unrecorded) >= _TOGETHER or time.monotonic() - self._recorded_at >= _SECONDS:
            self._record()

    def _record(self) -> None:
        """Put the pictures that are written on the disk, then into the manifest; in the background thread."""
        done, self._unrecorded = self._unrecorded, []
        self._recorded_at = time.monotonic()
        if not done:
            return
        try:
            sync_files(path for finished in done for path in finished.paths)
            assert self._opened.rows is not None
            os.fsync(self._opened.rows.fileno())
            _append(self._opened.manifest, b"".join(finished.line for finished in done))
            os.fsync(self._opened.manifest.fileno())
        except OSError as error:
            self._failure = self._failure or self._told(error, self.pictures.names[done[0].pictures[0]])
            raise self._failure from error
        with self._lock:
            for finished in done:
                self._missing.difference_update(finished.pictures)

    def _not_finite(self, index: int) -> UserError:
        return UserError(
            f"{self.pictures.names[index]}: its descriptors hold NaN or infinity (broken checkpoint, or overflow under "
            "mixed precision)"
        )

    def _told(self, error: UserError | OSError, name: str) -> UserError:
        cause = error.__cause__ if isinstance(error, UserError) else error
        return self._disk_error(cause, name) if isinstance(cause, OSError) else UserError(str(error))

    def _disk_error(self, error: OSError, name: str) -> UserError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        total = len(self.pictures)
        advice = "or store less with feature_dtype, then " if full else ""
        return UserError(
            f"{self.folder}: writing the features of {name} failed: {reason(error)} ({total - len(self.missing)} of "
            f"{total} pictures are kept; {advice}run the same command again to continue)"
        )


@dataclass(frozen=True)
class _Finished:
    """Pictures whose files have their names: line: the manifest's."""

    pictures: Sequence[int]
    paths: list[Path]
    line: bytes


class _Layout(Protocol):
    """Where the patch descriptors of pictures go; used by the background thread alone."""

    def __init__(self, folder: Path, pictures: ImageList, header: StoreHeader, missing: Sequence[int]) -> None:
        """missing: the pictures still to be written, ascending."""
        ...

    def add(self, index: int, map_size: tuple[int, int] | None, stored: Sequence[StoredArray]) -> list[_Finished]:
        """Write a missing picture; returns what is finished by it."""
        ...

    def close(self) -> None:
        """Drop what is not finished."""
        ...


class _PictureFiles:
    """Files of its own for each picture, as the published code has them."""

    def __init__(self, folder: Path, pictures: ImageList, header: StoreHeader, missing: Sequence[int]) -> None:
        self._folder, self._pictures, self._header = folder, pictures, header

    def add(self, index: int, map_size: tuple[int, int] | None, stored: Sequence[StoredArray]) -> list[_Finished]:
        """Write the picture's files."""
        feature_name = self._pictures.feature_names[index]
        paths = [self._folder / patch_file_name(size, feature_name) for size in self._header.patch_sizes]
        for path, (array, _) in zip(paths, stored, strict=True):
            write_patch_array(path, array)
        scales = tuple(bands for _, bands in stored if bands is not None)
        entry = ManifestEntry(index, self._pictures.names[index], feature_name, map_size, scales)
        return [_Finished([index], paths, entry_line(entry))]

    def close(self) -> None:
        """Nothing is left unfinished."""


class _Blocks:
    """Blocks of pictures; one that comes before its turn waits in memory."""

    def __init__(self, folder: Path, pictures: ImageList, header: StoreHeader, missing: Sequence[int]) -> None:
        self._folder, self._layout = folder, header.block_layout(len(pictures))
        self._turns = deque(missing)  # whole blocks
        self._waiting: dict[int, tuple[tuple[int, int], Sequence[StoredArray]]] = {}
        self._block: BlockWriter | None = None

    def add(self, index: int, map_size: tuple[int, int] | None, stored: Sequence[StoredArray]) -> list[_Finished]:
        """Add the picture to its block, and those that waited for it."""
        self._waiting[index] = (map_size or (0, 0), stored)
        finished = []
        while self._turns and self._turns[0] in self._waiting:
            turn = self._turns.popleft()
            size, arrays = self._waiting.pop(turn)
            if self._block is None:
                self._block = BlockWriter(self._folder, self._layout, turn // PICTURES_IN_BLOCK)
            scales = np.array([scale for _, scales in arrays for scale in scales or ()], dtype=np.float32)
            self._block.add(size, [array for array, _ in arrays], scales)
            if self._block.complete:
                block = self._block.finish()
                line = block_line(block)
                finished.append(_Finished(self._layout.pictures(block.number), self._block.paths, line))
                self._block = None
        return finished

    def close(self) -> None:
        """Drop the block that is not complete."""
        if self._block is not None:
            self._block.close()


@dataclass(frozen=True)
class _WritableFolder:
    """A folder that is ready for the features of a header.

    manifest: open at its end; rows: the global descriptors' partial file, None when they are complete already;
    rows_offset: where its first row begins, in bytes; missing: the pictures still to be made; feature_names: of all
    pictures, in the list's order. The files are unbuffered and closed, and the folder released, by the exit stack
    they were opened with.
    """

    manifest: BinaryIO
    rows: BinaryIO | None
    rows_offset: int
    missing: frozenset[int]
    feature_names: Sequence[str]


def _open_folder(
    folder: Path,
    pictures: ImageList,
    header: StoreHeader,
    trained: PatchCodec | None,
    overwrite: bool,
    files: ExitStack,
) -> _WritableFolder:
    """Make a folder, or check that it holds the same features and see which are missing."""
    make_folder(folder)
    files.enter_context(locked(folder))
    remove_temporary_files(folder)
    if overwrite:
        _remove_features(folder)
    entries, finished = _resume(folder, pictures, header, trained)
    feature_names = pictures.feature_names
    if entries:
        feature_names = unique_feature_names(pictures.names, {entry.name: entry.feature_name for entry in entries})
    shape = len(pictures), header.num_dims
    complete, partial = folder / GLOBAL_NAME, folder / PARTIAL_NAME
    source = partial if partial.exists() else complete
    _remove_damaged(source)
    if source.exists():
        finished = _with_rows(source, shape, finished)
        if header.layout == "packed":
            finished = _whole_blocks(header.block_layout(len(pictures)), finished)
    else:
        finished = frozenset()
        create_rows_file(partial, shape)
    missing = frozenset(range(len(pictures))) - finished
    if missing and not partial.exists():
        complete.replace(partial)
    rows = files.enter_context(partial.open("r+b", buffering=0)) if partial.exists() else None
    manifest = files.enter_context((folder / MANIFEST_NAME).open("ab", buffering=0))
    rows_offset = 0 if rows is None else read_array_info(partial).offset
    return _WritableFolder(manifest, rows, rows_offset, missing, feature_names)


def _remove_damaged(rows: Path) -> None:
    """Remove global descriptors that were cut off: which rows are right is not known, so all are made again."""
    try:
        if rows.exists():
            read_array_info(rows)
    except UserError as error:
        logger.warning("%s: all pictures are described again", error)
        rows.unlink()


def _resume(
    folder: Path, pictures: ImageList, header: StoreHeader, trained: PatchCodec | None
) -> tuple[tuple[ManifestEntry, ...], frozenset[int]]:
    """Check the manifest against the header, or start it, or make it the manifest of a longer list.

    Returns its pictures with files of their own, and the numbers of all pictures whose patch files are there.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        foreign = next(_feature_files(folder), None)
        if foreign is not None:
            raise UserError(
                f"{folder}: holds features without a manifest, such as {foreign.name}, and two kinds must not be "
                f"mixed (made by the published code? {_WAYS_OUT})"
            )
        (folder / PARTIAL_NAME).unlink(missing_ok=True)
        if trained is not None:
            write_patch_codec(folder, trained)
        with writing(folder / MANIFEST_NAME) as file:
            file.write(header_line(header, pictures.names, pictures.source.name))
        return (), frozenset()
    _settle_growth(folder, manifest)
    differences = writing_differences(manifest.header, header) + _list_differences(manifest, pictures)
    if differences:
        raise UserError(f"{folder}: holds other features, {'; '.join(differences)} ({_WAYS_OUT})")
    stored_codec(folder, manifest.header.dtype, manifest.header.codec_sha256)
    if manifest.num_pictures < len(pictures):
        if header.layout == "packed":
            raise UserError(
                f"{folder}: holds {manifest.num_pictures} pictures in blocks, which do not grow, and the list has "
                f"{len(pictures)} ({_WAYS_OUT})"
            )
        entries = _grow(folder, manifest, pictures)
    else:
        os.truncate(manifest.path, manifest.whole_bytes)  # a torn last line must not run into the next one
        entries = tuple(manifest.entries.values())
    if header.layout == "packed":
        layout, there = header.block_layout(len(pictures)), file_sizes(folder)
        whole = (block for block in manifest.blocks.values() if damaged_file(layout, block, there) is None)
        return (), frozenset(index for block in whole for index in layout.pictures(block.number))
    return entries, frozenset(entry.index for entry in entries if _has_files(folder, header, entry))


def _list_differences(manifest: Manifest, pictures: ImageList) -> list[str]:
    if manifest.num_pictures < len(pictures):
        listed = set(pictures.names)
        absent = [entry.name for entry in manifest.entries.values() if entry.name not in listed]
        return [f"pictures that the list has not: {some_of(absent)}"] if absent else []
    if manifest.num_pictures > len(pictures):
        return [f"pictures in the list: {manifest.num_pictures} there, {len(pictures)} wanted"]
    if manifest.names_sha256 != hash_names(pictures.names):
        return ["picture list: other names, or another order"]
    return []


def _grow(folder: Path, manifest: Manifest, pictures: ImageList) -> tuple[ManifestEntry, ...]:
    """Give finished pictures the places that they have in a longer list; their entries there."""
    known = {entry.name: entry for entry in manifest.entries.values()}
    placed = [(known[name], index) for index, name in enumerate(pictures.names) if name in known]
    entries = tuple(replace(entry, index=index) for entry, index in placed)
    partial, complete, grown = folder / PARTIAL_NAME, folder / GLOBAL_NAME, folder / GROWN_NAME
    source = partial if partial.exists() else complete
    if source.exists():
        dims = manifest.header.num_dims
        old = _open_rows(source, (manifest.num_pictures, dims))
        create_rows_file(grown, (len(pictures), dims))
        offset = read_array_info(grown).offset
        with grown.open("r+b", buffering=0) as new:
            for entry, index in placed:
                new.seek(offset + index * old[0].nbytes)
                _write_all(new, old[entry.index].tobytes())
            os.fsync(new.fileno())
        sync_folder(folder)
    with writing(manifest.path) as file:  # from here on, the grown rows are the manifest's
        file.write(header_line(manifest.header, pictures.names, pictures.source.name))
        file.writelines(map(entry_line, entries))
    _use_grown_rows(folder)
    return entries


def _settle_growth(folder: Path, manifest: Manifest) -> None:
    """Complete the growth of a killed run if its manifest is in place, otherwise undo it.

    A list only ever grows, so the number of rows tells whether they are the manifest's.
    """
    grown = folder / GROWN_NAME
    if grown.exists():
        with contextlib.suppress(UserError):  # cut off while it was made
            if read_array_info(grown).shape[0] == manifest.num_pictures:
                _use_grown_rows(folder)
        grown.unlink(missing_ok=True)


def _use_grown_rows(folder: Path) -> None:
    grown = folder / GROWN_NAME
    if grown.exists():
        grown.replace(folder / PARTIAL_NAME)
        (folder / GLOBAL_NAME).unlink(missing_ok=True)


def _has_files(folder: Path, header: StoreHeader, entry: ManifestEntry) -> bool:
    """Whether a picture's patch files are there and whole: a lost machine or a user may have removed them."""
    for grid in header.grids(entry.map_size) if entry.map_size is not None else ():
        try:
            info = read_array_info(folder / patch_file_name(grid.patch_size, entry.feature_name))
        except UserError:
            return False
        if info.shape != (header.codec.width(header.num_dims), len(grid)) or info.dtype != header.codec.dtype:
            return False
    return True


def _with_rows(path: Path, shape: tuple[int, int], finished: Iterable[int]) -> frozenset[int]:
    """Those pictures whose global descriptor was written: a row that a lost machine did not write is all zero."""
    rows = _open_rows(path, shape)
    return frozenset(index for index in finished if rows[index].any())


def _whole_blocks(layout: BlockLayout, finished: frozenset[int]) -> frozenset[int]:
    """Those pictures whose whole block is finished."""
    blocks = {index // PICTURES_IN_BLOCK for index in finished}
    whole = (layout.pictures(number) for number in blocks if finished.issuperset(layout.pictures(number)))
    return frozenset(index for pictures in whole for index in pictures)


def _open_rows(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Global descriptors, memory-mapped for reading."""
    info = read_array_info(path)
    if info.shape != shape or info.dtype != np.float32 or info.fortran_order:
        raise UserError(f"{path}: is not the {shape[0]}×{shape[1]} float32 table of the manifest ({_WAYS_OUT})")
    return np.memmap(path, np.float32, "r", info.offset, shape)


def _feature_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob(GLOBAL_NAME)
    yield from folder.glob(PATCH_GLOB)
    yield from folder.glob(BLOCK_GLOB)


def _remove_features(folder: Path) -> None:
    # The manifest goes first: what a killed run leaves then counts as foreign, never as finished.
    for name in (MANIFEST_NAME, PARTIAL_NAME, GROWN_NAME, CODEC_NAME):
        (folder / name).unlink(missing_ok=True)
    for path in list(_feature_files(folder)):
        path.unlink()


def _check_list(pictures: ImageList) -> None:
    """ValueError when files could not be told apart by the names that the program gives them."""
    # A picture may be listed twice; two pictures must not share files.
    if len(set(pictures.feature_names)) != len(set(zip(pictures.names, pictures.feature_names, strict=True))):
        raise ValueError("feature_names must differ from picture to picture")
    if any("/" in name or "\\" in name or "\0" in name for name in pictures.feature_names):
        raise ValueError("feature_names must be plain file names")


def _map_size(patches: PatchFeatures) -> tuple[int, int] | None:
    return (patches.grids[0].map_height, patches.grids[0].map_width) if patches.grids else None


def _write_all(file: BinaryIO, content: bytes) -> None:
    while content:  # an unbuffered write may stop early, the next one then says why
        content = content[file.write(content) :]


def _append(manifest: BinaryIO, lines: bytes) -> None:
    """Append lines, or nothing."""
    end = os.fstat(manifest.fileno()).st_size
    try:
        _write_all(manifest, lines)
    except OSError:
        os.ftruncate(manifest.fileno(), end)
        raise
