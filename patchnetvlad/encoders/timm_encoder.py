"""Any model of the timm package that gives feature maps, as an encoder; channels and geometry follow from the model."""

from collections.abc import Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from patchnetvlad.downloads import fetch_from_hub
from patchnetvlad.encoders.grid_tracing import trace_geometry
from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.encoders.published import no_such_model, no_timm
from patchnetvlad.errors import UserError
from patchnetvlad.images import IMAGENET_MEAN, IMAGENET_STD
from patchnetvlad.patch_grid import EncoderGeometry

LARGEST_STRIDE = 16  # pixels; without a layer, the last feature map whose positions are no further apart is taken
LEARNED_BLOCKS = 2  # of a transformer, whose blocks are no stages
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_REFUSALS = (ValueError, RuntimeError, AssertionError, IndexError)  # of models that cannot do what is tried
# What lets a model take pictures of any size, in the words of its family; others do, or do not, without being told.
_ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


@dataclass(frozen=True)
class _Cut:
    """One of a model's feature maps.

    index: its number; options: of timm.create_model; norm: whether the model's last normalisation is applied to it;
    size: the only height and width that the model takes, None for all that are multiples of multiple (pixels); learned:
    names of the modules that learn in training; separable: whether these, one behind the other, are all that follows
    the first one's input.
    """

    index: int
    options: Mapping[str, bool]
    norm: bool
    channels: int
    geometry: EncoderGeometry
    size: tuple[int, int] | None
    multiple: int
    learned: tuple[str, ...]
    separable: bool


class TimmEncoder(Encoder):
    """A model of timm up to one of its feature maps: N×3×H×W to N×channels×⌊H/stride⌋×⌊W/stride⌋.

    Feature maps are numbered from 0, or named by the module behind which they are taken, such as layer3 of a ResNet.
    Without a layer it is the last one at most 16 pixels apart: the third stage of most CNNs, the last block of a
    transformer. A transformer's token lies where its own pixels are, although attention sees the whole picture. What is
    left of the picture at the right and below a multiple of the stride (of twice that for a few models) is cut off.
    Layers behind the feature map are dropped; keys are timm's, behind ``model.``.

    In training the layers between the feature map before and this one learn, a CNN's last stage; of a transformer,
    whose every block gives a map, the last two blocks and the normalisation behind them. Raises UserError without timm,
    and for a model or a layer that is not there or gives no such map.
    """

    def __init__(self, name: str = "", layer: str = "") -> None:
        super().__init__()
        self.name = name
        self._cut = _find_cut(name, layer)
        self.channels = self._cut.channels
        self.geometry = self._cut.geometry
        self.model: Any = _pruned(_create(name, self._cut.options), self._cut.index, self._cut.norm)
        self.model.to(memory_format=torch.channels_last)
        own = self.model.pretrained_cfg
        values = (IMAGENET_MEAN, IMAGENET_STD, own["mean"], own["std"])
        mean, std, own_mean, own_std = (torch.tensor(value)[:, None, None] for value in values)
        # From ImageNet's normalisation to the model's own; they are no weights, so not in the state
        self.register_buffer("_scale", std / own_std, persistent=False)
        self.register_buffer("_offset", (mean - own_mean) / own_std, persistent=False)

    @classmethod
    def stated_geometry(cls, *name_and_layer: str) -> EncoderGeometry:
        return _find_cut(*name_and_layer).geometry

    def forward(self, pictures: Tensor) -> Tensor:
        return _feature_map(self.model, self._prepared(pictures), self._cut.index, self._cut.norm)

    def _prepared(self, pictures: Tensor) -> Tensor:
        """Normalised as the model wants it, and cut to whole positions."""
        height, width = (size - size % self._cut.multiple for size in pictures.shape[2:])
        if self._cut.size not in (None, (height, width)):
            rows, columns = self._cut.size or (0, 0)
            raise UserError(
                f"backbone = timm:{self.name}: takes pictures of {columns}×{rows} pixels alone, not {width}×{height} "
                f"(set imageresizew = {columns} and imageresizeh = {rows})"
            )
        if not height or not width:
            raise UserError(
                f"backbone = timm:{self.name}: a picture of {pictures.shape[3]}×{pictures.shape[2]} pixels is too "
                f"small (expected {self._cut.multiple} at least)"
            )
        prepared = pictures[..., :height, :width] * self.get_buffer("_scale") + self.get_buffer("_offset")
        return prepared.contiguous(memory_format=torch.channels_last)

    def last_stage(self) -> tuple[str, ...]:
        return tuple(f"model.{name}" for name in self._cut.learned)

    def in_two(self) -> tuple[nn.Module, nn.Module]:
        if not self._cut.separable:
            return super().in_two()
        stage = nn.Sequential(*(self.get_submodule(name) for name in self.last_stage()))
        return _Before(self, stage[0]), stage

    def published_state(self) -> Mapping[str, Tensor]:
        """The weights that timm publishes under the model's name."""
        source = self.model.pretrained_cfg
        if not source.get("hf_hub_id"):
            raise OSError("timm publishes none")
        name = source.get("hf_hub_filename")
        path = fetch_from_hub(source["hf_hub_id"], [name] if name else _HUB_FILES)
        # From the file, so that timm does not ask the hub again
        published = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
        whole = _create(self.name, {**self._cut.options, **published})
        return cast(Mapping[str, Tensor], _pruned(whole, self._cut.index, self._cut.norm).state_dict())

    def own_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {f"model.{key}": state[key] for key in self.model.state_dict()}


