"""The position of a training run, and the checkpoints that carry it: what a resumed run needs to go on exactly."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from patchnetvlad.checkpoints import Checkpoint, write_checkpoint
from patchnetvlad.config import Config, TrainConfig
from patchnetvlad.errors import UserError
from patchnetvlad.model import PlaceModel
from patchnetvlad.training_data import TripletPlaces

BEST = "model_best.pth.tar"
LAST = "checkpoint.pth.tar"


@dataclass
class Progress:
    """How far a run is. epoch: finished epochs; subset: finished subsets of the epoch after those; step: steps since
    the start; loss_sum over loss_steps steps: of the running epoch; recalls: of the last validation; not_improved:
    validations since best_score, the best Recall@5."""

    epoch: int = 0
    subset: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    best_score: float = -1.0
    not_improved: int = 0
    recalls: dict[int, float] = field(default_factory=dict)


@dataclass
class Learning:
    """What training changes: the model (whose ``parameters`` learn), the optimiser, the position."""

    model: PlaceModel
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    progress: Progress


def start_learning(model: PlaceModel, parameters: list[torch.nn.Parameter], train: TrainConfig) -> Learning:
    """A new run with a model."""
    optimizer: torch.optim.Optimizer
    if train.optim == "SGD":
        optimizer = torch.optim.SGD(parameters, train.lr, momentum=train.momentum, weight_decay=train.weightdecay)
    elif train.optim == "ADAMW":
        optimizer = torch.optim.AdamW(parameters, train.lr, weight_decay=train.weightdecay)
    else:
        optimizer = torch.optim.Adam(parameters, train.lr)
    return Learning(model, parameters, optimizer, Progress())


def learning_rate(train: TrainConfig, epoch: int) -> float:
    """The rate in an epoch, counted from 1: multiplied by lrgamma every lrstep epochs, but constant with ADAM.

    The schedule is a function of the epoch, so a resumed run has it without further state.
    """
    return train.lr * train.lrgamma ** ((epoch - 1) // train.lrstep) if train.optim != "ADAM" else train.lr


def save_learning(path: Path, learning: Learning, settings: Mapping[str, str], device: torch.device) -> None:
    """Write a checkpoint from which ``restore_learning`` goes on; it has the published keys as well."""
    random_state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(device)
    write_checkpoint(
        path,
        learning.model,
        optimizer=learning.optimizer.state_dict(),
        random_state=random_state,
        settings=dict(settings),
        parallel=False,
        **asdict(learning.progress),
    )


def can_resume(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds a training position of ours, not the weights alone."""
    needed = {"optimizer", "random_state", "settings"} | {item.name for item in fields(Progress)}
    return needed <= checkpoint.extras.keys()


def restore_learning(checkpoint: Checkpoint, learning: Learning, optim: str, device: torch.device) -> None:
    """Set optimiser, random state and position to those of a checkpoint; the model has its weights already.

    Raises UserError when the optimiser is another one.
    """
    extras = checkpoint.extras
    if extras["settings"].get("optim") != optim:
        raise UserError(
            f"{checkpoint.path}: made with optim = {extras['settings'].get('optim')}, [train] optim says {optim}"
        )
    try:
        learning.optimizer.load_state_dict(extras["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{checkpoint.path}: its optimiser's state does not fit the model ({error})") from error
    learning.progress = Progress(**{item.name: extras[item.name] for item in fields(Progress)})
    torch.set_rng_state(extras["random_state"]["cpu"])
    if device.type == "cuda" and "cuda" in extras["random_state"]:
        torch.cuda.set_rng_state(extras["random_state"]["cuda"], device)


def run_settings(config: Config, places: TripletPlaces) -> dict[str, str]:
    """What decides the course of a run, as text: [train], the model's kind, and a hash of the pictures' names."""
    settings = {key: str(value) for key, value in asdict(config.train).items() if key not in _WITHOUT_EFFECT}
    names = json.dumps([places.num_queries, [path.name for path in places.paths]])
    settings["training pictures"] = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    settings["vladv2"] = str(config.global_params.vladv2)
    return settings


def changed_settings(checkpoint: Checkpoint, settings: Mapping[str, str]) -> list[str]:
    """In words, what was different when the checkpoint was made."""
    before: Mapping[str, Any] = checkpoint.extras["settings"]
    return [
        f"{key} was {before.get(key, 'absent')}, is {settings.get(key, 'absent')}"
        for key in dict.fromkeys([*before, *settings])
        if before.get(key) != settings.get(key)
    ]


# Keys of [train] that change nothing in the course of a run: its ends, its start, and memory
_WITHOUT_EFFECT = ("patience", "pretrained", "frozen_cache_gb", "whitening", "whitens", "num_clusters")
