"""The array files of a feature folder: their names, how descriptors are stored, checked reading, atomic writing.

Patch descriptors are D×P on disk, as scripts of the published code expect, and P×D in memory. Both are the same bytes:
a C-contiguous P×D array is written under a ``fortran_order`` header of shape (D, P), so nothing is transposed.
"""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from patchnetvlad.errors import UserError

GLOBAL_NAME = "globalfeats.npy"
PATCH_GLOB = "patchfeats_psize*_*.npy"

# Not made from the feature name, which may already fill what a file system allows.
_TEMPORARY_NAME = ".writing.npy.tmp"

# Below this the reciprocal leaves float32; next to unit rows it is zero.
_SMALLEST_SCALE = 1e-34

# Bands of consecutive dimensions with a scale of their own: WPCA orders dimensions by variance.
_BANDS = 16


class StoredArray(NamedTuple):
    """Patch descriptors as stored: a P×D array, and for int8 a factor for each band of dimensions.

    A band is ⌈D/16⌉ dimensions, the last one what is left.
    """

    array: np.ndarray
    scales: tuple[float, ...] | None


def patch_file_name(patch_size: int, feature_name: str) -> str:
    """File with the descriptors of one picture at one patch size (SPEC 10)."""
    return f"patchfeats_psize{patch_size}_{feature_name}.npy"


def encode(descriptors: Tensor, dtype: str) -> StoredArray:
    """P×D descriptors as float32, float16 or int8, on the CPU; without a copy where they already are.

    int8 keeps square roots, so that small numbers, which most are, get the finer steps: with the scale
    max|descriptors| / 127² of each band of dimensions, value = integer · |integer| · scale, rounded to the nearest
    root. Raises ValueError for NaN or infinity.
    """
    descriptors = descriptors.detach()
    if not math.isfinite(_largest_magnitude(descriptors)):
        raise ValueError("descriptors hold NaN or infinity")
    scales = None
    if dtype == "int8":
        descriptors = descriptors.to(torch.float32)
        dims = descriptors.shape[1]
        largest = descriptors.abs().amax(dim=0) if len(descriptors) else descriptors.new_zeros(dims)
        bands = torch.stack([band.max() for band in largest.split(band_width(dims))]) / 127**2
        bands = torch.where(bands < _SMALLEST_SCALE, 0.0, bands)
        scales = tuple(bands.tolist())
        roots = (descriptors * _of_dimensions(scales, descriptors).reciprocal().nan_to_num_(posinf=0.0)).abs_().sqrt_()
        descriptors = roots.copysign_(descriptors).round_().to(torch.int8)
    else:
        descriptors = descriptors.to(getattr(torch, dtype))
    return StoredArray(descriptors.contiguous().cpu().numpy(), scales)


def decode(stored: StoredArray) -> Tensor:
    """Stored descriptors as a float32 P×D tensor; float32 shares its memory with the array."""
    descriptors = torch.from_numpy(stored.array).to(torch.float32)
    if stored.scales is None:
        return descriptors
    return descriptors.mul_(descriptors.abs()).mul_(_of_dimensions(stored.scales, descriptors))


def band_width(dims: int) -> int:
    """Dimensions of one band of an int8 array."""
    return math.ceil(dims / _BANDS)


def num_bands(dims: int) -> int:
    """Bands, and so scales, of an int8 array."""
    return math.ceil(dims / band_width(dims))


def _of_dimensions(scales: tuple[float, ...], descriptors: Tensor) -> Tensor:
    """The scale of each dimension of P×D descriptors: (D,)."""
    dims = descriptors.shape[1]
    return descriptors.new_tensor(scales).repeat_interleave(band_width(dims))[:dims]


