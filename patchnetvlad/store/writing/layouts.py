"""Where the patch descriptors of pictures go as they are written: files of their own, or blocks."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from patchnetvlad.image_lists import ImageList
from patchnetvlad.store.arrays.array_files import patch_file_name, write_patch_array
from patchnetvlad.store.arrays.blocks import (
    PICTURES_IN_BLOCK,
    Block,
    BlockWriter,
)
from patchnetvlad.store.arrays.codecs import StoredArray
from patchnetvlad.store.manifest import (
    ManifestEntry,
    StoreHeader,
    block_line,
    entry_line,
)


@dataclass(frozen=True)
class Finished:
    """Pictures whose files have their names: line: the manifest's."""

    pictures: Sequence[int]
    paths: list[Path]
    line: bytes


class Layout(Protocol):
    """Where the patch descriptors of pictures go; used by the background thread alone."""

    def __init__(
        self, folder: Path, pictures: ImageList, header: StoreHeader, missing: Sequence[int], short: Sequence[Block]
    ) -> None:
        """missing: the pictures still to be written, ascending; short: blocks that lack some of these at their end."""
        ...

    def add(self, index: int, map_size: tuple[int, int] | None, stored: Sequence[StoredArray]) -> list[Finished]:
        """Write a missing picture; returns what is finished by it."""
        ...

    def close(self) -> None:
        """Drop what is not finished."""
        ...


class PictureFiles:
    """Files of its own for each picture, as the published code has them."""

    def __init__(
        self, folder: Path, pictures: ImageList, header: StoreHeader, missing: Sequence[int], short: Sequence[Block]
    ) -> None:
        self._folder, self._pictures, self._header = folder, pictures, header

    def add(self, index: int, map_size: tuple[int, int] | None, stored: Sequence[StoredArray]) -> list[Finished]:
        """Write the picture's files."""
        feature_name = self._pictures.feature_names[index]
        grids = self._header.stored_grids(map_size) if map_size is not None else ()
        paths = [self._folder / patch_file_name(grid.patch_size, feature_name) for grid in grids]
        for path, (array, _) in zip(paths, stored, strict=True):
            write_patch_array(path, array)
        scales = tuple(bands for _, bands in stored if bands is not None)
        entry = ManifestEntry(index, self._pictures.names[index], feature_name, map_size, scales)
        return [Finished([index], paths, entry_line(entry))]

    def close(self) -> None:
        """Nothing is left unfinished."""


class Blocks:
    """Blocks of pictures; one that comes before its turn waits in memory."""

    def __init__(
        self, folder: Path, pictures: ImageList, header: StoreHeader, missing: Sequence[int], short: Sequence[Block]
    ) -> None:
        self._folder, self._layout = folder, header.block_layout(len(pictures))
        self._turns = deque(missing)  # whole blocks, and what completes a short one
        self._short = {block.number: block for block in short}
        self._waiting: dict[int, tuple[tuple[int, int], Sequence[StoredArray]]] = {}
        self._block: BlockWriter | None = None
        self._added: list[int] = []  # pictures of the block that were not in a short one

    def add(self, index: int, map_size: tuple[int, int] | None, stored: Sequence[StoredArray]) -> list[Finished]:
        """Add the picture to its block, and those that waited for it."""
        self._waiting[index] = (map_size or (0, 0), stored)
        finished = []
        while self._turns and self._turns[0] in self._waiting:
            turn = self._turns.popleft()
            size, arrays = self._waiting.pop(turn)
            if self._block is None:
                number = turn // PICTURES_IN_BLOCK
                self._block = BlockWriter(self._folder, self._layout, number, self._short.get(number))
            scales = np.array([scale for _, scales in arrays for scale in scales or ()], dtype=np.float32)
            self._block.add(size, [array for array, _ in arrays], scales)
            self._added.append(turn)
            if self._block.complete:
                block = self._block.finish()
                line = block_line(block)
                finished.append(Finished(self._added, self._block.paths, line))
                self._block, self._added = None, []
        return finished

    def close(self) -> None:
        """Drop the block that is not complete."""
        if self._block is not None:
            self._block.close()
