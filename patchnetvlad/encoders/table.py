"""Encoders by their names in a configuration."""

from collections.abc import Callable
from typing import cast

import torch

from patchnetvlad import config
from patchnetvlad.config import ENCODER_ALIASES, ENCODERS_WITH_ARGUMENTS
from patchnetvlad.encoders.efficientnet_lite import EfficientNetLite0
from patchnetvlad.encoders.half_size import HalfSize
from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.encoders.rootsift import DenseRootSIFT
from patchnetvlad.encoders.timm_encoder import TimmEncoder
from patchnetvlad.encoders.vgg16 import VGG16
from patchnetvlad.errors import UserError
from patchnetvlad.patch_grid import EncoderGeometry

# What stands behind a colon of the name are arguments: timm:NAME:LAYER, half:ENCODER
ENCODERS: dict[str, Callable[..., Encoder]] = {
    "vgg16": VGG16,
    "rootsift": DenseRootSIFT,
    "efficientnet_lite0": EfficientNetLite0,
    "timm": TimmEncoder,
    "half": lambda *name: HalfSize(make_encoder(":".join(name))),
}


def add_encoder(name: str, encoder: Callable[[], Encoder]) -> None:
    """Add an encoder, or replace one of that name; from then on a configuration may name it."""
    ENCODERS[name] = encoder
    if name not in config.ENCODERS:
        config.ENCODERS.append(name)


def make_encoder(name: str) -> Encoder:
    """An encoder by its name, weights not loaded. Raises UserError for another name, or arguments that do not fit."""
    kind, arguments = _kind(name)
    return kind(*arguments)


def encoder_geometry(name: str) -> EncoderGeometry:
    """The geometry of an encoder, without making its weights."""
    kind, arguments = _kind(name)
    stated = getattr(kind, "geometry", None)
    if stated is None:
        with torch.device("meta"):
            stated = kind(*arguments).geometry
    return cast(EncoderGeometry, stated)


def same_encoder(name: str, other_name: str) -> bool:
    """Whether two names mean the same encoder."""
    return ENCODER_ALIASES.get(name, name) == ENCODER_ALIASES.get(other_name, other_name)


def is_encoder(name: str) -> bool:
    """Whether the table has the kind of encoder that a name begins with."""
    return ENCODER_ALIASES.get(name, name).partition(":")[0] in ENCODERS


def _kind(name: str) -> tuple[Callable[..., Encoder], list[str]]:
    kind, *arguments = ENCODER_ALIASES.get(name, name).split(":", 2)
    if kind not in ENCODERS or (arguments and kind not in ENCODERS_WITH_ARGUMENTS):
        raise UserError(
            f"[global_params] backbone = {name}: expected one of {', '.join([*ENCODERS, *ENCODER_ALIASES])} (timm as "
            "timm:NAME or timm:NAME:LAYER, half as half:ENCODER)"
        )
    return ENCODERS[kind], arguments
