"""Where a configured model's weights come from: a file at hand, or the Hugging Face hub."""

import logging
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from torch import Tensor

from patchnetvlad.checkpoints import Checkpoint, build_model, file_sha256, load_state, read_checkpoint, read_weights
from patchnetvlad.config import Config
from patchnetvlad.downloads import require_answer
from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.errors import UserError
from patchnetvlad.files import make_folder, read_text, told, write_text
from patchnetvlad.model import PlaceModel, Precision
from patchnetvlad.paths import PUBLISHED_CHECKPOINTS, require_file

logger = logging.getLogger(__name__)

_ENCODER = "encoder."  # before its keys in a checkpoint
_WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
HUB_REPOSITORY = "TobiasRobotics/Patch-NetVLAD"


def load_model(config: Config) -> tuple[PlaceModel, Checkpoint]:
    """The configured model in evaluation mode on the CPU, and the checkpoint it came from.

    A published checkpoint that is missing is fetched. Raises UserError when there is none, or when it does not fit.
    """
    path = locate_checkpoint(config)
    checkpoint = read_checkpoint(path)
    recorded = _recorded_hash(path)
    if recorded is not None and recorded != checkpoint.sha256:
        raise UserError(
            f"{path}: its SHA-256 is not the one kept in {_hash_file(path).name} when it was downloaded "
            "(damaged or replaced? delete both files to fetch it again)"
        )
    logger.info("weights: %s (SHA-256 %s…)", path, checkpoint.sha256[:12])
    model = build_model(checkpoint, config.global_params)
    model.precision = cast(Precision, config.feature_extract.precision)
    return model, checkpoint


def initialise_encoder(model: PlaceModel, config: Config) -> None:
    """Give a new model's encoder its starting weights, as [train] pretrained says.

    imagenet stands for the weights that the encoder is published with (DINOv2's come from other pictures), none for
    random ones, package:NAME for the file of weights in an installed Python package. A path is that of a checkpoint,
    whose encoder is taken, or of the encoder's weights as somebody else published them. An encoder without weights
    needs none. Raises UserError when they cannot be fetched or do not fit.
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
            raise UserError(
                f"[train] pretrained = imagenet: the weights of {model.backbone} cannot be fetched ({error}); go "
                "online, or name a file of weights, or none for random ones"
            ) from error
        model.encoder.load_state_dict(dict(state))
        return
    package = source.removeprefix("package:")
    path = _weights_of(package) if package != source else require_file(source, "pretrained_models", config.path)
    state = _encoder_state(read_weights(path), model.encoder, path)
    others = {key: value for key, value in model.state_dict().items() if not key.startswith(_ENCODER)}
    load_state(model, {**others, **{_ENCODER + key: value for key, value in state.items()}}, path)


def _encoder_state(state: Mapping[str, Tensor], encoder: Encoder, path: Path) -> Mapping[str, Tensor]:
    """The encoder's part of a checkpoint, or what a file of its publisher means for it."""
    if any(key.startswith(_ENCODER) for key in state):
        return {key.removeprefix(_ENCODER): value for key, value in state.items() if key.startswith(_ENCODER)}
    try:
        return encoder.own_state(state)
    except KeyError:
        return _by_order(state, encoder, path)


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


def _weights_of(package: str) -> Path:
    """The one file of weights in an installed package."""
    spec = find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UserError(f"[train] pretrained = package:{package}: no such package is installed")
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*")) if file.suffix in _WEIGHT_FILES]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"[train] pretrained = package:{package}: expected one file of weights in it, found {found}")
    return files[0]


def locate_checkpoint(config: Config) -> Path:
    """The configured checkpoint's file, fetched from the hub if it is a published one and nowhere at hand."""
    path = config.require_checkpoint()
    return path if path.exists() else download(path.name, path.parent)


def download(name: str, folder: Path) -> Path:
    """Fetch one published checkpoint into a folder, by its local name; an interrupted download goes on.

    The file appears under its name only when it is whole and its SHA-256 is the hub's; the hash is kept beside it.
    """
    target = folder / name
    url = hf_hub_url(HUB_REPOSITORY, PUBLISHED_CHECKPOINTS[name])
    logger.info("fetching %s from %s", PUBLISHED_CHECKPOINTS[name], HUB_REPOSITORY)
    make_folder(folder)
    try:
        require_answer(url)
        metadata = get_hf_file_metadata(url, timeout=10)
        fetched = Path(hf_hub_download(HUB_REPOSITORY, PUBLISHED_CHECKPOINTS[name], local_dir=folder))
    except Exception as error:  # the hub's HTTP library, and so its errors, change with its version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: not at hand and cannot be fetched from the hub ({reason}); ways out: go online and run "
            f"download_models.py, copy the file from another machine into {folder}, or use configs/builtin.ini, "
            "whose model is included"
        ) from error
    digest = file_sha256(fetched)
    expected = metadata.etag or ""
    if re.fullmatch("[0-9a-f]{64}", expected) and digest != expected:
        fetched.unlink()
        raise UserError(f"{fetched}: SHA-256 {digest[:12]}… is not the hub's {expected[:12]}… (try again)")
    write_text(_hash_file(target), f"{digest}  {name}\n")
    with told(target):
        fetched.replace(target)
    return target


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _recorded_hash(path: Path) -> str | None:
    file = _hash_file(path)
    return next(iter(read_text(file).split()), None) if file.exists() else None
