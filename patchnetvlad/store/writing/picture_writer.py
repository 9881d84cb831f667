"""Writing the patch files of pictures beside the computation that makes them, for whoever keeps the manifest."""

import contextlib
import errno
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.files import reason, sync_files
from patchnetvlad.image_lists import ImageList
from patchnetvlad.store.arrays.blocks import Block
from patchnetvlad.store.arrays.codecs import LearnedCodec, StoredArray, Trained, codec_of
from patchnetvlad.store.manifest import StoreHeader
from patchnetvlad.store.writing.layouts import Blocks, Finished, Layout, PictureFiles

# Pictures are put on the disk together, in a fraction of the time that each alone would take. A killed process loses
# no more than these, or those of so many seconds.
_TOGETHER = 64
_SECONDS = 2.0


@dataclass(frozen=True, eq=False)
class Written:
    """Pictures whose patch files are on the disk: all that the folder has still to be told of them.

    pictures: their indices in the list, ascending; rows: n×D float32, their global descriptors; line: the manifest's;
    map_size: (height, width) of the first one's feature map, None in a purely global store.
    """

    pictures: Sequence[int]
    rows: NDArray[np.float32]
    line: bytes
    map_size: tuple[int, int] | None


class PictureWriter:
    """Writes patch files of some pictures of a list into a folder, which is ready for them, in a background thread.

    Pictures are encoded and written in the order of `write`, at most `queue_size` behind it. Errors are raised by a
    following `write`, `wait` or `close`, and nothing is written after one.
    """

    def __init__(
        self,
        folder: Path,
        pictures: ImageList,
        header: StoreHeader,
        trained: Trained | None,
        wanted: Sequence[int],
        record: Callable[[Sequence[Written]], None],
        kept: Callable[[], str],
        short: Sequence[Block] = (),
        queue_size: int = 4,
    ) -> None:
        """wanted: the pictures that will be written, ascending; trained: the quantiser of a header with codes; short:
        blocks of a packed folder that lack some of the pictures at their end.

        record: called in the background thread with pictures that are on the disk; kept: says for an error how many
        pictures the folder keeps.
        """
        self.folder = folder
        self.header = header
        self._codec = codec_of(header.dtype, trained)
        self._names = pictures.names
        self._record_written, self._kept = record, kept
        self._queue_size = max(1, queue_size)
        self._wanted = set(wanted)
        writes = Blocks if header.layout == "packed" else PictureFiles
        self._layout: Layout = writes(folder, pictures, header, sorted(self._wanted), short)
        self._made: dict[int, tuple[NDArray[np.float32], tuple[int, int] | None]] = {}  # rows of unfinished pictures
        self._unrecorded: list[Finished] = []
        self._recorded_at = time.monotonic()
        self._failure: UserError | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="picture-writer")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(UserError):  # the first error is the one to tell
                self.close()

    def write(self, index: int, global_: Tensor, patches: PatchFeatures | None = None) -> None:
        """Hand over one picture: its global descriptor (D,) and, unless the store is global, its patches.

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

    def wait(self) -> None:
        """Let the background thread do what it was given, and record it; raises its error."""
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.submit(self._record).result()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait for the background thread and drop what is not finished; a with block calls it."""
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            try:
                self._pool.submit(self._record).result()
            finally:
                self._pool.shutdown(wait=True)
                self._layout.close()

    def _check(self, index: int, global_: Tensor, patches: PatchFeatures) -> None:
        """ValueError when what the program hands over does not fit the header."""
        header = self.header
        if index not in self._wanted:
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
        try:
            if isinstance(self._codec, LearnedCodec):
                return self._codec.encode_picture(patches.descriptors, patches.grids, patches.local)
            return [self._codec.encode(tensor) for tensor in patches.descriptors]
        except ValueError as error:
            raise self._not_finite(index) from error

    def _store(self, index: int, row: np.ndarray, patches: PatchFeatures, encoded: list[StoredArray] | None) -> None:
        """Write one picture; runs in the background thread."""
        if self._failure is not None:
            raise self._failure
        map_size = _map_size(patches)
        try:
            if not np.isfinite(row).all():
                raise self._not_finite(index)
            stored = self._encode(index, patches) if encoded is None else encoded
            self._made[index] = row, map_size
            finished = self._layout.add(index, map_size, stored)
        except (UserError, OSError) as error:
            with contextlib.suppress(UserError):
                self._record()
            self._failure = self._told(error, index)
            raise self._failure from error
        self._unrecorded += finished
        if len(self._unrecorded) >= _TOGETHER or time.monotonic() - self._recorded_at >= _SECONDS:
            self._record()

    def _record(self) -> None:
        """Put the pictures that are written on the disk, then say so; in the background thread."""
        done, self._unrecorded = self._unrecorded, []
        self._recorded_at = time.monotonic()
        if not done:
            return
        try:
            sync_files(path for finished in done for path in finished.paths)
            self._record_written([self._written(finished) for finished in done])
        except (UserError, OSError) as error:
            self._failure = self._failure or self._told(error, done[0].pictures[0])
            raise self._failure from error
        for finished in done:
            self._wanted.difference_update(finished.pictures)

    def _written(self, finished: Finished) -> Written:
        made = [self._made.pop(index) for index in finished.pictures]
        return Written(finished.pictures, np.stack([row for row, _ in made]), finished.line, made[0][1])

    def _not_finite(self, index: int) -> UserError:
        return UserError(
            f"{self._names[index]}: its descriptors hold NaN or infinity (broken checkpoint, or overflow under "
            "mixed precision)"
        )

    def _told(self, error: UserError | OSError, index: int) -> UserError:
        cause = error.__cause__ if isinstance(error, UserError) else error
        if isinstance(cause, OSError):
            return disk_error(self.folder, self._names[index], cause, self._kept())
        return UserError(str(error))


def disk_error(folder: Path, name: str, error: OSError, kept: str) -> UserError:
    """What is said when writing the features of a picture, or a file of that name, fails; kept: what stays."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "or store less with feature_dtype, then " if full else ""
    return UserError(
        f"{folder}: writing the features of {name} failed: {reason(error)} ({kept}; {advice}run the same command "
        "again to continue)"
    )


def _map_size(patches: PatchFeatures) -> tuple[int, int] | None:
    return (patches.grids[0].map_height, patches.grids[0].map_width) if patches.grids else None
