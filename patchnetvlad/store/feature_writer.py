"""Writing a feature folder beside the computation, so that a run of hours may be killed at any moment and continued.

A picture counts as finished once its line is in the manifest, and the line is written after its files have their
names and are on the disk. Global descriptors are rows of ``globalfeats.npy.partial``, which becomes
``globalfeats.npy`` when all pictures are there: whoever finds that file may trust all of them.
"""

import contextlib
import errno
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO

import numpy as np
from torch import Tensor

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.files import (
    reason,
    sync_files,
    told,
)
from patchnetvlad.image_lists import ImageList
from patchnetvlad.patch_codes import PatchCodec, rows_to_code
from patchnetvlad.store.feature_files import (
    GLOBAL_NAME,
    StoredArray,
    codec_of,
)
from patchnetvlad.store.feature_folder import PARTIAL_NAME, open_folder, write_all
from patchnetvlad.store.feature_header import (
    StoreHeader,
)
from patchnetvlad.store.feature_layouts import Blocks, Finished, Layout, PictureFiles

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
    shorter list whose pictures are all in this one, in whatever order; in a packed folder they are the first of this
    list. They keep their files, and new pictures stay apart from them: `pictures` says what all are called. Files are
    written
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
            self._opened = open_folder(folder, pictures, header, trained, overwrite, files)
            self._files = files.pop_all()
        self.pictures = replace(pictures, feature_names=self._opened.feature_names)
        self._lock = Lock()
        self._missing = set(self._opened.missing)
        writes = Blocks if header.layout == "packed" else PictureFiles
        self._layout: Layout = writes(folder, pictures, header, sorted(self._missing), self._opened.short_blocks)
        self._unrecorded: list[Finished] = []
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

    def kept_row(self) -> tuple[int, np.ndarray] | None:
        """A picture that was finished before, and its global descriptor (D,); None where all or none are.

        To be asked for before the first `write`.
        """
        kept = next((index for index in range(len(self.pictures)) if index not in self._missing), None)
        rows = self._opened.rows
        if kept is None or rows is None:
            return None
        row_bytes = 4 * self.header.num_dims
        rows.seek(self._opened.rows_offset + kept * row_bytes)
        return kept, np.frombuffer(rows.read(row_bytes), np.float32)

    def write(self, index: int, global_: Tensor, patches: PatchFeatures | None = None) -> None:
        """Hand over one missing picture: its global descriptor (D,) and, unless the store is global, its patches.

        Tensors may be on any device. Patch descriptors on the CPU are taken as they are: do not change them
        afterwards. Returns at once unless the queue is full.
        """
        patches = patches or PatchFeatures((), ())
        self._check(index, global_, patches)
        encoded = None
        if any(tensor.device.type != "cpu" for tensor in patches.descriptors):
            encoded = self._encode(index, patches)  # made small before they are transferred
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

    def _encode(self, index: int, patches: PatchFeatures) -> list[StoredArray]:
        descriptors = patches.descriptors
        if self.header.coded:
            descriptors = rows_to_code(descriptors, patches.grids)
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
            stored = self._encode(index, patches) if encoded is None else encoded
            finished = self._layout.add(index, _map_size(patches), stored)
            assert self._opened.rows is not None  # this picture is missing, so the rows are not complete
            self._opened.rows.seek(self._opened.rows_offset + index * row.nbytes)
            write_all(self._opened.rows, row.tobytes())
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


def _check_list(pictures: ImageList) -> None:
    """ValueError when files could not be told apart by the names that the program gives them."""
    # A picture may be listed twice; two pictures must not share files.
    if len(set(pictures.feature_names)) != len(set(zip(pictures.names, pictures.feature_names, strict=True))):
        raise ValueError("feature_names must differ from picture to picture")
    if any("/" in name or "\\" in name or "\0" in name for name in pictures.feature_names):
        raise ValueError("feature_names must be plain file names")


def _map_size(patches: PatchFeatures) -> tuple[int, int] | None:
    return (patches.grids[0].map_height, patches.grids[0].map_width) if patches.grids else None


def _append(manifest: BinaryIO, lines: bytes) -> None:
    """Append lines, or nothing."""
    end = os.fstat(manifest.fileno()).st_size
    try:
        write_all(manifest, lines)
    except OSError:
        os.ftruncate(manifest.fileno(), end)
        raise
