"""Accelerators: which there are, how much room they have, and whether they compute in TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

from patchnetvlad.errors import UserError

EXTRACTION_MEMORY = "[feature_extract] cachebatchsize, or imageresizew and imageresizeh"
MATCHING_MEMORY = (
    "[feature_match] cache_gb, or rerank_top for fewer candidates; imageresizew and imageresizeh for fewer patches"
)
TRAINING_MEMORY = "[train] batchsize, cachebatchsize, nneg, or imageresizew and imageresizeh"

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # what torch's errors of other devices say
_FLAGS = RLock()  # torch keeps one setting of TF32 for all threads


@contextmanager
def memory_errors(keys: str) -> Iterator[None]:
    """Turn a device's want of memory into a UserError that names the keys to lower."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).splitlines() or [""]
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        reason = lines[0].split(". ")[0].rstrip(".")
        raise UserError(f"the device's memory is not enough: {reason} (lower {keys})") from error


@contextmanager
def float32_products(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Compute float32 convolutions and matrix products in TF32, or not, for as long as the context lasts.

    Only CUDA has TF32, and torch's own default is to use it for convolutions; elsewhere nothing changes. Torch's
    setting is the process's: it is put back at the end, and threads that describe at the same time take turns.
    """
    if device.type != "cuda":
        yield
        return
    convolution, product = torch.backends.cudnn, torch.backends.cuda.matmul
    with _FLAGS:
        before = convolution.allow_tf32, product.allow_tf32
        convolution.allow_tf32 = product.allow_tf32 = tf32
        try:
            yield
        finally:
            convolution.allow_tf32, product.allow_tf32 = before


def require_device(name: str | torch.device, place: str = "device") -> torch.device:
    """A device that this machine has; raises UserError otherwise. place: where it was asked for."""
    chosen = torch.device(name)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{place} {name}: this machine offers {torch.cuda.device_count()} CUDA devices")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{place} mps: this machine offers none")
    return chosen


def device_room(device: torch.device) -> int | None:
    """Bytes that may stay on an accelerator, half of what is free there; None where that is not known.

    The other half is for what is computed.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) // 2
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) // 2
    return None


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed what it was given, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
