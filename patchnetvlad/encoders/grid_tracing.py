"""An encoder's geometry, found by following its windows through one run without data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchnetvlad.patch_grid import EncoderGeometry

_aten = torch.ops.aten
_PADDING = (_aten.constant_pad_nd.default, _aten.reflection_pad2d.default, _aten.replication_pad2d.default)
_ENLARGING = (
    _aten.upsample_nearest2d.default,
    _aten.upsample_bilinear2d.default,
    _aten.upsample_bicubic2d.default,
    _aten._upsample_bilinear2d_aa.default,
    _aten._upsample_bicubic2d_aa.default,
)
_ROWS_OF_FIRST = (_aten.bmm.default, _aten.mm.default)  # attention: the rows are the queries


class _Grid(NamedTuple):
    """Where the positions of a tensor lie, along y and along x."""

    y: EncoderGeometry
    x: EncoderGeometry

    def windows(self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> "_Grid":
        return _Grid(*(axis.then(*window) for axis, *window in zip(self, kernel, stride, padding, strict=True)))


def trace_geometry(run: Callable[[Tensor], Tensor], height: int, width: int) -> EncoderGeometry:
    """The geometry of what makes a feature map (1×C×h×w) of a picture (1×3×height×width), both on the meta device.

    The picture's sides should be multiples of the stride. Where operations that are no windows thin positions out (a
    transformer that joins its tokens two by two), the positions that become one count as a window. Of two ways that
    join, as around a residual block, the one with the larger receptive field counts, although the other may lie a few
    pixels off; attention and other operations on the whole picture change nothing. Raises ValueError when the map's
    size contradicts what was found.
    """
    picture = torch.empty(1, 3, height, width, device="meta")
    pixels = EncoderGeometry(stride=1, receptive_field=1, padding=0)
    with torch.no_grad(), _Tracing(picture, _Grid(pixels, pixels)) as tracing:
        feature_map = run(picture)
    grid = tracing.grid_of(feature_map)
    if grid is None or feature_map.ndim != 4:
        raise ValueError("its output does not follow from the picture by windows")
    geometry = max(grid, key=lambda axis: axis.receptive_field)
    if geometry.first_center < 0:
        raise ValueError(f"the first position would lie outside the picture, at {geometry.first_center:g} pixels")
    for size, count in zip((height, width), feature_map.shape[2:], strict=True):
        if not 0 <= size / geometry.stride - count < 4:  # windows without padding lose positions at the border
            raise ValueError(f"{count} positions on {size} pixels are not {geometry.stride} pixels apart")
    return geometry


class _Tracing(TorchDispatchMode):
    """Follows the grids of all tensors that are made inside the context."""

    def __init__(self, picture: Tensor, grid: _Grid) -> None:
        super().__init__()
        self._size = picture.shape[2:]
        # The tensors are kept, so that no other one gets their number; on the meta device they hold nothing
        self._grids: dict[int, tuple[Tensor, _Grid]] = {id(picture): (picture, grid)}

    def grid_of(self, tensor: Tensor) -> _Grid | None:
        """A tensor's grid, brought up to its size if it is a map (N×C×h×w); None for what no picture went into."""
        if id(tensor) not in self._grids:
            return None
        grid = self._grids[id(tensor)][1]
        if tensor.ndim != 4:
            return grid
        joined = [
            max(1, size // (axis.stride * count) if count > 1 else 1)
            for axis, size, count in zip(grid, self._size, tensor.shape[2:], strict=True)
        ]
        return grid.windows(joined, joined, (0, 0))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        grid = self._result_grid(func, args)
        if grid is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._grids[id(leaf)] = (leaf, grid)
        return result

    def _result_grid(self, func: Any, args: Sequence[Any]) -> _Grid | None:
        if func in _ENLARGING:  # onto the grid of what it is added to
            return None
        if func is _aten.convolution.default and args[1].ndim == 4 and not args[6]:
            kernel = [1 + (size - 1) * dilation for size, dilation in zip(args[1].shape[2:], args[5], strict=True)]
            if max(*kernel, *args[3]) > 1:
                return self._windows(args[0], kernel, args[3], args[4])
        if func in (_aten.max_pool2d_with_indices.default, _aten.avg_pool2d.default):
            kernel = args[1]
            stride = args[2] if len(args) > 2 and args[2] else kernel
            return self._windows(args[0], kernel, stride, args[3] if len(args) > 3 else (0, 0))
        if func in _PADDING and args[0].ndim == 4 and len(args[1]) == 4:
            left, _, top, _ = args[1]
            return self._windows(args[0], (1, 1), (1, 1), (top, left))
        known = [self._grids[id(leaf)] for leaf in tree_leaves(args) if id(leaf) in self._grids]
        if func in _ROWS_OF_FIRST and known:
            return known[0][1]
        # Of what joins, a gate has fewer entries, and a token or a way around a block a smaller receptive field
        gated = func is not _aten.cat.default
        return max(
            known,
            key=lambda entry: (entry[0].numel() if gated else 0, entry[1].x.receptive_field),
            default=(None, None),
        )[1]

    def _windows(self, tensor: Tensor, *windows: Sequence[int]) -> _Grid | None:
        grid = self.grid_of(tensor)
        if grid is None:
            return None
        return grid.windows(*(list(values) * (2 // len(values)) for values in windows))
