"""DINOv2 as an encoder, through the timm package."""

from typing import Any, cast

from torch import Tensor, nn

from patchnetvlad.errors import UserError
from patchnetvlad.patch_grid import EncoderGeometry

_MODEL = "vit_small_patch14_dinov2.lvd142m"
_PATCH = 14  # pixels


class DINOv2(nn.Module):
    """ViT-S/14 of DINOv2 (Oquab et al. 2023), its patch tokens: N×3×H×W to N×384×⌊H/14⌋×⌊W/14⌋.

    Attention sees the whole picture; a token's place is that of its 14×14 pixels. What is left of the picture at the
    right and below a multiple of 14 is cut off. Weights are random until a state is loaded. Raises UserError without
    timm.
    """

    channels = 384
    geometry = EncoderGeometry(stride=_PATCH, receptive_field=_PATCH, padding=0)

    def __init__(self) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise UserError(
                "[global_params] backbone = dinov2: needs the timm package (pip install 'patchnetvlad[timm]')"
            ) from error
        self.transformer: Any = timm.create_model(_MODEL, pretrained=False, num_classes=0, dynamic_img_size=True)

    def forward(self, pictures: Tensor) -> Tensor:
        rows, columns = pictures.shape[2] // _PATCH, pictures.shape[3] // _PATCH
        tokens = self.transformer.forward_features(pictures[..., : rows * _PATCH, : columns * _PATCH])
        tokens = tokens[:, self.transformer.num_prefix_tokens :]  # N×(rows·columns)×384, without the class token
        return cast(Tensor, tokens.transpose(1, 2).unflatten(2, (rows, columns)))

    def load_imagenet(self) -> None:
        """Fetch the published DINOv2 weights (or take them from the hub's cache). Raises OSError when it cannot."""
        import timm

        try:
            pretrained = timm.create_model(_MODEL, pretrained=True, num_classes=0, dynamic_img_size=True)
        except Exception as error:  # the hub's HTTP library, and so its errors, change with its version
            raise OSError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        self.transformer.load_state_dict(pretrained.state_dict())
