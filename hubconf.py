"""Entry points for torch.hub: `torch.hub.load(REPOSITORY, "place_recognizer", source="github" or "local")`."""

from collections import abc as _abc

# torch.hub offers every callable without an underscore as a model
from patchnetvlad.ini import load_config as _load_config
from patchnetvlad.model import PlaceModel as _PlaceModel
from patchnetvlad.paths import require_file as _require_file
from patchnetvlad.recognizer import PlaceRecognizer as _PlaceRecognizer
from patchnetvlad.weights import load_model as _load_model

# Modules that torch.hub asks for before it calls an entry point: those that one imports
dependencies = ["torch", "numpy", "faiss", "natsort", "tqdm", "PIL", "psutil", "threadpoolctl"]


def place_recognizer(
    config: str = "builtin.ini", device: str = "cpu", overrides: _abc.Sequence[str] = ()
) -> _PlaceRecognizer:
    """Describes pictures, compares two, and keeps a database of them.

    config: a shipped INI's name or a path; builtin.ini needs no download, the published ones fetch their weights.
    overrides: "section.key=value".
    """
    return _PlaceRecognizer.load(config, device, overrides)


def place_model(config: str = "builtin.ini", device: str = "cpu", overrides: _abc.Sequence[str] = ()) -> _PlaceModel:
    """The bare torch module: normalised pictures N×3×H×W to global descriptors N×D; .describe() gives patches too."""
    model, _ = _load_model(_load_config(_require_file(config, "configs"), overrides))
    return model.to(device)
