"""Products and convolutions on a processor: rounded alike by any number of threads, gradients included, and fast where
a weight stays."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

WINDOWS = 1 << 20  # that a convolution's gradient takes together, times channels: 38 MB of 3×3 windows
PARTS = 16  # of the channels of a convolution, each one thread's
FEWEST_ROWS = 32  # of a product on a processor: fewer are added up in an order that follows the number of threads
_TRIAL = (40, 512, 48)  # rows, inner and outer dimensions of the product by which a way is tried


def rounds_by_threads(values: Tensor) -> bool:
    """Whether the rounding of products of these values could follow the number of threads, and should not.

    That is so on a processor in float32.
    """
    return values.device.type == "cpu" and not (torch.is_autocast_enabled("cpu") or is_recorded())


def is_recorded() -> bool:
    """Whether operations are being recorded for another program, which may take other sizes, rather than done."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def row_products(maps: Tensor, weight: Tensor) -> Tensor:
    """The products of every position of N×H×W×C maps with each row of an O×C weight, N×H×W×O, in float32 on a CPU.

    Rows of a map are products of their own, which one thread computes each. A single product of all positions is cut
    into as many parts as there are threads, and torch's libraries add up terms in an order that depends on the part.
    While gradients are recorded whole maps take the place of rows, since each product has a gradient of the weight.
    """
    batch, height, width = maps.shape[:3]
    rows = maps.flatten(1, 2) if torch.is_grad_enabled() else maps.flatten(0, 1)
    count = len(rows)
    if count == 1:
        rows = rows.expand(2, -1, -1)  # several threads would share one alone
    products = torch.bmm(rows, weight.t().expand(len(rows), -1, -1))
    return products[:count].reshape(batch, height, width, len(weight))


def convolution(maps: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """F.conv2d of N×C×H×W maps with an O×C×k×k weight, or one filter a channel (C×1×k×k); in float32 on a CPU.

    It is differentiable once, and its gradients do not follow the number of threads, unless there are fewer pictures
    than threads or maps have few positions: of these oneDNN gives a part of one picture to each.
    """
    return cast(Tensor, _Convolution.apply(maps, weight, stride, padding))


class _Convolution(torch.autograd.Function):
    """torch's own gradient of a weight adds up parts of the pictures, as many as suit the threads."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.steps = stride, padding
        return F.conv2d(maps, weight, stride=stride, padding=padding, groups=maps.shape[1] // weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        maps, weight = ctx.saved_tensors
        stride, padding = ctx.steps
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_maps = of_weight = None
        if ctx.needs_input_grad[0]:
            groups = maps.shape[1] // weight.shape[1]
            of_maps = conv2d_input(maps.shape, weight, gradient, stride, padding, groups=groups)
        if ctx.needs_input_grad[1]:
            of_one = _gradient_of_filters if weight.shape[1] == 1 else _gradient_of_weight
            of_weight = torch.zeros_like(weight)
            for picture, of_picture in zip(maps.split(1), gradient.split(1), strict=True):
                of_weight += of_one(picture, of_picture, weight.shape[-1], stride, padding)
        return of_maps, of_weight, None, None


def _gradient_of_filters(maps: Tensor, gradient: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """C×1×k×k for one picture: again a convolution channel by channel, whose filters are the gradient (1×C×h×w)."""
    filters = gradient.transpose(0, 1)
    made = F.conv2d(maps, filters, padding=padding, dilation=stride, groups=len(filters))
    return made[0, :, None, :size, :size]


def _gradient_of_weight(maps: Tensor, gradient: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """O×C×k×k for one picture: products of the gradient (1×O×h×w) with windows, of some channels and rows at a time."""
    channels, (outputs, height, width) = maps.shape[1], gradient.shape[1:]
    parts = PARTS if channels % PARTS == 0 else channels
    maps = F.pad(maps, (padding,) * 4)
    rows = max(1, WINDOWS // (width * channels))
    total = maps.new_zeros(parts, channels // parts * size * size, outputs)
    for first in range(0, height, rows):
        of_rows = gradient[0, :, first : first + rows].flatten(1).t().contiguous()  # windows × O
        last = (min(first + rows, height) - 1) * stride + size
        windows = F.unfold(maps[:, :, first * stride : last], size, stride=stride).unflatten(1, (parts, -1))[0]
        total += torch.bmm(windows[:, :, : len(of_rows)], of_rows.expand(parts, -1, -1))
    return total.permute(2, 0, 1).reshape(outputs, channels, size, size)


@dataclass(frozen=True)
class WeightWay:
    """How rows, n×K, are multiplied by a weight, D×K, of the same type, and a float32 bias (D,) is added: n×D.

    prepare: what multiply takes in place of the weight; works: whether this machine can go this way on a processor.
    """

    prepare: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    works: Callable[[torch.dtype], bool]


class KeptWeight:
    """A weight in the form in which its products are fastest, made anew when it changes; copies and files go without.

    On a processor the form takes as much memory as the weight.
    """

    def __init__(self) -> None:
        self._form: tuple[tuple[object, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[type["KeptWeight"], tuple[()]]:
        return KeptWeight, ()

    @torch.no_grad()
    def product(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Products of …×K rows with a D×K weight in the rows' type, plus a bias (D,): …×D, without gradients.

        On a processor they do not depend on the number of threads; where the weight is packed, a row's do not depend on
        the other rows either.
        """
        way = WEIGHT_WAYS[fastest_way(rows.device.type, rows.dtype)]
        version = 0 if weight.is_inference() else weight._version  # counts changes in place
        key = (weight.data_ptr(), version, weight.device, rows.dtype)
        if self._form is None or self._form[0] != key:
            self._form = (key, way.prepare(weight.detach().to(rows.dtype)))
        flat = rows.reshape(-1, rows.shape[-1])
        if rows.device.type == "cpu" and len(flat) < FEWEST_ROWS:
            flat = F.pad(flat, (0, 0, 0, FEWEST_ROWS - len(flat)))
        products = way.multiply(flat, self._form[1], bias)
        return products[: rows.shape[:-1].numel()].reshape(*rows.shape[:-1], len(bias))


@lru_cache
def fastest_way(device: str, precision: torch.dtype) -> str:
    """The name in WEIGHT_WAYS of the first way that this machine can go; which one is no question of measured time,
    so that a machine always rounds alike."""
    return next(
        name for name, way in WEIGHT_WAYS.items() if name == "plain" or (device == "cpu" and way.works(precision))
    )


def _multiply_plain(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if rows.dtype == torch.float32:
        return F.linear(rows, weight, bias)
    return F.linear(rows, weight).float().add_(bias)


def _pack(weight: Tensor) -> Tensor:
    """In oneDNN's order of blocks, which its products otherwise make at every call."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _multiply_packed(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    products: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return products


def _packing_works(precision: torch.dtype) -> bool:
    """Whether torch has oneDNN's products, which are not among its documented functions, and they are right."""
    rows_count, inner, outer = _TRIAL
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(count, inner, generator=generator).to(precision) for count in (rows_count, outer))
    bias = torch.randn(outer, generator=generator)
    exact = rows.double() @ weight.double().T + bias
    try:
        products = _multiply_packed(rows, _pack(weight), bias)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(
        products.double(), exact, rtol=1e-2, atol=2 * torch.finfo(precision).eps * exact.abs().max().item()
    )


WEIGHT_WAYS: dict[str, WeightWay] = {
    "packed": WeightWay(_pack, _multiply_packed, _packing_works),
    "plain": WeightWay(lambda weight: weight, _multiply_plain, lambda precision: True),
}
"""Ways to multiply by a weight that stays, the fastest first."""
