"""Any encoder, shown pictures of half their size: a quarter of the work, and twice the view of each position."""

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.encoders.table import encoder_geometry, make_encoder
from patchnetvlad.patch_grid import EncoderGeometry


class HalfSize(Encoder):
    """Means of 2×2 pixels, then another encoder; strides count pixels of the whole picture. Keys are the encoder's."""

    def __init__(self, *name: str) -> None:
        """name: of the encoder, parted at its colons."""
        super().__init__()
        self.encoder = make_encoder(":".join(name))
        self.channels = self.encoder.channels
        self.geometry = _of_whole(self.encoder.geometry)

    @classmethod
    def stated_geometry(cls, *name: str) -> EncoderGeometry:
        return _of_whole(encoder_geometry(":".join(name)))

    def forward(self, pictures: Tensor) -> Tensor:
        return cast(Tensor, self.encoder(F.avg_pool2d(pictures, 2)))

    def last_stage(self) -> tuple[str, ...]:
        return tuple(f"encoder.{name}" for name in self.encoder.last_stage())

    def in_two(self) -> tuple[nn.Module, nn.Module]:
        before, learned = self.encoder.in_two()
        return nn.Sequential(nn.AvgPool2d(2), before), learned

    def published_state(self) -> Mapping[str, Tensor]:
        return {f"encoder.{key}": value for key, value in self.encoder.published_state().items()}

    def own_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        inner = {key.removeprefix("encoder."): value for key, value in state.items()}
        return {f"encoder.{key}": value for key, value in self.encoder.own_state(inner).items()}


def _of_whole(of_halved: EncoderGeometry) -> EncoderGeometry:
    return EncoderGeometry(2 * of_halved.stride, 2 * of_halved.receptive_field, 2 * of_halved.padding)
