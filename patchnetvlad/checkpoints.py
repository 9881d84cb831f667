"""Checkpoints: read, check and write the published format."""

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.config import GlobalParams
from patchnetvlad.encoders.table import is_encoder, same_encoder
from patchnetvlad.errors import UserError
from patchnetvlad.files import file_sha256, some_of, writing_with_torch
from patchnetvlad.model import PlaceModel

logger = logging.getLogger(__name__)

_PATCHES = "patch_branch."  # before the keys of patches that come from an encoder of their own


def _plain_dict(factory: object = None) -> dict[object, object]:
    """What a defaultdict in a file becomes."""
    return {}


# Published files hold a few NumPy scalars beside the tensors, pickled under NumPy's old module names; files of others
# arrays of numbers, and defaultdicts with a plain type's factory
_scalar, _array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
_ALLOWED: list[Any] = [
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    (_plain_dict, "collections.defaultdict"),
    *((kind, f"{home}.{kind.__name__}") for kind in (dict, list, int, float) for home in ("builtins", "__builtin__")),
    *{type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")},
]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: tensors under plain published keys, everything else, and the file's hash."""

    path: Path
    state: dict[str, Tensor]
    extras: dict[str, Any]
    sha256: str

    @property
    def num_clusters(self) -> int | None:
        """K of the NetVLAD layer, None without one."""
        centroids = self.state.get("pool.centroids")
        return None if centroids is None else int(centroids.shape[0])

    @property
    def num_pcs(self) -> int:
        """D of the WPCA layer, 0 without one."""
        weight = self.state.get("WPCA.0.weight")
        return 0 if weight is None else int(weight.shape[0])

    @property
    def backbone(self) -> str:
        """The encoder's INI name; published files hold VGG16 and do not say so."""
        return str(self.extras.get("backbone", "vgg16"))

    @property
    def patch_backbone(self) -> str | None:
        """The INI name of the patches' own encoder, None where they have none."""
        name = self.extras.get("patch_backbone")
        return None if name is None else str(name)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running code from it.

    ``module.`` inside keys is dropped and floating tensors become float32. Raises UserError for anything that is
    not tensors, plain values, NumPy numbers and arrays of numbers.
    """
    content = _content(path)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not _is_state(state):
        raise UserError(f"{path}: has no `state_dict` of tensors (not a checkpoint of this toolkit?)")
    extras = {key: value for key, value in content.items() if key != "state_dict"}
    return Checkpoint(path, _plain(state), extras, file_sha256(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state, of whatever model: a checkpoint's, the one of a file that holds nothing else, or of .safetensors.

    Read, and refused, as by `read_checkpoint`.
    """
    content = _content(path)
    state = content.get("state_dict", content.get("model", content)) if isinstance(content, Mapping) else None
    if not _is_state(state):
        raise UserError(f"{path}: holds no state of tensors (not a file of weights?)")
    return _plain(state)


def _content(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return _safe_tensors(path)
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            # Of a foreign file, which is then refused in one line
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)|<class '(\S+)'>", str(error))
        if match is None:
            raise UserError(f"{path}: is not a torch checkpoint (damaged or foreign file?)") from error
        raise UserError(_refusal(path, match.group(1) or match.group(2))) from error
    except (OSError, MemoryError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint: {reason} (download incomplete?)") from error
    for array in _arrays(content):
        if array.dtype.kind not in "fiub":
            raise UserError(_refusal(path, f"NumPy array of {array.dtype}"))
    return content


def _is_state(content: Any) -> TypeGuard[Mapping[str, Tensor]]:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("module.", ""): _float32(value) for key, value in state.items()}


def _safe_tensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: needs the safetensors package (pip install safetensors)") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _refusal(path: Path, what: str) -> str:
    """Why a file is not read, and the command that makes one of it that is."""
    plain = path.with_name(f"plain_{path.name}")
    return (
        f"{path}: holds a {what}; only tensors, plain values and NumPy numbers are read, since others can run code. If "
        f"you trust its source, keep its tensors alone by: python -c \"import torch; torch.save({{'state_dict': "
        f"torch.load({str(path)!r}, map_location='cpu', weights_only=False)['state_dict']}}, {str(plain)!r})\""
    )


def _arrays(content: object) -> Iterator[NDArray[Any]]:
    """All NumPy arrays in a tree of dicts, lists and tuples."""
    if isinstance(content, np.ndarray):
        yield content
    elif isinstance(content, (Mapping, list, tuple)):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _arrays(value)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def without_projection(checkpoint: Checkpoint) -> Checkpoint:
    """The same without its WPCA, if it has one, which is said."""
    if not checkpoint.num_pcs:
        return checkpoint
    logger.info("%s: its WPCA of %d dimensions is dropped", checkpoint.path, checkpoint.num_pcs)
    state = {key: value for key, value in checkpoint.state.items() if not key.startswith("WPCA.")}
    return replace(checkpoint, state=state)


def build_model(checkpoint: Checkpoint, params: GlobalParams) -> PlaceModel:
    """The model that a configuration describes with a checkpoint's weights, in evaluation mode on the CPU.

    Raises UserError where the two disagree: encoder, pooling, clusters, WPCA size, ``vladv2``.
    """
    path, state = checkpoint.path, checkpoint.state
    if not is_encoder(checkpoint.backbone):
        raise UserError(f"{path}: made for the encoder `{checkpoint.backbone}`, which is unknown here")
    if not same_encoder(checkpoint.backbone, params.backbone):
        raise UserError(
            f"{path}: made for backbone = {checkpoint.backbone}, the configuration says backbone = {params.backbone}"
        )
    of_patches = _PATCHES + "pool.centroids"
    if not params.has_patches:  # a global model of a checkpoint that has patches as well
        state = {key: value for key, value in state.items() if not key.startswith(_PATCHES)}
    elif checkpoint.patch_backbone != params.patch_backbone or (params.patch_backbone and of_patches not in state):
        raise UserError(
            f"{path}: made for patch_backbone = {checkpoint.patch_backbone}, the configuration says patch_backbone = "
            f"{params.patch_backbone}"
        )
    if checkpoint.num_pcs != params.num_pcs:
        raise UserError(
            f"{path}: WPCA has {checkpoint.num_pcs} dimensions, [global_params] num_pcs says {params.num_pcs} (it is "
            f"used as it is with resumepath = {path} and num_pcs = {checkpoint.num_pcs}; add_pca.py gives it others)"
        )
    clustered = params.pooling in ("netvlad", "patchnetvlad")
    if clustered and checkpoint.num_clusters is None:
        raise UserError(f"{path}: has no NetVLAD layer, which pooling = {params.pooling} needs")
    if not clustered and checkpoint.num_clusters is not None:
        raise UserError(f"{path}: has a NetVLAD layer, the configuration says pooling = {params.pooling}")
    has_bias = "pool.conv.bias" in state
    if clustered and has_bias != params.vladv2:
        raise UserError(
            f"{path}: {'has' if has_bias else 'has no'} pool.conv.bias, so vladv2 must be {has_bias} in [global_params]"
        )
    model = PlaceModel(
        params.backbone,
        params.pooling,
        checkpoint.num_clusters or 0,
        params.num_pcs,
        params.patch_sizes,
        params.strides,
        params.vladv2,
        params.patch_backbone,
        len(state[of_patches]) if params.patch_backbone else 0,
    )
    load_state(model, state, path)
    return model.eval()


def join_models(global_: Checkpoint, patches: Checkpoint, num_pcs: int | None = None) -> PlaceModel:
    """A model with the global descriptors of one checkpoint and the patches of another.

    Both keep their first num_pcs dimensions, which have the largest variance; None: as many as the one with fewer has.
    Raises UserError for a checkpoint without NetVLAD, without so many dimensions of WPCA, or with a branch of patches
    already, and where one has biases in its soft assignment and the other none.
    """
    both = (global_, patches)
    for checkpoint in both:
        if checkpoint.num_clusters is None or not checkpoint.num_pcs or checkpoint.patch_backbone is not None:
            raise UserError(f"{checkpoint.path}: expected a model of one encoder with NetVLAD and WPCA")
    biases = {"pool.conv.bias" in checkpoint.state for checkpoint in both}
    if len(biases) > 1:
        raise UserError(f"{global_.path}, {patches.path}: vladv2 is True of one and False of the other")
    fewest = min(checkpoint.num_pcs for checkpoint in both)
    num_pcs = num_pcs or fewest
    if num_pcs > fewest:
        raise UserError(f"{global_.path}, {patches.path}: have {fewest} dimensions in common, not {num_pcs}")
    model = PlaceModel(
        global_.backbone,
        "patchnetvlad",
        global_.num_clusters or 0,
        num_pcs,
        vladv2=biases.pop(),
        patch_backbone=patches.backbone,
        patch_clusters=patches.num_clusters or 0,
    )
    state = {}
    for checkpoint, before in ((global_, ""), (patches, _PATCHES)):
        for key, value in checkpoint.state.items():
            state[before + key] = value[:num_pcs] if key.startswith("WPCA.") else value
    load_state(model, state, patches.path)
    return model.eval()


def load_state(model: PlaceModel, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy a state into a model; raises UserError naming keys that are missing, left over or of another shape."""
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        faults = [f"lacks {some_of(missing)}"] * bool(missing) + [f"has unknown {some_of(extra)}"] * bool(extra)
        raise UserError(f"{path}: {' and '.join(faults)} (a checkpoint of another architecture?)")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(
                f"{path}: {key} is {_shape(value)}, the model needs {_shape(expected[key])} "
                "(a checkpoint of another architecture?)"
            )
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {key} holds NaN or infinite values (training diverged, or a damaged file?)")
    model.load_state_dict(dict(state), strict=True)


def write_checkpoint(path: Path, model: PlaceModel, half_precision: Sequence[str] = (), **extras: Any) -> None:
    """Write a checkpoint atomically, in the published format.

    extras: plain numbers, strings, tensors, and lists or dicts of them. half_precision: parts of the model, "WPCA" or
    "encoder", whose convolutions are stored as float16, half the bytes.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    for key, value in state.items():
        if value.ndim == 4 and key.removeprefix(_PATCHES).partition(".")[0] in half_precision:
            state[key] = value.half()
    content = {
        "state_dict": state,
        "backbone": model.backbone,
        **({"patch_backbone": model.patch_branch.backbone} if model.patch_branch else {}),
        "num_pcs": model.WPCA.output_dims if model.WPCA else 0,
    }
    with writing_with_torch(path) as file:
        torch.save({**content, **extras}, file)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"
