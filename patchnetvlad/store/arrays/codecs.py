"""How patch descriptors are stored: as numbers, as 8-bit square roots, or as codes of a quantiser beside them."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from patchnetvlad.config_values import code_form
from patchnetvlad.errors import UserError
from patchnetvlad.files import told, writing
from patchnetvlad.patch_codes import PatchCodec
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.store.arrays.array_files import largest_magnitude
from patchnetvlad.store.arrays.map_codes import MapCodec, PatchHead

CODEC_NAME = "patchcodec.npz"

_DAMAGED_CODEC = "interrupted copy, or files of two folders mixed; bring back its own, or extract again"

# Below this the reciprocal leaves float32; next to unit rows it is zero.
_SMALLEST_SCALE = 1e-34

_BANDS = 16  # of dimensions, with a scale each

CPU = torch.device("cpu")


class StoredArray(NamedTuple):
    """Patch descriptors as stored: an array of a row for each patch, and the codec's scales if it has any."""

    array: np.ndarray
    scales: tuple[float, ...] | None


class Codec(Protocol):
    """How patch descriptors are stored: P×D float32, unit rows, to arrays on disk and back.

    A new one is a class and a line in CODECS, unless it is learned. dtype: of the stored array.
    """

    dtype: np.dtype

    def width(self, dims: int) -> int:
        """Numbers that the array holds of a patch of D = dims."""
        ...

    def num_scales(self, dims: int) -> int:
        """Numbers that the manifest holds of a picture's patch size."""
        ...

    def encode(self, descriptors: Tensor) -> StoredArray:
        """P×D descriptors as stored, on the CPU. Raises ValueError for NaN or infinity."""
        ...

    def decode(self, stored: StoredArray, device: torch.device = CPU) -> Tensor:
        """Stored descriptors as a float32 P×D tensor on a device, where they travel as they are stored if they can."""
        ...


class FloatCodec:
    """Descriptors as they are, in some floating type; float32 is never copied."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.dtype = torch.empty(0, dtype=dtype).numpy().dtype

    def width(self, dims: int) -> int:
        """All dimensions."""
        return dims

    def num_scales(self, dims: int) -> int:
        """None."""
        return 0

    def encode(self, descriptors: Tensor) -> StoredArray:
        """The same in this type, on the CPU; without a copy where they already are."""
        return StoredArray(_finite(descriptors).to(self._dtype).contiguous().cpu().numpy(), None)

    def decode(self, stored: StoredArray, device: torch.device = CPU) -> Tensor:
        """As float32, which shares its memory with the array on the CPU."""
        return _sent(stored.array, device).to(torch.float32)


class SquareRootCodec:
    """int8 square roots, so that small numbers, which most are, get the finer steps.

    With the scale max|descriptors| / 127² of each band of ⌈D/16⌉ consecutive dimensions, value = integer · |integer| ·
    scale, rounded to the nearest root. WPCA orders dimensions by variance, so that those of a band are alike.
    """

    dtype = np.dtype(np.int8)

    def width(self, dims: int) -> int:
        """All dimensions."""
        return dims

    def num_scales(self, dims: int) -> int:
        """One for each band."""
        return math.ceil(dims / self._band_width(dims))

    def encode(self, descriptors: Tensor) -> StoredArray:
        """Integers −127 to 127, and the scales."""
        descriptors = _finite(descriptors).to(torch.float32)
        dims = descriptors.shape[1]
        largest = descriptors.abs().amax(dim=0) if len(descriptors) else descriptors.new_zeros(dims)
        bands = torch.stack([band.max() for band in largest.split(self._band_width(dims))]) / 127**2
        bands = torch.where(bands < _SMALLEST_SCALE, 0.0, bands)
        scales = tuple(bands.tolist())
        inverse = self._of_dimensions(scales, descriptors).reciprocal().nan_to_num_(posinf=0.0)
        roots = (descriptors * inverse).abs_().sqrt_()
        return StoredArray(roots.copysign_(descriptors).round_().to(torch.int8).contiguous().cpu().numpy(), scales)

    def decode(self, stored: StoredArray, device: torch.device = CPU) -> Tensor:
        """value = integer · |integer| · scale."""
        descriptors = _sent(stored.array, device).to(torch.float32)
        return descriptors.mul_(descriptors.abs()).mul_(self._of_dimensions(stored.scales or (), descriptors))

    def _band_width(self, dims: int) -> int:
        return math.ceil(dims / _BANDS)

    def _of_dimensions(self, scales: tuple[float, ...], descriptors: Tensor) -> Tensor:
        """The scale of each dimension of P×D descriptors: (D,)."""
        dims = descriptors.shape[1]
        return descriptors.new_tensor(scales).repeat_interleave(self._band_width(dims))[:dims]


CODECS: dict[str, Codec] = {  # by feature_dtype
    "float32": FloatCodec(torch.float32),
    "float16": FloatCodec(torch.float16),
    "int8": SquareRootCodec(),
}


class Trained(Protocol):
    """A quantiser of whole pictures, learned from some; PatchCodec and MapCodec are such."""

    @property
    def dtype(self) -> str:
        """The feature_dtype that it is trained for."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of everything that decides codes and descriptors."""
        ...

    def encode_picture(
        self, descriptors: Sequence[Tensor], grids: Sequence[PatchGrid], local: Tensor | None
    ) -> list[np.ndarray]:
        """A picture's codes, one array for each grid that is stored; local: its map, H×W×C."""
        ...

    def decode_picture(
        self, codes: Sequence[np.ndarray], coded: Sequence[PatchGrid], grids: Sequence[PatchGrid]
    ) -> tuple[Tensor, ...]:
        """The unit rows P×D of all patches of some grids, from the codes of the stored grids that they need."""
        ...