class _Before(nn.Module):
    """What an encoder does before a stage of it: pictures to that stage's input."""

    def __init__(self, encoder: TimmEncoder, stage: nn.Module) -> None:
        super().__init__()
        self._encoder = encoder
        self._stage = stage

    def forward(self, pictures: Tensor) -> Tensor:
        def stop(module: nn.Module, inputs: tuple[Tensor]) -> None:
            raise _Reached(inputs[0])

        handle = self._stage.register_forward_pre_hook(stop)
        try:
            self._encoder(pictures)
        except _Reached as reached:
            return reached.tensor
        finally:
            handle.remove()
        raise RuntimeError("the encoder went past its last stage")


class _Reached(Exception):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise no_timm() from error
    return timm


def _create(name: str, options: Mapping[str, object]) -> Any:
    """A model in evaluation mode, without classifier."""
    return _timm().create_model(name, num_classes=0, **options).eval()


def _pruned(model: Any, index: int, norm: bool) -> Any:
    """The model without the layers behind a feature map."""
    model.prune_intermediate_layers([index], prune_norm=not norm, prune_head=True)
    return model


def _feature_map(model: Any, pictures: Tensor, index: int, norm: bool) -> Tensor:
    (feature_map,) = model.forward_intermediates(
        pictures, indices=[index], norm=norm, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    return cast(Tensor, feature_map)


@lru_cache(maxsize=16)
def _find_cut(name: str = "", layer: str = "") -> _Cut:
    """What there is to know of a feature map, found on a model without memory for its weights."""
    if not name:
        raise UserError("[global_params] backbone = timm: expected timm:NAME or timm:NAME:LAYER")
    model, options = _without_memory(name)
    strides = [int(stage["reduction"]) for stage in model.feature_info]
    index = _layer_index(name, layer, [str(stage["module"]) for stage in model.feature_info], strides)
    of_blocks = len(set(strides)) == 1  # every block gives a map, and the last normalisation suits all
    before = index - (LEARNED_BLOCKS if of_blocks else 1)
    native = cast(tuple[int, int], tuple(int(side) for side in model.pretrained_cfg["input_size"][1:]))
    try:
        earlier = _pruned(deepcopy(model), before, False).state_dict() if before >= 0 else {}
        norm = of_blocks and _runs(model, native, index, norm=True)
        multiples = (strides[index], max(strides))
        multiple = next((many for many in multiples if _takes(model, name, options, many, index, norm)), None)
        many = multiple or 1
        size = (-(-native[0] // many) * many, -(-native[1] // many) * many)
        _pruned(model, index, norm)
        geometry = trace_geometry(lambda pictures: _feature_map(model, pictures, index, norm), *size)
        learned = _modules_of(model, model.state_dict().keys() - earlier.keys(), norm)
        channels, separable = _follow(model, learned, size, index, norm)
    except _REFUSALS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"[global_params] backbone = timm:{name}: where its feature maps' positions lie cannot be found ({reason})"
        ) from error
    return _Cut(index, options, norm, channels, geometry, None if multiple else native, many, learned, separable)


def _without_memory(name: str) -> tuple[Any, dict[str, bool]]:
    """A model on the meta device, and the options it was made with; UserError for a name that timm does not know."""
    timm = _timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise no_such_model(name, timm.list_models())
    tags = [pretrained.partition(".")[2] for pretrained in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(
            f"[global_params] backbone = timm:{name}: timm has no such weights, only {', '.join(tags) or 'none'}"
        )
    for options in _ANY_SIZE:
        try:
            with torch.device("meta"):
                model = _create(name, options)
        except TypeError:  # an option of other families
            continue
        if hasattr(model, "forward_intermediates") and hasattr(model, "prune_intermediate_layers"):
            return model, options
        break
    raise UserError(f"[global_params] backbone = timm:{name}: this model gives no feature maps")


def _layer_index(name: str, layer: str, modules: Sequence[str], strides: Sequence[int]) -> int:
    """The number of a feature map given by number or name, or of the last one at most LARGEST_STRIDE pixels apart."""
    if not layer:
        return max((index for index, stride in enumerate(strides) if stride <= LARGEST_STRIDE), default=0)
    if layer in modules:
        return modules.index(layer)
    if layer.isdecimal() and int(layer) < len(modules):
        return int(layer)
    raise UserError(
        f"[global_params] backbone = timm:{name}:{layer}: expected one of {', '.join(modules)}, or 0 to "
        f"{len(modules) - 1}"
    )


def _runs(model: Any, size: tuple[int, int], index: int, norm: bool) -> bool:
    """Whether a model gives its feature map for pictures of a size."""
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            _feature_map(model, torch.zeros(1, 3, *size, device=device), index, norm)
    except _REFUSALS:
        return False
    return True


def _takes(model: Any, name: str, options: Mapping[str, bool], many: int, index: int, norm: bool) -> bool:
    """Whether a model takes pictures whose sides are any multiples of many pixels."""
    rows, columns = (side // many * many for side in model.pretrained_cfg["input_size"][1:])
    larger = (rows + 2 * many, columns + 3 * many)
    if not _runs(model, larger, index, norm):
        return False
    if options or not model.pretrained_cfg.get("fixed_input_size"):
        return True
    # Some that are made for one size look positions up in a table, which only numbers find too short
    return _runs(_create(name, options), larger, index, norm)


def _modules_of(model: nn.Module, keys: Set[str], norm: bool) -> tuple[str, ...]:
    """The largest modules all of whose parameters and buffers are among the keys, in order; with norm, the last too."""
    module_names: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key in module.state_dict()}
        inside = any(name.startswith(f"{outer}.") for outer in module_names)
        if name and own and not inside and (own <= keys or (norm and name == "norm")):
            module_names.append(name)
    return tuple(module_names)


def _follow(model: Any, learned: Sequence[str], size: tuple[int, int], index: int, norm: bool) -> tuple[int, bool]:
    """Channels of the feature map, and whether the learned modules make it, one behind the other, from one tensor."""
    modules = [model.get_submodule(name) for name in learned]
    called: list[nn.Module] = []
    ends: list[tuple[Any, int]] = []  # what goes into a module and what comes out, and how often it had been changed

    def note(value: Any) -> None:
        ends.append((value, value._version if isinstance(value, Tensor) else -1))

    def before(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        called.append(module)
        note(inputs[0] if len(inputs) == 1 and not options else None)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(lambda module, inputs, output: note(output)) for module in modules]
    with torch.no_grad():
        feature_map = _feature_map(model, torch.empty(1, 3, *size, device="meta"), index, norm)
    for handle in handles:
        handle.remove()
    note(feature_map)
    between = zip(ends[1::2], ends[2::2], strict=True)  # what came out, and what went into the next one
    chained = all(out[0] is into[0] and out[1] == into[1] >= 0 for out, into in between)
    return feature_map.shape[1], bool(called) and called == modules and ends[0][1] >= 0 and chained
