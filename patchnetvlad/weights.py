"""Where a configured model's weights come from: a file at hand, or the Hugging Face hub."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from patchnetvlad.checkpoints import Checkpoint, build_model, load_state, read_checkpoint, read_weights
from patchnetvlad.config import Config
from patchnetvlad.downloads import fetch_published, hash_file
from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.encoders.published import cannot_be_fetched
from patchnetvlad.errors import UserError
from patchnetvlad.files import read_text
from patchnetvlad.model import PlaceModel, Precision

logger = logging.getLogger(__name__)

_ENCODER = "encoder."  # before its keys in a checkpoint


def load_model(config: Config) -> tuple[PlaceModel, Checkpoint]:
    """The configured model in evaluation mode on the CPU, and the checkpoint it came from.

    A published checkpoint that is missing is fetched. Raises UserError when there is none, or when it does not fit.
    """
    path = locate_checkpoint(config)
    checkpoint = read_checkpoint(path)
    recorded = _recorded_hash(path)
    if recorded is not None and recorded != checkpoint.sha256:
        raise UserError(
            f"{path}: its SHA-256 is not the one kept in {hash_file(path).name} when it was downloaded "
            "(damaged or replaced? delete both files to fetch it again)"
        )
    logger.info("weights: %s (SHA-256 %s…)", path, checkpoint.sha256[:12])
    model = build_model(checkpoint, config.global_params)
    model.precision = cast(Precision, config.feature_extract.precision)
    return model, checkpoint


def initialise_encoder(model: PlaceModel, config: Config) -> None:
    """Give a new model's encoder its starting weights, as [train] pretrained says.

    imagenet stands for the weights that the encoder is published with (DINOv2's come from other pictures), none for
    random ones, package:NAME for the file of weights in an installed Python package. Another name is that of a
    checkpoint, whole or without its end, whose encoder is taken, or of the encoder's weights as somebody else published
    them. An encoder without weights needs none. Raises UserError when they cannot be fetched or do not fit.
    """
    source = config.train.pretrained
    if not model.encoder.state_dict():
        return
    if source == "none":
        logger.warning("[train] pretrained = none: the weights of %s are random, and know no pictures", model.backbone)
        return
    if source == "imagenet":
        try:
            state = model.encoder.own_state(model.encoder.published_state())
        except OSError as error:
            raise cannot_be_fetched(model.backbone, error) from error
        model.encoder.load_state_dict(dict(state))
        return
    path = config.require_pretrained()
    assert path is not None  # neither imagenet nor none
    state = _encoder_state(read_weights(path), model.encoder, path)
    others = {key: value for key, value in model.state_dict().items() if not key.startswith(_ENCODER)}
    load_state(model, {**others, **{_ENCODER + key: value for key, value in state.items()}}, path)


def _encoder_state(state: Mapping[str, Tensor], encoder: Encoder, path: Path) -> Mapping[str, Tensor]:
    """The encoder's part of a checkpoint, or what a file of its publisher means for it."""
    if any(key.startswith(_ENCODER) for key in state):
        # One shown pictures of half their size has the weights of the one it contains, and either may start the other
        names = {_inmost(key): key for key in encoder.state_dict()}
        return {
            names.get(_inmost(key), key.removeprefix(_ENCODER)): value
            for key, value in state.items()
            if key.startswith(_ENCODER)
        }
    try:
        return encoder.own_state(state)
    except KeyError:
        return _by_order(state, encoder, path)


def _inmost(key: str) -> str:
    """A key inside the encoders that contain one another."""
    while key.startswith(_ENCODER):
        key = key.removeprefix(_ENCODER)
    return key


def _by_order(state: Mapping[str, Tensor], encoder: Encoder, path: Path) -> Mapping[str, Tensor]:
    """Weights under names of another implementation: the tensors in their order, if kind and shape of all agree."""
    own = encoder.state_dict()
    if len(state) < len(own):
        raise UserError(f"{path}: has {len(state)} tensors, the encoder has {len(own)} (of another architecture?)")
    for (key, value), (other, tensor) in zip(own.items(), state.items(), strict=False):
        if key.rpartition(".")[2] != other.rpartition(".")[2] or value.shape != tensor.shape:
            raise UserError(
                f"{path}: has {other} {list(tensor.shape)} where the encoder has {key} {list(value.shape)} (weights of "
                "another architecture?)"
            )
    logger.warning("%s: names are of another implementation; taken in order, since kinds and shapes agree", path)
    return dict(zip(own, state.values(), strict=False))


def locate_checkpoint(config: Config) -> Path:
    """The configured checkpoint's file, fetched from the hub if it is a published one and nowhere at hand."""
    path = config.require_checkpoint()
    return path if path.exists() else fetch_published(path.name, path.parent)


def _recorded_hash(path: Path) -> str | None:
    file = hash_file(path)
    return next(iter(read_text(file).split()), None) if file.exists() else None
