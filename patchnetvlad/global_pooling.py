"""Pooling layers without parameters: the channel-wise maximum or mean of a feature map."""

import torch.nn.functional as F
from torch import Tensor, nn

from patchnetvlad.netvlad import EPSILON


class MaxPooling(nn.Module):
    """N×C×H×W to N×C unit descriptors, by the maximum over positions."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return F.normalize(feature_map.float().amax(dim=(2, 3)), dim=1, eps=EPSILON)


class AveragePooling(nn.Module):
    """N×C×H×W to N×C unit descriptors, by the mean over positions."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return F.normalize(feature_map.float().mean(dim=(2, 3)), dim=1, eps=EPSILON)
