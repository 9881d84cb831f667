"""The model in two parts: layers that stay as they are, whose output can be kept, and layers that learn.

In VGG16 the frozen layers hold nine tenths of the computing and nearly all memory. They run without gradients, a
few pictures at a time, and mining keeps their output (2.5 MB a picture of 640×480) for the steps that follow.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from patchnetvlad.errors import UserError
from patchnetvlad.images import ChangePicture, image_batches
from patchnetvlad.model import PlaceModel


class LearnedPart(nn.Module):
    """From the frozen layers' output (N×C×h×w) to global descriptors (N×D, unit rows) and feature maps, float32.

    It shares its parameters with the model. With ``half`` the encoder's layers compute in bfloat16; pooling stays
    float32.
    """

    def __init__(self, model: PlaceModel, half: bool) -> None:
        super().__init__()
        _, self.layers = encoder_parts(model)
        self.pool = model.pool
        self.output_dims = model.output_dims
        self._half = half

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(maps.device.type, torch.bfloat16, enabled=self._half):
            maps = self.layers(maps)
        maps = maps.float()
        return self.pool(maps), maps


class FrozenPart:
    """From pictures to the frozen layers' output, with a store of what mining saw last.

    capacity: bytes that the store may take; beyond it pictures are described again when a step needs them.
    """

    def __init__(self, model: PlaceModel, half: bool, capacity: float) -> None:
        self._layers, _ = encoder_parts(model)
        self._half = half
        self._capacity = capacity
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0
        self._device = model.device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """N×3×H×W on any device to N×C×h×w on the model's."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            return cast(Tensor, self._layers(pictures.to(self._device).contiguous(memory_format=torch.channels_last)))

    def clear(self) -> None:
        """Forget all: other pictures will be needed."""
        self._kept.clear()
        self._bytes = 0

    def keep(self, numbers: Sequence[int], maps: Tensor) -> None:
        """Keep the output of pictures by their numbers, as far as the capacity goes."""
        size = maps[0].numel() * maps.element_size()
        room = max(0, int((self._capacity - self._bytes) // size))
        stored = maps[:room].cpu()
        for number, output in zip(numbers, stored, strict=False):
            self._kept[number] = output.clone()
            self._bytes += size

    def steps(
        self,
        steps: Sequence[Sequence[int]],
        paths: Sequence[Path],
        size: tuple[int, int],
        batch_size: int,
        threads: int,
        change: ChangePicture | None = None,
    ) -> Iterator[Tensor]:
        """For each step, the output for its pictures (numbers into ``paths``), in its order, on the model's device.

        What is not kept is read and computed, ``batch_size`` pictures of (height, width) at a time, read ahead while
        the steps before are computed; ``change`` alters it by its number, as it did what is kept.
        """
        absent = [number for step in steps for number in step if number not in self._kept]
        batches = image_batches(paths, *size, batch_size, threads, indices=absent, change=change)
        ready: list[Tensor] = []  # of absent pictures, in order
        for step in steps:
            outputs = []
            for number in step:
                if number in self._kept:
                    outputs.append(self._kept[number].to(self._device, non_blocking=True))
                    continue
                if not ready:
                    ready = list(self(next(batches)[1]))
                outputs.append(ready.pop(0))
            yield torch.stack(outputs)


def encoder_parts(model: PlaceModel) -> tuple[nn.Module, nn.Module]:
    """The encoder in two, one behind the other: layers none of which learns, and the rest."""
    learning = {parameter for parameter in model.encoder.parameters() if parameter.requires_grad}
    if not learning:
        return model.encoder, nn.Identity()
    first, rest = model.encoder.in_two()
    return (first, rest) if learning <= set(rest.parameters()) else (nn.Identity(), model.encoder)


def freeze(model: PlaceModel, encoder_learns: str = "last") -> list[nn.Parameter]:
    """Leave gradients to the layers that learn alone: those of the encoder, and the pooling; returns their parameters.

    encoder_learns: the encoder's "last" stage, "all" of it, or "none". Raises UserError when nothing is left to learn.
    """
    encoder = model.encoder
    names = {"last": encoder.last_stage(), "all": ("",), "none": ()}[encoder_learns]
    model.requires_grad_(False)
    for module in (model.pool, *(encoder.get_submodule(name) for name in names)):
        module.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError(
            f"backbone = {model.backbone} with pooling = {model.pooling} has no parameters that learn "
            "(set [global_params] pooling = netvlad)"
        )
    return parameters


def learning_layers(model: PlaceModel) -> str:
    """What `freeze` left to learn, for a message."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.encoder.parameters()]
    learning, every = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    if not learning:
        return "the pooling, and nothing of the encoder"
    names = ", ".join(model.encoder.last_stage()) if learning < every else "all layers"
    return f"the pooling, and of the encoder {names} ({learning:,} of {every:,} parameters)"
