"""VGG16 up to conv5_3, the encoder of the paper."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from patchnetvlad.downloads import require_answer
from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.encoders.published import VGG16_IMAGENET, vgg16_file
from patchnetvlad.patch_grid import EncoderGeometry
from patchnetvlad.products import convolution, rounds_by_threads

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; pooling in between
_CONV5 = 24  # index of conv5_1; conv5_2 and conv5_3 follow, with a ReLU in between
_PREFIX = "features."  # of these layers in a whole VGG16


class VGG16(nn.Sequential, Encoder):
    """VGG16 (Simonyan, Zisserman 2015) without the ReLU and pooling behind conv5_3: N×3×H×W to N×512×⌊H/16⌋×⌊W/16⌋.

    Keys are torchvision's without ``features.``: ``0.weight`` … ``28.bias``. conv5_1, conv5_2 and conv5_3 learn, as
    published.
    """

    channels = 512
    geometry = EncoderGeometry(stride=16, receptive_field=196, padding=90)

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for stage in _STAGES:
            for outputs in stage:
                layers += [_Convolution(inputs, outputs, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(kernel_size=2))
        super().__init__(*layers[:-2])
        self.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Tensor:
        # Convolutions on a CPU, and tensor cores, want channels last
        return super().forward(pictures.contiguous(memory_format=torch.channels_last))

    def last_stage(self) -> tuple[str, ...]:
        return tuple(str(_CONV5 + layer) for layer in (0, 2, 4))

    def in_two(self) -> tuple[nn.Module, nn.Module]:
        layers = list(self)
        return nn.Sequential(*layers[:_CONV5]), nn.Sequential(*layers[_CONV5:])

    def published_state(self) -> Mapping[str, Tensor]:
        """torchvision's ImageNet weights."""
        file = vgg16_file()
        if not file.exists():
            require_answer(VGG16_IMAGENET)
        state = torch.hub.load_state_dict_from_url(
            VGG16_IMAGENET, str(file.parent), map_location="cpu", check_hash=True, weights_only=True
        )
        return cast(Mapping[str, Tensor], state)

    def own_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        prefix = _PREFIX if f"{_PREFIX}0.weight" in state else ""
        return {key: state[prefix + key] for key in self.state_dict()}


class _Convolution(nn.Conv2d):
    """A 3×3 convolution, which learns alike whatever the number of threads."""

    def forward(self, maps: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and rounds_by_threads(maps)):
            return super().forward(maps)
        made = convolution(maps, self.weight, self.stride[0], int(self.padding[0]))
        return made if self.bias is None else made + self.bias[:, None, None]
