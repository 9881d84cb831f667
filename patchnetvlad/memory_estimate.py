"""What a training step will need in memory, found without taking it: the same operations on tensors without data."""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchnetvlad.frozen_layers import FrozenPart, LearnedPart
from patchnetvlad.model import PlaceModel


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. model: weights and the optimiser's state; frozen: at most, while the frozen layers run;
    learned: at most, in a step of the layers that learn, gradients included; output: the
    frozen layers' output for one picture."""

    model: int
    frozen: int
    learned: int
    output: int

    @property
    def peak(self) -> int:
        """On the computing device; the frozen layers run before a step, not during it."""
        return self.model + max(self.frozen, self.learned)


def estimate_memory(
    model: PlaceModel, size: tuple[int, int], described: int, trained: int, half: bool, adam: bool
) -> MemoryEstimate:
    """Estimate for pictures of (height, width): ``described`` at once in the frozen layers, ``trained`` in a step.

    A convolution's own workspace is not known beforehand and not counted.
    """
    maps = torch.empty(0)
    blank = copy.deepcopy(model).to("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        frozen, learned = FrozenPart(blank, half, 0), LearnedPart(blank, half)

        def describe() -> None:
            nonlocal maps
            maps = frozen(torch.empty(described, 3, *size))

        def step() -> None:
            learned(torch.empty(trained, *maps.shape[1:], dtype=maps.dtype))[0].sum().backward()

        frozen_bytes = _peak_bytes(describe)
        learned_bytes = _peak_bytes(step)
    weights = sum(value.numel() * 4 for value in model.state_dict().values())
    learning = sum(parameter.numel() * 4 for parameter in learned.parameters())
    return MemoryEstimate(
        weights + learning * (2 if adam else 1),
        frozen_bytes,
        learned_bytes,
        maps[0].numel() * maps.element_size(),
    )


def _peak_bytes(function: Callable[[], object]) -> int:
    with _LiveBytes() as live:
        function()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that are made inside the context and still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
