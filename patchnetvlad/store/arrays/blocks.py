"""Blocks of a packed feature folder: the patch descriptors of consecutive pictures in one array file.

A block file is a table of rows as they are stored, C-contiguous. Its pictures follow one another, and of each picture
all patch sizes, so that what one candidate needs lies together and is read in one go. Codecs with scales have a second
file, float32, a row for each picture. Both have their names only when they are whole.

A folder whose list grows at its end keeps its last block as a short one until the pictures are there that complete it.
The longer block begins with the same rows, so that its file may take the place of the short one's at any moment.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType

import numpy as np

from patchnetvlad.errors import UserError
from patchnetvlad.files import told, writing
from patchnetvlad.store.arrays.array_files import array_header

PICTURES_IN_BLOCK = 256
BLOCK_GLOB = "patchblock_*.npy"

HEADER_BYTES = 128  # of every block file, whose header is written when the number of its rows is known


@dataclass(frozen=True)
class Block:
    """A finished block, as the manifest has it.

    number: it begins with picture number · PICTURES_IN_BLOCK; maps: (height, width, pictures) of the feature maps,
    one element for each run of pictures of equal maps.
    """

    number: int
    maps: tuple[tuple[int, int, int], ...]

    @property
    def num_pictures(self) -> int:
        """Pictures in the block."""
        return sum(count for _, _, count in self.maps)

    @property
    def pictures(self) -> range:
        """The pictures that it holds."""
        first = self.number * PICTURES_IN_BLOCK
        return range(first, first + self.num_pictures)

    @property
    def map_sizes(self) -> list[tuple[int, int]]:
        """Feature map (height, width) of each picture."""
        return [(height, width) for height, width, count in self.maps for _ in range(count)]

    @classmethod
    def of(cls, number: int, map_sizes: Iterable[tuple[int, int]]) -> "Block":
        """The entry of a block whose pictures have these feature maps (height, width), in order."""
        runs = ((size, sum(1 for _ in same)) for size, same in groupby(map_sizes))
        return cls(number, tuple((height, width, count) for (height, width), count in runs))


@dataclass(frozen=True)
class BlockLayout:
    """What all blocks of a folder share.

    num_pictures: of the folder; width and dtype: numbers of a stored row, and their type; patch_counts: feature map
    (height, width) → patches at each stored patch size; num_scales: float32 numbers of a picture, 0 for codecs without.
    """

    num_pictures: int
    width: int
    dtype: np.dtype
    patch_counts: Callable[[tuple[int, int]], tuple[int, ...]]
    num_scales: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of a complete folder."""
        return math.ceil(self.num_pictures / PICTURES_IN_BLOCK)

    def pictures(self, number: int) -> range:
        """Pictures of a block."""
        return range(number * PICTURES_IN_BLOCK, min(self.num_pictures, (number + 1) * PICTURES_IN_BLOCK))

    def is_short(self, block: Block) -> bool:
        """Whether pictures of the block are still to come."""
        return block.num_pictures < len(self.pictures(block.number))

    def num_rows(self, block: Block) -> int:
        """Rows of a block."""
        return sum(count * sum(self.patch_counts((height, width))) for height, width, count in block.maps)


def block_name(number: int) -> str:
    """File with the stored rows of a block."""
    return f"patchblock_{number:07}.npy"


def scales_name(number: int) -> str:
    """File with the scales of a block's pictures."""
    return f"patchblock_{number:07}_scales.npy"


def file_sizes(folder: Path) -> dict[str, int]:
    """Lengths in bytes of the files of a folder."""
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}


def damaged_file(layout: BlockLayout, block: Block, there: Mapping[str, int]) -> tuple[str, str] | None:
    """A file of a finished block that is not what it should be, and what is wrong with it; None when all are.

    there: lengths of the folder's files. Those of a short block may be longer.
    """
    rows = layout.num_rows(block)
    wanted = {block_name(block.number): HEADER_BYTES + rows * layout.width * layout.dtype.itemsize}
    if layout.num_scales:
        wanted[scales_name(block.number)] = HEADER_BYTES + block.num_pictures * layout.num_scales * 4
    for name, num_bytes in wanted.items():
        longer = layout.is_short(block) and there.get(name, 0) > num_bytes
        if there.get(name) != num_bytes and not longer:
            return name, "is missing" if name not in there else f"has {there[name]} bytes, expected {num_bytes}"
    return None


class _Dropped(Exception):
    """A block is not to be finished."""


