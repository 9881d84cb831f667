"""Where a configured model's weights come from: a file at hand, or the Hugging Face hub."""

import logging
import re
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

from patchnetvlad.checkpoints import Checkpoint, build_model, file_sha256, load_state, read_checkpoint
from patchnetvlad.config import Config
from patchnetvlad.encoders import Pretrained
from patchnetvlad.errors import UserError
from patchnetvlad.model import PlaceModel
from patchnetvlad.paths import PUBLISHED_CHECKPOINTS, require_file

logger = logging.getLogger(__name__)

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
    model.precision = getattr(torch, config.feature_extract.precision)
    return model, checkpoint


def initialise_encoder(model: PlaceModel, config: Config) -> None:
    """Give a new model's encoder its starting weights: [train] pretrained = imagenet, none, or a checkpoint's path.

    imagenet stands for the weights that the encoder is published with (DINOv2's come from other pictures). An encoder
    without weights needs none. Raises UserError when they cannot be fetched.
    """
    source = config.train.pretrained
    if not model.encoder.state_dict() or source == "none":
        return
    if source == "imagenet":
        try:
            cast(Pretrained, model.encoder).load_imagenet()
        except OSError as error:
            raise UserError(
                f"[train] pretrained = imagenet: the weights of {model.backbone} cannot be fetched ({error}); go "
                "online, or name a checkpoint whose encoder to take, or none for random weights"
            ) from error
        return
    path = require_file(source, "pretrained_models", config.path)
    state = read_checkpoint(path).state
    encoder = {key: value for key, value in state.items() if key.startswith("encoder.")}
    load_state(model, {**model.state_dict(), **encoder}, path)


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
    try:
        metadata = get_hf_file_metadata(url, timeout=10)
        folder.mkdir(parents=True, exist_ok=True)
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
    _hash_file(target).write_text(f"{digest}  {name}\n", encoding="utf-8")
    fetched.replace(target)
    return target


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _recorded_hash(path: Path) -> str | None:
    file = _hash_file(path)
    return file.read_text(encoding="utf-8").split()[0] if file.exists() else None
