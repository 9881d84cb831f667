"""The array files of a feature folder: their names, writing and checked reading.

Patch descriptors are D×P on disk, as scripts of the published code expect, and P×D in memory. Both are the same bytes:
a C-contiguous P×D array is written under a ``fortran_order`` header of shape (D, P), so nothing is transposed.
"""

import io
import math
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from patchnetvlad.errors import UserError
from patchnetvlad.files import told, writing

GLOBAL_NAME = "globalfeats.npy"
PATCH_GLOB = "patchfeats_psize*_*.npy"

_ABSENT = "extraction not finished, or the file was removed"


def patch_file_name(patch_size: int, feature_name: str) -> str:
    """File with the descriptors of one picture at one patch size, as the published code names it."""
    return f"patchfeats_psize{patch_size}_{feature_name}.npy"


def array_file_bytes(shape: tuple[int, int], dtype: np.dtype) -> int:
    """Length of an array file in bytes, header included."""
    return len(array_header(shape, dtype)) + shape[0] * shape[1] * dtype.itemsize


def array_header(shape: tuple[int, ...], dtype: np.dtype, fortran_order: bool = False) -> bytes:
    """Header of a .npy file, version 1.0; as long for any number of rows of the same width."""
    header = io.BytesIO()
    descr = npy_format.dtype_to_descr(dtype)
    npy_format.write_array_header_1_0(header, {"descr": descr, "fortran_order": fortran_order, "shape": shape})
    return header.getvalue()


def write_patch_array(path: Path, array: np.ndarray) -> None:
    """Write a C-contiguous P×W array as a W×P file: all of it or, after a crash, nothing under this name.

    It is not made to outlive the loss of the machine: the writer sees to that for many files at once.
    """
    with writing(path, durable=False) as file:
        file.write(array_header((array.shape[1], array.shape[0]), array.dtype, fortran_order=True))
        file.write(array.reshape(-1).view(np.uint8).data)


def create_rows_file(path: Path, shape: tuple[int, int]) -> None:
    """Make a float32 array file of zero rows, to be filled in place."""
    with writing(path) as file:
        file.write(array_header(shape, np.dtype(np.float32)))
        file.truncate(array_file_bytes(shape, np.dtype(np.float32)))


class ArrayInfo(NamedTuple):
    """What the header of an array file says; offset: where the data begin, in bytes."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int


def read_array_info(path: Path) -> ArrayInfo:
    """Header of a .npy file, whose length is checked against it.

    Raises UserError when the file is missing, is no .npy file, or is not as long as its header says.
    """
    with told(path, "cannot be read", _ABSENT), path.open("rb") as file:
        return _array_info(file, path)


def read_array(path: Path, check: Callable[[ArrayInfo], None]) -> np.ndarray:
    """Read a two-dimensional .npy file of numbers as it is stored, after `check` has accepted its header.

    The answer is native-endian and writable, integers and float16 as they are, other floating types as float32; it
    is C- or Fortran-contiguous as the file is. Raises UserError as `read_array_info` does, and for NaN or infinity.
    """
    with told(path, "cannot be read", _ABSENT), path.open("rb") as file:
        info = _array_info(file, path)
        check(info)
        if len(info.shape) != 2 or info.dtype.kind not in "fiu":
            raise UserError(f"{path}: holds {info.dtype} of shape {info.shape}, expected a table of numbers")
        array = np.fromfile(file, info.dtype, info.shape[0] * info.shape[1])
    if array.size != info.shape[0] * info.shape[1]:
        raise UserError(f"{path}: became shorter while it was read (another process writes into the folder)")
    if array.dtype.kind == "f" and array.dtype not in (np.dtype(np.float32), np.dtype(np.float16)):
        array = array.astype(np.float32)
    if array.dtype.kind == "f" and not math.isfinite(largest_magnitude(torch.from_numpy(array))):
        raise UserError(f"{path}: holds NaN or infinity (made by a broken checkpoint or another program)")
    return array.reshape(info.shape[::-1]).T if info.fortran_order else array.reshape(info.shape)


def map_rows(path: Path, shape: tuple[int, int], cause: str) -> np.ndarray:
    """A table of float32 rows that stays on disk, N×D.

    cause: what may have put another table in its place, for the error. Raises UserError as `read_array_info` does,
    and for another table.
    """
    info = read_array_info(path)
    if info.shape != shape or info.dtype != np.float32 or info.fortran_order:
        raise UserError(
            f"{path}: holds {info.dtype} of shape {info.shape}, expected {shape[0]}×{shape[1]} float32 ({cause})"
        )
    return np.memmap(path, np.float32, "r", info.offset, shape)


def largest_magnitude(numbers: Tensor) -> float:
    """Largest absolute value, 0 of nothing, and NaN where there is one: a single pass without a copy."""
    if numbers.numel() == 0:
        return 0.0
    smallest, largest = (float(value) for value in torch.aminmax(numbers))
    return smallest if math.isnan(smallest) else max(-smallest, largest)


def _array_info(file: BinaryIO, path: Path) -> ArrayInfo:
    try:
        version = npy_format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_2_0(file)
        else:
            raise ValueError(version)
        if any(length < 0 for length in shape):
            raise ValueError(shape)
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise UserError(f"{path}: is not a whole .npy file (interrupted copy, full disk, other file)") from error
    if dtype.hasobject:
        raise UserError(f"{path}: holds Python objects, which are not read (made by another program)")
    info = ArrayInfo(shape, fortran_order, dtype, file.tell())
    wanted = info.offset + math.prod(shape) * dtype.itemsize
    size = file.seek(0, io.SEEK_END)
    if size != wanted:
        raise UserError(f"{path}: has {size} bytes, its header says {wanted} (interrupted copy or full disk)")
    file.seek(info.offset)
    return info
