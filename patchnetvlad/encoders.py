"""Encoders: picture tensors to feature maps, each stating its channels and its geometry."""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

from patchnetvlad.errors import UserError
from patchnetvlad.patch_grid import EncoderGeometry
from patchnetvlad.resnet50 import ResNet50
from patchnetvlad.rootsift import DenseRootSIFT
from patchnetvlad.timm_encoder import DINOv2


class Encoder(Protocol):
    """What every encoder offers; it is also a torch module, whose state may be empty."""

    channels: int
    geometry: EncoderGeometry

    def __call__(self, pictures: Tensor) -> Tensor:
        """N×3×H×W, normalised as SPEC 1 says, to N×channels×h×w."""
        ...


class Pretrained(Protocol):
    """An encoder with published weights to start from."""

    def load_imagenet(self) -> None:
        """Fetch them (or take them from a cache). Raises OSError when that fails."""
        ...


class VGG16(nn.Sequential):
    """VGG16 up to conv5_3, without the ReLU and pooling behind it: N×3×H×W to N×512×H/16×W/16.

    Weights are random until a state is loaded. Keys are those of torchvision's ``features``: ``0.weight`` …
    ``28.bias``.
    """

    channels = 512
    geometry = EncoderGeometry(stride=16, receptive_field=196, padding=90)
    trainable_layers = (24, 26, 28)  # conv5_1, conv5_2, conv5_3 learn; all earlier layers are frozen

    def __init__(self) -> None:
        super().__init__(*list(make_layers(cfgs["D"]))[:29])
        self.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Tensor:
        # Convolutions on a CPU, and tensor cores, want channels last
        return super().forward(pictures.contiguous(memory_format=torch.channels_last))

    def load_imagenet(self) -> None:
        """Fetch torchvision's ImageNet weights (or take them from its cache)."""
        state = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
        own = {key.removeprefix("features."): state[key] for key in state if key.startswith("features.")}
        self.load_state_dict({key: own[key] for key in self.state_dict()})


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "vgg16": VGG16,
    "rootsift": DenseRootSIFT,
    "resnet50": ResNet50,
    "dinov2": DINOv2,
}


def make_encoder(name: str) -> nn.Module:
    """An encoder by its name in the table, weights not loaded; raises UserError for another name."""
    return _find(name)()


def encoder_geometry(name: str) -> EncoderGeometry:
    """The geometry of an encoder; it is built only where its class does not state that."""
    stated = getattr(_find(name), "geometry", None)
    return stated if isinstance(stated, EncoderGeometry) else cast(Encoder, make_encoder(name)).geometry


def _find(name: str) -> Callable[[], nn.Module]:
    if name not in ENCODERS:
        raise UserError(f"[global_params] backbone = {name}: expected one of {', '.join(ENCODERS)}")
    return ENCODERS[name]