class BlockWriter:
    """Writes one block, picture after picture, without holding it in memory."""

    def __init__(self, folder: Path, layout: BlockLayout, number: int, short: Block | None = None) -> None:
        """short: the block as it is in the folder, which is to be completed."""
        self._folder, self._layout, self._number = folder, layout, number
        self._rows = 0
        self._scales: list[np.ndarray] = []
        self._map_sizes: list[tuple[int, int]] = []
        self._whole = ExitStack()  # ends well, with a name for the file, or with an error, without
        self._file = self._whole.enter_context(writing(folder / block_name(number), durable=False))
        self._file.write(bytes(HEADER_BYTES))
        if short is not None:
            self._copy(short)

    def _copy(self, short: Block) -> None:
        """Begin with the pictures of a short block."""
        self._rows, self._map_sizes = self._layout.num_rows(short), short.map_sizes
        rows = _read(
            self._folder / block_name(short.number), self._layout.dtype, self._rows * self._layout.width, HEADER_BYTES
        )
        self._file.write(rows.view(np.uint8).data)
        count = self._layout.num_scales
        if count:
            path = self._folder / scales_name(short.number)
            table = _read(path, np.dtype(np.float32), count * short.num_pictures, HEADER_BYTES)
            self._scales = list(table.reshape(-1, count))

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was not finished."""
        self._whole.__exit__(_Dropped, _Dropped(), None)

    @property
    def next_picture(self) -> int:
        """The picture that `add` expects."""
        return self._number * PICTURES_IN_BLOCK + len(self._map_sizes)

    @property
    def complete(self) -> bool:
        """Whether all pictures of the block are there."""
        return len(self._map_sizes) == len(self._layout.pictures(self._number))

    def add(self, map_size: tuple[int, int], arrays: Sequence[np.ndarray], scales: np.ndarray | None = None) -> None:
        """Append the next picture: a P×W array for each patch size, and its scales."""
        for array in arrays:
            if array.dtype != self._layout.dtype or array.ndim != 2 or array.shape[1] != self._layout.width:
                raise ValueError(f"rows are {array.dtype} {array.shape}, expected {self._layout}")
            if len(array):
                self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._rows += len(array)
        if self._layout.num_scales:
            self._scales.append(np.asarray(scales, dtype=np.float32).reshape(self._layout.num_scales))
        self._map_sizes.append(map_size)

    @property
    def paths(self) -> list[Path]:
        """The files of the block."""
        names = [block_name(self._number)] + ([scales_name(self._number)] if self._layout.num_scales else [])
        return [self._folder / name for name in names]

    def finish(self) -> Block:
        """Give the complete block its name; returns its entry, which the manifest has still to be given.

        The files are not made to outlive the loss of the machine: the writer of the manifest sees to that.
        """
        if not self.complete:
            raise ValueError(f"block {self._number} lacks picture {self.next_picture}")
        if self._layout.num_scales:
            table = np.stack(self._scales)
            with writing(self._folder / scales_name(self._number), durable=False) as file:
                file.write(array_header(table.shape, table.dtype) + table.tobytes())
        self._file.seek(0)
        self._file.write(array_header((self._rows, self._layout.width), self._layout.dtype))
        self._whole.close()
        return Block.of(self._number, self._map_sizes)


class BlockReader:
    """Stored rows of single pictures out of the blocks of a complete folder."""

    def __init__(self, folder: Path, layout: BlockLayout, blocks: Iterable[Block]) -> None:
        """Raises UserError when a block is missing or not as long as its entry says."""
        self._folder, self._layout = folder, layout
        self._counts = layout.patch_counts
        self._blocks = {block.number: block for block in blocks}
        there = file_sizes(folder)
        for number in range(layout.num_blocks):
            if number not in self._blocks or layout.is_short(self._blocks[number]):
                raise UserError(
                    f"{folder}: extraction is not finished, block {number + 1} of {layout.num_blocks} is not there "
                    "(run feature_extract again with the same arguments to continue)"
                )
            damage = damaged_file(layout, self._blocks[number], there)
            if damage is not None:
                raise UserError(f"{folder / damage[0]}: {damage[1]} (interrupted copy or full disk; extract again)")

    @property
    def _row_bytes(self) -> int:
        return self._layout.width * self._layout.dtype.itemsize

    def map_size(self, index: int) -> tuple[int, int]:
        """Feature map (height, width) of a picture."""
        return self._place(index)[0]

    def num_bytes(self, index: int) -> int:
        """Of a picture's stored rows."""
        return sum(self._counts(self.map_size(index))) * self._row_bytes

    def read(self, index: int) -> tuple[np.ndarray, ...]:
        """Stored rows of a picture, P×W for each patch size, by a single read.

        Raises UserError when the file cannot be read or has become shorter.
        """
        map_size, first = self._place(index)
        counts = self._counts(map_size)
        path = self._folder / block_name(index // PICTURES_IN_BLOCK)
        numbers = sum(counts) * self._layout.width
        rows = _read(path, self._layout.dtype, numbers, HEADER_BYTES + first * self._row_bytes)
        return tuple(np.split(rows.reshape(-1, self._layout.width), np.cumsum(counts)[:-1]))

    def scales(self, index: int) -> np.ndarray | None:
        """Scales of a picture, float32, None for codecs without."""
        count = self._layout.num_scales
        if not count:
            return None
        number, place = divmod(index, PICTURES_IN_BLOCK)
        return _read(self._folder / scales_name(number), np.dtype(np.float32), count, HEADER_BYTES + 4 * count * place)

    def _place(self, index: int) -> tuple[tuple[int, int], int]:
        """Feature map of a picture, and the first of its rows in its block."""
        number, left = divmod(index, PICTURES_IN_BLOCK)
        first = 0
        for height, width, count in self._blocks[number].maps:
            rows = sum(self._counts((height, width)))
            if left < count:
                return (height, width), first + left * rows
            first, left = first + count * rows, left - count
        raise IndexError(index)


def _read(path: Path, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    with told(path, "cannot be read"), path.open("rb", buffering=0) as file:
        numbers = np.fromfile(file, dtype, count, offset=offset)
    if len(numbers) != count:
        raise UserError(f"{path}: became shorter while it was read (another process writes into the folder)")
    return numbers
