"""Encoder, pooling and WPCA as one module: pictures in, global and patch descriptors out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchnetvlad.config import FeatureExtractConfig
from patchnetvlad.descriptors import Descriptors
from patchnetvlad.devices import float32_products
from patchnetvlad.encoders.table import make_encoder
from patchnetvlad.errors import UserError
from patchnetvlad.images import prepare_image, read_image
from patchnetvlad.netvlad import EPSILON, AveragePooling, MaxPooling, NetVLAD
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.patch_netvlad import patch_descriptors
from patchnetvlad.whitening import WPCA, WPCAFit

Precision = Literal["float32", "tf32", "bfloat16"]


class PatchBranch(nn.Module):
    """What makes patch descriptors where they come from another encoder than the global one: keys as PlaceModel's."""

    def __init__(self, backbone: str, num_clusters: int, num_pcs: int, vladv2: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = make_encoder(backbone)
        self.pool = NetVLAD(num_clusters, self.encoder.channels, vladv2)
        self.WPCA = WPCA(self.pool.output_dims, num_pcs)


class PlaceModel(nn.Module):
    """A place recognition model.

    Its state has the published keys ``encoder.*``, ``pool.*`` and ``WPCA.0.*``; where patches come from an encoder of
    their own, its keys lie behind ``patch_branch.``. ``patch_sizes`` and ``strides`` count positions of the feature
    map; both are empty for a purely global model. ``precision`` is that of the encoder and the WPCA product in
    `describe`; pooling stays in float32. tf32 differs from float32 on CUDA alone, where products have the range of
    float32 and 10 bits of mantissa.
    """

    def __init__(
        self,
        backbone: str,
        pooling: str,
        num_clusters: int = 16,
        num_pcs: int = 0,
        patch_sizes: Sequence[int] = (),
        strides: Sequence[int] = (),
        vladv2: bool = False,
        patch_backbone: str | None = None,
        patch_clusters: int = 0,
    ) -> None:
        """num_pcs = 0 leaves the WPCA layer out: descriptors are as long as the pooling makes them.

        patch_backbone: encoder of the patches where it is another one, with patch_clusters clusters and num_pcs (above
        0) dimensions.
        """
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.encoder = make_encoder(backbone)
        channels = self.encoder.channels
        self.pool: NetVLAD | MaxPooling | AveragePooling
        if pooling in ("netvlad", "patchnetvlad"):
            self.pool = NetVLAD(num_clusters, channels, vladv2)
            pooled_dims = self.pool.output_dims
        else:
            self.pool = MaxPooling() if pooling == "max" else AveragePooling()
            pooled_dims = channels
        self.WPCA = WPCA(pooled_dims, num_pcs) if num_pcs else None
        self.output_dims = num_pcs or pooled_dims
        self.patch_sizes = tuple(patch_sizes) if pooling == "patchnetvlad" else ()
        self.strides = tuple(strides) if pooling == "patchnetvlad" else ()
        self.precision: Precision = "float32"
        self.patch_branch: PatchBranch | None = None
        if patch_backbone is not None:
            self.patch_branch = PatchBranch(patch_backbone, patch_clusters, num_pcs, vladv2)
        # Where patches lie
        self.geometry = (self.patch_branch or self).encoder.geometry

    def add_wpca(self, fit: WPCAFit) -> None:
        """Project to the dimensions of a fit from now on, in place of any projection there was."""
        self.WPCA = WPCA(fit.weight.shape[1], fit.weight.shape[0])
        self.WPCA.set_fit(fit)
        self.WPCA.to(self.device)
        self.output_dims = fit.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        parameter = next(self.parameters(), None)
        return parameter.device if parameter is not None else torch.device("cpu")

    @property
    def patch_pool(self) -> NetVLAD:
        """The clusters of the patches."""
        pool = (self.patch_branch or self).pool
        assert isinstance(pool, NetVLAD)
        return pool

    @property
    def patch_whitening(self) -> WPCA | None:
        """The projection of the patches."""
        return (self.patch_branch or self).WPCA

    def grids(self, map_height: int, map_width: int) -> tuple[PatchGrid, ...]:
        """Where the patches of each size lie on a feature map of that size.

        Raises UserError when a patch is larger than the map.
        """
        largest = max(self.patch_sizes, default=0)
        if largest > min(map_height, map_width):
            stride = self.geometry.stride
            raise UserError(
                f"a patch of size {largest} is larger than the feature map, which has {map_height}×{map_width} "
                f"positions, one for each {stride}×{stride} pixels (take larger pictures or smaller patch_sizes)"
            )
        return PatchGrid.of_map((map_height, map_width), self.patch_sizes, self.strides, self.geometry)

    def forward(self, pictures: Tensor) -> Tensor:
        """Global descriptors alone, N×D, with gradients: what training sees."""
        return self.whiten(self.pool(self.encoder(pictures)))

    @torch.inference_mode()
    def describe(self, pictures: Tensor) -> Descriptors:
        """Global and patch descriptors of N×3×H×W pictures, made by ``images.prepare_image``; float32.

        Raises UserError when a patch is larger than the feature map.
        """
        with float32_products(pictures.device):
            features = self.feature_map(pictures)
            if not self.patch_sizes:
                return Descriptors(self._whitened(self.pool(features)), (), ())
            if self.patch_branch is not None:
                global_, pool = self._whitened(self.pool(features)), self.patch_branch.pool
                local, assignment = pool.assign(self.feature_map(pictures, self.patch_branch.encoder))
            else:
                assert isinstance(self.pool, NetVLAD)
                pool = self.pool
                local, assignment = pool.assign(features)
                global_ = self._whitened(pool.aggregate(local, assignment))
            projected = self.WPCA is not None or self.patch_branch is not None
            precision = self._product_type if projected else torch.float32
            patches = patch_descriptors(local, assignment, pool.centroids, self.patch_sizes, self.strides, precision)
            grids = self.grids(local.shape[1], local.shape[2])
            whitened = tuple(self._whitened_patches(of_size) for of_size in patches)
            return Descriptors(global_, whitened, grids, local)

    def describe_file(self, path: Path, size: FeatureExtractConfig) -> Descriptors:
        """The same of one picture file, read and prepared as [feature_extract] says.

        Raises UserError for a file that cannot be read, and naming it, as `describe` does.
        """
        picture = prepare_image(read_image(path, size.exif_rotation), size.imageresizeh, size.imageresizew)
        try:
            return self.describe(picture[None].to(self.device))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def feature_map(self, pictures: Tensor, encoder: nn.Module | None = None) -> Tensor:
        """The output of the encoder, or of another, for N×3×H×W pictures, N×C×H×W, in the model's precision."""
        half = self.precision == "bfloat16"
        device = pictures.device
        with (
            float32_products(device, self.precision == "tf32"),
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            return cast(Tensor, (encoder or self.encoder)(pictures))

    def _whitened(self, descriptors: Tensor) -> Tensor:
        """`whiten` in the model's precision."""
        with float32_products(descriptors.device, self.precision == "tf32"):
            return self.whiten(descriptors)

    def _whitened_patches(self, descriptors: Tensor) -> Tensor:
        """`whiten_patches` in the model's precision."""
        with float32_products(descriptors.device, self.precision == "tf32"):
            return self.whiten_patches(descriptors)

    @property
    def _product_type(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def whiten_patches(self, descriptors: Tensor) -> Tensor:
        """What `whiten` does, for patches, which may have a WPCA of their own."""
        if self.patch_branch is None:
            return self.whiten(descriptors)
        return cast(Tensor, self.patch_branch.WPCA(descriptors, self._product_type))

    def whiten(self, descriptors: Tensor) -> Tensor:
        """Pooled descriptors, …×dims, to what the model gives out: through WPCA if there is one, unit rows."""
        if self.WPCA is None:
            return F.normalize(descriptors, dim=-1, eps=EPSILON)
        return cast(Tensor, self.WPCA(descriptors, self._product_type))
