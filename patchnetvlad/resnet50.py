"""ResNet-50 up to layer3 as an encoder, with weights from torchvision."""

from collections import OrderedDict
from typing import cast

from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

from patchnetvlad.patch_grid import EncoderGeometry

_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")


class ResNet50(nn.Sequential):
    """ResNet-50 (He et al. 2016) up to layer3, ReLU behind it: N×3×H×W to N×1024×⌈H/16⌉×⌈W/16⌉.

    Weights are random until a state is loaded; keys are torchvision's, ``conv1.weight`` … ``layer3.5.bn3.bias``.
    """

    channels = 1024

    def __init__(self) -> None:
        whole = resnet50(weights=None)
        super().__init__(OrderedDict((name, getattr(whole, name)) for name in _PARTS))
        windows: list[nn.Conv2d | nn.MaxPool2d] = [whole.conv1, whole.maxpool]
        for layer in (whole.layer1, whole.layer2, whole.layer3):
            windows += [block.conv2 for block in layer]  # the others are 1×1
        self.geometry = EncoderGeometry.of_windows([_window(module) for module in windows])

    def load_imagenet(self) -> None:
        """Fetch torchvision's ImageNet weights (or take them from its cache)."""
        state = ResNet50_Weights.IMAGENET1K_V2.get_state_dict(progress=True)
        self.load_state_dict({key: state[key] for key in self.state_dict()})


def _window(module: nn.Conv2d | nn.MaxPool2d) -> tuple[int, int, int]:
    """Kernel, stride and padding of a square window."""
    kernel, stride, padding = (
        value[0] if isinstance(value, tuple) else value for value in (module.kernel_size, module.stride, module.padding)
    )
    return cast(int, kernel), cast(int, stride), cast(int, padding)
