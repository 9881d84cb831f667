"""Matrix products on a processor whose rounding does not follow the number of threads."""

import torch
from torch import Tensor


def rounds_by_threads(values: Tensor) -> bool:
    """Whether the rounding of products of these values could follow the number of threads, and should not.

    That is so on a processor in float32, apart from training, where memory for gradients counts for more.
    """
    busy = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_recorded()
    return values.device.type == "cpu" and not busy


def is_recorded() -> bool:
    """Whether operations are being recorded for another program, which may take other sizes, rather than done."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def row_products(maps: Tensor, weight: Tensor) -> Tensor:
    """The products of every position of N×H×W×C maps with each row of an O×C weight, N×H×W×O, in float32 on a CPU.

    Rows of a map are products of their own, which one thread computes each. A single product of all positions is cut
    into as many parts as there are threads, and torch's libraries add up terms in an order that depends on the part.
    """
    batch, height, width, channels = maps.shape
    rows = maps.reshape(batch * height, width, channels)
    if len(rows) == 1:
        rows = rows.expand(2, -1, -1)  # several threads would share one alone
    products = torch.bmm(rows, weight.t().expand(len(rows), -1, -1))
    return products[: batch * height].reshape(batch, height, width, len(weight))
