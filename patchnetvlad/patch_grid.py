"""Where each patch of a picture lies, derived from the encoder's geometry."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncoderGeometry:
    """How positions of an encoder's feature map lie on the picture, in pixels.

    Position j has its centre at ``stride * j + (receptive_field - 1) / 2 - padding``, along either axis.
    The defaults are those of VGG16 up to conv5_3.
    """

    stride: int = 16
    receptive_field: int = 196
    padding: int = 90

    @classmethod
    def of_windows(cls, windows: Iterable[tuple[int, int, int]]) -> "EncoderGeometry":
        """Geometry of windows (kernel, stride, padding) one behind the other, along either axis."""
        geometry = cls(stride=1, receptive_field=1, padding=0)
        for window in windows:
            geometry = geometry.then(*window)
        return geometry

    def then(self, kernel: int, stride: int, padding: int) -> "EncoderGeometry":
        """The geometry with one more window behind; padding is that before the first position."""
        return EncoderGeometry(
            self.stride * stride,
            self.receptive_field + (kernel - 1) * self.stride,
            self.padding + padding * self.stride,
        )

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Feature map (height, width) of a picture of so many pixels: a position for each whole stride, as VGG16's."""
        return height // self.stride, width // self.stride

    @property
    def first_center(self) -> float:
        """Centre of position 0 in pixels (7.5 for VGG16)."""
        return (self.receptive_field - 1) / 2 - self.padding


@dataclass(frozen=True)
class PatchGrid:
    """All patches of one size on one feature map (paper section 3.3), in row-major order.

    ``map_height`` and ``map_width`` are those of the feature map; ``patch_size`` and ``stride`` count its positions.
    A patch larger than the map leaves an empty grid.
    """

    map_height: int
    map_width: int
    patch_size: int
    stride: int = 1
    geometry: EncoderGeometry = EncoderGeometry()

    @classmethod
    def of_map(
        cls,
        map_size: tuple[int, int],
        patch_sizes: Sequence[int],
        strides: Sequence[int],
        geometry: EncoderGeometry,
    ) -> "tuple[PatchGrid, ...]":
        """The grids of several patch sizes on one feature map of (height, width)."""
        return tuple(cls(*map_size, size, stride, geometry) for size, stride in zip(patch_sizes, strides, strict=True))

    @property
    def rows(self) -> int:
        return max(0, (self.map_height - self.patch_size) // self.stride + 1)

    @property
    def columns(self) -> int:
        return max(0, (self.map_width - self.patch_size) // self.stride + 1)

    def __len__(self) -> int:
        return self.rows * self.columns

    @property
    def max_index(self) -> tuple[int, int]:
        """Largest grid index along x and y: stride·(columns − 1), stride·(rows − 1); 0 for an empty grid."""
        return self.stride * max(0, self.columns - 1), self.stride * max(0, self.rows - 1)

    @property
    def patch_pixels(self) -> int:
        """Side of a patch in pixels, one encoder stride for each position."""
        return self.patch_size * self.geometry.stride

    @property
    def pitch_pixels(self) -> int:
        """Distance between neighbouring patch centres in pixels."""
        return self.stride * self.geometry.stride

    def indices(self) -> Tensor:
        """Grid indices, P×2 int64: x = stride·column, y = stride·row."""
        y, x = torch.meshgrid(
            torch.arange(self.rows) * self.stride, torch.arange(self.columns) * self.stride, indexing="ij"
        )
        return torch.stack([x.reshape(-1), y.reshape(-1)], dim=1)

    def centers(self) -> Tensor:
        """Patch centres, P×2 float32 (x, y), in pixels of the resized picture."""
        offset = self.geometry.stride * (self.patch_size - 1) / 2 + self.geometry.first_center
        return self.indices().to(torch.float32) * self.geometry.stride + offset
