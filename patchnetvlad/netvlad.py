"""NetVLAD: soft assignment of local descriptors to clusters, and the residuals' sums (paper section 3.1).

Beside it pooling layers without parameters, to compare with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchnetvlad.products import rounds_by_threads, row_products

EPSILON = 1e-12  # every L2 normalisation divides by max(norm, EPSILON), so that empty clusters stay near 0


def intra_normalised(residuals: Tensor) -> Tensor:
    """Turn residual sums or means of each cluster (…×K×C) into unit descriptors (…×(K·C)), cluster-major.

    Every cluster is L2-normalised, then the whole; a cluster without residual stays near 0.
    """
    return F.normalize(F.normalize(residuals, dim=-1, eps=EPSILON).flatten(-2), dim=-1, eps=EPSILON)


class NetVLAD(nn.Module):
    """Soft-assignment VLAD over a feature map.

    Parameters under their published names: ``conv.weight`` (K, C, 1, 1), ``conv.bias`` (K,) with ``vladv2`` only,
    ``centroids`` (K, C). Computed in float32 whatever the precision around it, since intra-normalisation magnifies
    the rounding of almost empty clusters.
    """

    def __init__(self, num_clusters: int, channels: int, vladv2: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, num_clusters, kernel_size=1, bias=vladv2)
        self.centroids = nn.Parameter(torch.rand(num_clusters, channels))

    @property
    def num_clusters(self) -> int:
        return self.centroids.shape[0]

    @property
    def channels(self) -> int:
        return self.centroids.shape[1]

    @property
    def output_dims(self) -> int:
        """Length K·C of a descriptor."""
        return self.centroids.numel()

    def assign(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Unit local descriptors and their soft assignments.

        feature_map: N×C×H×W. Returns x̂ (N×H×W×C) and a (N×H×W×K), the latter summing to 1 over the clusters.
        """
        with torch.autocast(feature_map.device.type, enabled=False):
            local = feature_map.float().permute(0, 2, 3, 1)  # N×H×W×C
            local = F.normalize(local, dim=-1, eps=EPSILON).contiguous()
            weight, bias = self.conv.weight.flatten(1), self.conv.bias
            if rounds_by_threads(local):
                logits = row_products(local, weight)
                logits = logits if bias is None else logits.add_(bias)
            else:
                logits = F.linear(local, weight, bias)
            return local, logits.softmax(dim=-1)

    def aggregate(self, local: Tensor, assignment: Tensor) -> Tensor:
        """Global descriptor from what ``assign`` returns: N×(K·C), unit rows."""
        with torch.autocast(local.device.type, enabled=False):
            local, assignment = local.flatten(1, 2), assignment.flatten(1, 2)  # N×HW×C, N×HW×K
            residuals = assignment.transpose(1, 2) @ local  # N×K×C
            residuals = residuals - assignment.sum(dim=1).unsqueeze(-1) * self.centroids
            return intra_normalised(residuals)

    def forward(self, feature_map: Tensor) -> Tensor:
        """N×C×H×W feature map to N×(K·C) unit descriptors."""
        return self.aggregate(*self.assign(feature_map))

    @torch.no_grad()
    def initialise(self, centers: Tensor, samples: Tensor) -> float:
        """Set the parameters from k-means centres (K×C) and sampled local descriptors (n×C); returns α.

        The assignment's sharpness α makes the runner-up's share 1 % on average over the samples: by the gap of
        cosines (v1), or by the gap of squared distances (``vladv2``).
        """
        # On the CPU, because not every device has float64
        samples = F.normalize(samples.cpu().double(), dim=1, eps=EPSILON)
        centers = centers.cpu().double()
        if self.conv.bias is None:
            directions = F.normalize(centers, dim=1, eps=EPSILON)
            best = (samples @ directions.T).topk(2, dim=1).values
            alpha = -math.log(0.01) / (best[:, 0] - best[:, 1]).mean().item()
            weight = alpha * directions
        else:
            squared = torch.cdist(samples, centers, compute_mode="donot_use_mm_for_euclid_dist").square()
            nearest = squared.topk(2, dim=1, largest=False).values
            alpha = -math.log(0.01) / (nearest[:, 1] - nearest[:, 0]).mean().item()
            weight = 2 * alpha * centers
            self.conv.bias.copy_((-alpha * centers.square().sum(dim=1)).float())
        self.conv.weight.copy_(weight[:, :, None, None].float())
        self.centroids.copy_(centers.float())
        return alpha


class MaxPooling(nn.Module):
    """N×C×H×W to N×C unit descriptors, by the maximum over positions."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return F.normalize(feature_map.float().amax(dim=(2, 3)), dim=1, eps=EPSILON)


class AveragePooling(nn.Module):
    """N×C×H×W to N×C unit descriptors, by the mean over positions."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return F.normalize(feature_map.float().mean(dim=(2, 3)), dim=1, eps=EPSILON)