def array_file_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Length of an array file in bytes, header included."""
    return len(_header(shape, np.dtype(dtype))) + shape[0] * shape[1] * np.dtype(dtype).itemsize


def write_patch_array(path: Path, array: np.ndarray) -> None:
    """Write a C-contiguous P×D array as a D×P file: all of it or, after a crash, nothing under this name.

    There is no fsync: the file survives a killed process; a lost machine may leave it short, which reading refuses
    and resuming repairs.
    """

    def write(file: BinaryIO) -> None:
        file.write(_header((array.shape[1], array.shape[0]), array.dtype, fortran_order=True))
        file.write(array.reshape(-1).view(np.uint8).data)

    write_atomically(path, write)


def create_rows_file(path: Path, shape: tuple[int, int]) -> None:
    """Make a float32 array file of zero rows, to be filled in place."""

    def write(file: BinaryIO) -> None:
        file.write(_header(shape, np.dtype(np.float32)))
        file.truncate(array_file_bytes(shape, "float32"))

    write_atomically(path, write)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name in the same folder, then give it its own.

    Whatever goes wrong, the unfinished file is removed; only a killed process leaves it behind, for
    `remove_temporary_files`.
    """
    temporary = path.with_name(_TEMPORARY_NAME)
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporary_files(folder: Path) -> None:
    """Remove what a killed process left half written."""
    (folder / _TEMPORARY_NAME).unlink(missing_ok=True)


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
    try:
        with path.open("rb") as file:
            return _array_info(file, path)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_array(path: Path, check: Callable[[ArrayInfo], None]) -> np.ndarray:
    """Read a two-dimensional .npy file of numbers as it is stored, after `check` has accepted its header.

    The answer is native-endian float32, float16 or int8 (other floating types become float32) and writable; it is
    C- or Fortran-contiguous as the file is. Raises UserError as `read_array_info` does, and for NaN or infinity.
    """
    try:
        with path.open("rb") as file:
            info = _array_info(file, path)
            check(info)
            if len(info.shape) != 2 or (info.dtype.kind != "f" and info.dtype != np.int8):
                raise UserError(f"{path}: holds {info.dtype} of shape {info.shape}, expected a table of numbers")
            array = np.fromfile(file, info.dtype, info.shape[0] * info.shape[1])
    except OSError as error:
        raise _unreadable(path, error) from error
    if array.size != info.shape[0] * info.shape[1]:
        raise UserError(f"{path}: became shorter while it was read (another process writes into the folder)")
    if array.dtype not in (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int8)):
        array = array.astype(np.float32)
    if not math.isfinite(_largest_magnitude(torch.from_numpy(array))):
        raise UserError(f"{path}: holds NaN or infinity (made by a broken checkpoint or another program)")
    return array.reshape(info.shape[::-1]).T if info.fortran_order else array.reshape(info.shape)


def _largest_magnitude(numbers: Tensor) -> float:
    """Largest absolute value, 0 of nothing, and NaN where there is one: a single pass without a copy."""
    if numbers.numel() == 0:
        return 0.0
    smallest, largest = (float(value) for value in torch.aminmax(numbers))
    return smallest if math.isnan(smallest) else max(-smallest, largest)


def _header(shape: tuple[int, int], dtype: np.dtype, fortran_order: bool = False) -> bytes:
    header = io.BytesIO()
    descr = npy_format.dtype_to_descr(dtype)
    npy_format.write_array_header_1_0(header, {"descr": descr, "fortran_order": fortran_order, "shape": shape})
    return header.getvalue()


def _array_info(file: BinaryIO, path: Path) -> ArrayInfo:
    try:
        version = npy_format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_2_0(file)
        else:
            raise ValueError(version)
    except ValueError as error:
        raise UserError(f"{path}: is not a whole .npy file (interrupted copy, full disk, other file)") from error
    if dtype.hasobject:
        raise UserError(f"{path}: holds Python objects, which are not read (made by another program)")
    info = ArrayInfo(shape, fortran_order, dtype, file.tell())
    wanted = info.offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    found = file.seek(0, io.SEEK_END)
    if found != wanted:
        raise UserError(f"{path}: has {found} bytes, its header says {wanted} (interrupted copy or full disk)")
    file.seek(info.offset)
    return info


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: is missing (extraction not finished, or the file was removed)")
    return UserError(f"{path}: cannot be read ({error.strerror or error})")