class LearnedCodec:
    """Codes of a trained quantiser, num_bytes for each place; without one it only says how large they are.

    Pictures are coded as a whole, since what is stored are not the patches one by one.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, num_bytes: int, trained: Trained | None = None) -> None:
        self._num_bytes = num_bytes
        self._trained = trained

    def width(self, dims: int) -> int:
        """The bytes of a code."""
        return self._num_bytes

    def num_scales(self, dims: int) -> int:
        """None."""
        return 0

    def encode_picture(
        self, descriptors: Sequence[Tensor], grids: Sequence[PatchGrid], local: Tensor | None
    ) -> list[StoredArray]:
        """Codes. Raises ValueError for NaN or infinity."""
        rows = [_finite(tensor) for tensor in descriptors]
        return [StoredArray(codes, None) for codes in self._learned().encode_picture(rows, grids, local)]

    def decode_picture(
        self,
        codes: Sequence[np.ndarray],
        coded: Sequence[PatchGrid],
        grids: Sequence[PatchGrid],
        device: torch.device = CPU,
    ) -> tuple[Tensor, ...]:
        """The unit rows that the codes stand for; they are made on the CPU."""
        return tuple(rows.to(device) for rows in self._learned().decode_picture(codes, coded, grids))

    def _learned(self) -> Trained:
        if self._trained is None:
            raise ValueError("a codec that was not trained neither encodes nor decodes")
        return self._trained


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device; to CUDA it goes from pinned memory, and the processor does not wait for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def codec_of(dtype: str, trained: Trained | None = None) -> Codec | LearnedCodec:
    """The codec of a feature_dtype; trained: the quantiser of pqN and mapN, needed to encode and decode.

    Raises ValueError for an unknown type, and for a quantiser of another one.
    """
    form = code_form(dtype)
    if form is not None and (trained is None or trained.dtype == dtype):
        return LearnedCodec(form.num_bytes, trained)
    if dtype not in CODECS or trained is not None:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(CODECS)}, or pqN or mapN with their codec")
    return CODECS[dtype]


def write_patch_codec(folder: Path, trained: Trained) -> None:
    """Keep the quantiser of a folder's codes in that folder."""
    content: dict[str, np.ndarray] = {}
    codes = trained
    if isinstance(trained, MapCodec):
        content |= {"mean": trained.mean, "axes": trained.axes, **trained.head.arrays}
        codes = trained.codes
    assert isinstance(codes, PatchCodec)
    content |= {"groups": codes.groups, "centroids": codes.centroids, "error": np.array(codes.error)}
    with writing(folder / CODEC_NAME) as file:
        np.savez(file, **content)  # type: ignore[arg-type]  # numpy's stub


def read_patch_codec(folder: Path) -> Trained | None:
    """The quantiser of a folder's codes, None where there is none. Raises UserError when it is damaged."""
    path = folder / CODEC_NAME
    if not path.exists():
        return None
    try:
        # numpy leaves a file open that it opened itself and found damaged
        with told(path, "cannot be read"), path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            groups, centroids = content["groups"].astype(np.int64), content["centroids"].astype(np.float32)
            codes = PatchCodec(groups, centroids, float(content["error"]))
            if "axes" not in content:
                return codes
            head = PatchHead(**{name: content[name].astype(np.float32) for name in PatchHead.__dataclass_fields__})
            return MapCodec(content["mean"].astype(np.float32), content["axes"].astype(np.float32), codes, head)
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is not the codec of patch descriptors ({_DAMAGED_CODEC})") from error


def stored_codec(folder: Path, dtype: str, sha256: str) -> Codec | LearnedCodec:
    """How the descriptors of a folder are stored; sha256: the quantiser's by the manifest, "" without one.

    Raises UserError when the quantiser in the folder is missing, damaged or another one.
    """
    if code_form(dtype) is None:
        return codec_of(dtype)
    trained = read_patch_codec(folder)
    if trained is None:
        raise UserError(f"{folder / CODEC_NAME}: is missing, without which the codes say nothing ({_DAMAGED_CODEC})")
    if trained.sha256 != sha256 or trained.dtype != dtype:
        raise UserError(f"{folder / CODEC_NAME}: is the codec of another folder ({_DAMAGED_CODEC})")
    return codec_of(dtype, trained)


def _finite(descriptors: Tensor) -> Tensor:
    descriptors = descriptors.detach()
    if not math.isfinite(largest_magnitude(descriptors)):
        raise ValueError("descriptors hold NaN or infinity")
    return descriptors
