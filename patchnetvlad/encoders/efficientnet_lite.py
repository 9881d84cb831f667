"""EfficientNet-Lite0 up to its last feature map 16 pixels apart: small, and quick on a processor."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.encoders.published import LITE0_WEIGHTS, none_published
from patchnetvlad.images import IMAGENET_MEAN, IMAGENET_STD
from patchnetvlad.patch_grid import EncoderGeometry
from patchnetvlad.products import convolution, rounds_by_threads, row_products

_STEM = 32  # channels behind the first convolution, of stride 2
_STAGES = (  # channels, blocks, kernel, stride of the first block, expansion
    (16, 1, 3, 1, 1),
    (24, 2, 3, 2, 6),
    (40, 2, 5, 2, 6),
    (80, 3, 3, 2, 6),
    (112, 3, 5, 1, 6),
)
_LEARNED = 2  # stages, those of the last resolution
# As in TensorFlow, where the published weights come from: some of their channels hardly vary, so that epsilon matters
_EPSILON = 1e-3
_MEAN = _STD = 0.5  # of pictures


def _before(kernel: int, stride: int) -> int:
    """Zeros before the first pixel: TensorFlow pads less there than behind the last one where it takes every other."""
    return (kernel - stride) // 2


class _Layers(nn.Sequential):
    """Layers one behind the other; while they learn on a processor, a convolution has the normalisation behind it in
    its weights. The gradients are then products, and do not follow the number of threads."""

    def forward(self, maps: Tensor) -> Tensor:
        if self.training or not (torch.is_grad_enabled() and rounds_by_threads(maps)):
            return cast(Tensor, super().forward(maps))
        layers = list(self)
        for layer, behind in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, nn.Conv2d) and isinstance(behind, nn.BatchNorm2d):
                maps = _normalised_convolution(maps, layer, behind)
            elif not isinstance(layer, nn.BatchNorm2d):
                maps = layer(maps)
        return maps


class EfficientNetLite0(_Layers, Encoder):
    """EfficientNet-Lite0 (Tan, Le 2019; without squeeze and excitation) up to its fifth stage: N×112×⌊H/16⌋×⌊W/16⌋.

    The order of its weights is that of the whole network's, as published. The stages at the last resolution learn.
    """

    channels = _STAGES[-1][0]
    geometry = EncoderGeometry.of_windows(
        (kernel, stride, _before(kernel, stride))
        for kernel, stride in [
            (3, 2),
            *((kernel, 1 if block else stride) for _, blocks, kernel, stride, _ in _STAGES for block in range(blocks)),
        ]
    )

    def __init__(self) -> None:
        super().__init__(_Normalisation(), *_layer(3, _STEM, 3, stride=2))
        inputs = _STEM
        for outputs, blocks, kernel, first_stride, expansion in _STAGES:
            stage = nn.Sequential()
            for stride in (first_stride, *[1] * (blocks - 1)):
                stage.append(_Block(inputs, outputs, kernel, stride, expansion))
                inputs = outputs
            self.append(stage)
        self.to(memory_format=torch.channels_last)

    def last_stage(self) -> tuple[str, ...]:
        return tuple(str(number) for number in range(len(self) - _LEARNED, len(self)))

    def in_two(self) -> tuple[nn.Module, nn.Module]:
        layers = list(self)
        return nn.Sequential(*layers[:-_LEARNED]), nn.Sequential(*layers[-_LEARNED:])

    def published_state(self) -> Mapping[str, Tensor]:
        raise none_published(LITE0_WEIGHTS)


class _Normalisation(nn.Module):
    """From ImageNet's normalisation to the network's own; no weights, so not in the state."""

    def __init__(self) -> None:
        super().__init__()
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", std / _STD, persistent=False)
        self.register_buffer("offset", (mean - _MEAN) / _STD, persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        prepared = pictures * self.get_buffer("scale") + self.get_buffer("offset")
        return prepared.contiguous(memory_format=torch.channels_last)


class _Block(nn.Module):
    """An inverted residual: wider by a 1×1 convolution, filtered channel by channel, narrower again."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        widen = _layer(inputs, wide, 1) if expansion > 1 else ()
        filter_ = _layer(wide, wide, kernel, stride, groups=wide)
        narrow = _layer(wide, outputs, 1)[:-1]  # without activation
        self.layers = _Layers(*widen, *filter_, *narrow)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        made: Tensor = self.layers(maps)
        return maps + made if self.residual else made


class _Pointwise(nn.Conv2d):
    """A 1×1 convolution, which describes a picture alike whatever the number of threads."""

    def forward(self, maps: Tensor) -> Tensor:
        if not rounds_by_threads(maps):
            return super().forward(maps)
        return row_products(maps.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


def _normalised_convolution(maps: Tensor, layer: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """A convolution, and the normalisation with its kept statistics, in one: N×C×H×W to N×O×h×w."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * (variance + norm.eps).rsqrt()
    weight = layer.weight * scale[:, None, None, None]
    if isinstance(layer, _Pointwise):
        made = row_products(maps.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
    else:
        made = convolution(maps, weight, layer.stride[0], int(layer.padding[0]))
    return made + (norm.bias - mean * scale)[:, None, None]


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    before, behind = _before(kernel, stride), kernel // 2
    pad = () if before == behind else (nn.ZeroPad2d((before, behind, before, behind)),)
    padding = 0 if pad else behind
    kind = nn.Conv2d if kernel > 1 else _Pointwise
    return (
        *pad,
        kind(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=_EPSILON),
        nn.ReLU6(inplace=True),
    )
