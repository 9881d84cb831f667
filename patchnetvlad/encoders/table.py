"""Encoders by their names in a configuration."""

from typing import cast

from patchnetvlad.config import ENCODER_ALIASES, ENCODERS
from patchnetvlad.config_values import encoder_form
from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.patch_grid import EncoderGeometry


def make_encoder(name: str) -> Encoder:
    """An encoder by its name, weights not loaded. Raises UserError for another name, or arguments that do not fit."""
    kind, arguments = _kind(name)
    return kind(*arguments)


def encoder_geometry(name: str) -> EncoderGeometry:
    """The geometry of an encoder, without making it."""
    kind, arguments = _kind(name)
    return kind.stated_geometry(*arguments)


def same_encoder(name: str, other_name: str) -> bool:
    """Whether two names mean the same encoder."""
    return ENCODER_ALIASES.get(name, name) == ENCODER_ALIASES.get(other_name, other_name)


def is_encoder(name: str) -> bool:
    """Whether a name has the form of an encoder's."""
    try:
        encoder_form(ENCODER_ALIASES.get(name, name), ENCODERS)
    except ValueError:
        return False
    return True


def _kind(name: str) -> tuple[type[Encoder], list[str]]:
    try:
        form, arguments = encoder_form(ENCODER_ALIASES.get(name, name), ENCODERS)
    except ValueError as error:
        raise ENCODERS.unknown(name) from error
    return cast(type[Encoder], ENCODERS[form]), arguments
