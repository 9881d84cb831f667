"""Writing a feature folder so that a run of hours may be killed at any moment and continued.

A picture counts as finished once its line is in the manifest, and the line is written after its files have their
names. Global descriptors are rows of ``globalfeats.npy.partial``, which becomes ``globalfeats.npy`` when all pictures
are there.
"""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO

import numpy as np
from torch import Tensor

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.feature_files import GLOBAL_NAME, StoredArray, encode, patch_file_name, write_patch_array
from patchnetvlad.feature_folder import PARTIAL_NAME, open_folder
from patchnetvlad.feature_header import ManifestEntry, StoreHeader, entry_line


class FeatureWriter:
    """Writes the features of a picture list into a folder, beside the computation that makes them.

        with FeatureWriter(folder, header) as writer:
            for index in writer.missing:
                writer.write(index, global_row, patch_features)
            writer.finish()

    Opening a folder with an equal header resumes there: finished pictures are not in `missing`. Files are written
    by a background thread, in the order of `write`, at most `queue_size` pictures behind; its errors are raised by
    a following `write`, `finish` or `close`, and nothing is written after one. Leaving the block without `finish`,
    by an exception too, keeps every picture that was handed over.

    Raises UserError when the folder holds other features, or features without a manifest (overwrite=True removes
    either), when another process writes there, when the disk fails or is full, and for NaN or infinity.
    """

    def __init__(self, folder: Path, header: StoreHeader, *, overwrite: bool = False, queue_size: int = 4) -> None:
        self.folder = folder
        self.header = header
        self._queue_size = max(1, queue_size)
        with contextlib.ExitStack() as files:
            try:
                self._opened = open_folder(folder, header, overwrite, files)
            except OSError as error:
                raise UserError(f"{folder}: features cannot be written there ({error.strerror})") from error
            self._files = files.pop_all()
        self._lock = Lock()
        self._missing = set(self._opened.missing)
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
            self._files.close()

    def _wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()

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
            return [encode(tensor, self.header.dtype) for tensor in descriptors]
        except ValueError as error:
            raise self._not_finite(index) from error

    def _store(self, index: int, row: np.ndarray, patches: PatchFeatures, encoded: list[StoredArray] | None) -> None:
        """Write one picture; runs in the background thread."""
        if self._failure is not None:
            raise self._failure
        name, feature_name = self.header.names[index], self.header.feature_names[index]
        try:
            if not np.isfinite(row).all():
                raise self._not_finite(index)
            stored = self._encode(index, patches.descriptors) if encoded is None else encoded
            for patch_size, (array, _) in zip(self.header.patch_sizes, stored, strict=True):
                write_patch_array(self.folder / patch_file_name(patch_size, feature_name), array)
            assert self._opened.rows is not None  # this picture is missing, so the rows are not complete
            self._opened.rows.seek(self._opened.rows_offset + index * row.nbytes)
            _write_all(self._opened.rows, row.tobytes())
            scales = tuple(bands for _, bands in stored if bands is not None)
            entry = ManifestEntry(index, name, feature_name, _map_size(patches), scales)
            _append(self._opened.manifest, entry_line(entry))
        except UserError as error:
            self._failure = error
            raise
        except OSError as error:
            self._failure = self._disk_error(error, name)
            raise self._failure from error
        with self._lock:
            self._missing.discard(index)

    def _not_finite(self, index: int) -> UserError:
        return UserError(
            f"{self.header.names[index]}: its descriptors hold NaN or infinity (broken checkpoint, or overflow under "
            "mixed precision)"
        )

    def _disk_error(self, error: OSError, name: str) -> UserError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        total = len(self.header.names)
        advice = "free some space, or store less with feature_dtype, then " if full else ""
        return UserError(
            f"{self.folder}: writing the features of {name} failed: {error.strerror} ({total - len(self.missing)} of "
            f"{total} pictures are kept; {advice}run the same command again to continue)"
        )


def _map_size(patches: PatchFeatures) -> tuple[int, int] | None:
    return (patches.grids[0].map_height, patches.grids[0].map_width) if patches.grids else None


def _write_all(file: BinaryIO, content: bytes) -> None:
    while content:  # an unbuffered write may stop early, the next one then says why
        content = content[file.write(content) :]


def _append(manifest: BinaryIO, line: bytes) -> None:
    """Append a line, or nothing."""
    end = os.fstat(manifest.fileno()).st_size
    try:
        _write_all(manifest, line)
    except OSError:
        os.ftruncate(manifest.fileno(), end)
        raise
