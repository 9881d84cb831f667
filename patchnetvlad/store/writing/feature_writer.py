"""Writing a feature folder beside the computation, so that a run of hours may be killed at any moment and continued.

A picture counts as finished once its line is in the manifest, and the line is written after its files have their
names and are on the disk. Global descriptors are rows of ``globalfeats.npy.partial``, which becomes
``globalfeats.npy`` when all pictures are there: whoever finds that file may trust all of them.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO

import numpy as np
from torch import Tensor

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import counted
from patchnetvlad.files import told, writing
from patchnetvlad.image_lists import ImageList
from patchnetvlad.store.arrays.array_files import GLOBAL_NAME
from patchnetvlad.store.arrays.blocks import Block
from patchnetvlad.store.arrays.codecs import Trained, codec_of
from patchnetvlad.store.manifest import MANIFEST_NAME, StoreHeader, in_list_order
from patchnetvlad.store.writing.feature_folder import PARTIAL_NAME, open_folder, write_all
from patchnetvlad.store.writing.picture_writer import PictureWriter, Written, disk_error


class FeatureWriter:
    """Writes the features of a picture list into a folder, beside the computation that makes them.

        with FeatureWriter(folder, pictures, header) as writer:
            for index in writer.missing:
                writer.write(index, global_row, patch_features)
            writer.finish()

    Opening a folder with an equal header resumes there: finished pictures are not in `missing`, also those of a
    shorter list whose pictures are all in this one, in whatever order; in a packed folder they are the first of this
    list. They keep their files, and new pictures stay apart from them: `pictures` says what all are called. Files are
    written by a background thread, in the order of `write`, at most `queue_size` pictures behind; its errors are
    raised by a following `write`, `finish` or `close`, and nothing is written after one. Leaving the block without
    `finish`, by an exception too, keeps every picture that was handed over. Pictures whose patch files others write
    come by `record`, in any order.

    Raises UserError when the folder holds other features, or features without a manifest (overwrite=True removes
    either), when another process writes there, when the disk fails or is full, and for NaN or infinity.
    """

    def __init__(
        self,
        folder: Path,
        pictures: ImageList,
        header: StoreHeader,
        *,
        trained: Trained | None = None,
        overwrite: bool = False,
        queue_size: int = 4,
    ) -> None:
        """trained: the quantiser of a header with codes, which is kept in the folder."""
        if header.layout == "files":
            _check_list(pictures)
        codec_of(header.dtype, trained)
        if header.codec_sha256 != (trained.sha256 if trained else ""):
            raise ValueError("the quantiser is not that of the header")
        if header.checkpoint_sha256 is None or header.num_dims < 1:
            raise ValueError("the header says not what makes the features")
        self.folder = folder
        self.header = header
        self.trained = trained
        with ExitStack() as files, told(folder, "features cannot be written there"):
            self._opened = open_folder(folder, pictures, header, trained, overwrite, files)
            self._files = files.pop_all()
        self.pictures = replace(pictures, feature_names=self._opened.feature_names)
        self._lock = Lock()
        self._missing = set(self._opened.missing)
        # Whether the manifest's lines are in the order of the list, and the last picture that they name
        self._last = -1 if self._opened.last is None else self._opened.last
        self._in_order = self._opened.last is not None or self._opened.rows is None
        self._writer = PictureWriter(
            folder, self.pictures, header, trained, self.missing, self.record, self._kept, self.short_blocks, queue_size
        )

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._files:
            self._writer.__exit__(kind, error, trace)

    @property
    def missing(self) -> list[int]:
        """Indices of the pictures without finished features, ascending; those in the queue are still among them."""
        with self._lock:
            return sorted(self._missing)

    @property
    def short_blocks(self) -> Sequence[Block]:
        """Blocks of a packed folder that lack some of the missing pictures at their end."""
        return self._opened.short_blocks

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
        """Hand over one missing picture, as `PictureWriter.write` takes it."""
        self._writer.write(index, global_, patches)

    def record(self, written: Sequence[Written]) -> None:
        """Enter missing pictures whose patch files are on the disk; raises UserError when the disk fails."""
        rows, manifest = self._opened.rows, self._opened.manifest
        assert rows is not None  # these pictures are missing, so the rows are not complete
        try:
            for batch in written:
                for index, row in zip(batch.pictures, batch.rows, strict=True):
                    rows.seek(self._opened.rows_offset + index * row.nbytes)
                    write_all(rows, row.tobytes())
            os.fsync(rows.fileno())
            _append(manifest, b"".join(batch.line for batch in written))
            os.fsync(manifest.fileno())
        except OSError as error:
            name = self.pictures.names[written[0].pictures[0]]
            raise disk_error(self.folder, name, error, self._kept()) from error
        for batch in written:
            self._in_order = self._in_order and batch.pictures[0] > self._last
            self._last = max(self._last, batch.pictures[-1])
            with self._lock:
                self._missing.difference_update(batch.pictures)

    def finish(self) -> None:
        """Wait for the background thread, bring the manifest into the order of the list, and give the complete global
        descriptors their name.

        Raises ValueError when pictures are missing.
        """
        self._writer.wait()
        if self._missing:
            raise ValueError(f"{len(self._missing)} pictures were not written, the first is {min(self._missing)}")
        if not self._in_order:
            self._opened.manifest.close()
            path = self.folder / MANIFEST_NAME
            with told(path), writing(path) as file:
                file.write(in_list_order(path.read_bytes()))
            self._in_order = True
        partial = self.folder / PARTIAL_NAME
        if self._opened.rows is None or not partial.exists():
            return
        try:
            os.fsync(self._opened.rows.fileno())
            self._opened.rows.close()
            partial.replace(self.folder / GLOBAL_NAME)
        except OSError as error:
            raise disk_error(self.folder, GLOBAL_NAME, error, self._kept()) from error

    def close(self) -> None:
        """Wait for the background thread and release the folder; a with block calls it."""
        with self._files:
            self._writer.close()

    def _kept(self) -> str:
        total = len(self.pictures)
        return f"{total - len(self.missing)} of {counted(total, 'picture')} kept"


def _check_list(pictures: ImageList) -> None:
    """ValueError when files could not be told apart by the names that the program gives them."""
    # A picture may be listed twice; two pictures must not share files.
    if len(set(pictures.feature_names)) != len(set(zip(pictures.names, pictures.feature_names, strict=True))):
        raise ValueError("feature_names must differ from picture to picture")
    if any("/" in name or "\\" in name or "\0" in name for name in pictures.feature_names):
        raise ValueError("feature_names must be plain file names")


def _append(manifest: BinaryIO, lines: bytes) -> None:
    """Append lines, or nothing."""
    end = os.fstat(manifest.fileno()).st_size
    try:
        write_all(manifest, lines)
    except OSError:
        os.ftruncate(manifest.fileno(), end)
        raise
