"""Several processes as one run: who computes what, and how their results come together.

torchrun starts the processes and tells each its place through the environment; without it there is one process and
nothing here communicates.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from patchnetvlad.errors import UserError

T = TypeVar("T")

_ROWS_AT_ONCE = 4096  # rows sent at a time
# How long processes wait for one that checks pictures or makes clusters; torchrun ends all when one dies
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """The place of this process in a run: its rank 0 ≤ rank < count, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a sequence: every count-th."""
        return list(items[self.rank :: self.count])

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the processes."""
        if self.count > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def joined(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows n×D of which each is given by one process and 0 in the others; exact."""
        if self.count == 1:
            return rows
        whole = np.empty_like(rows)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = torch.from_numpy(rows[start : start + _ROWS_AT_ONCE]).to(self.device)
            whole[start : start + _ROWS_AT_ONCE] = self.sum(block).cpu().numpy()
        return whole

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank, in all of them."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """The first process's value, in all."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def wrapped(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes."""
        if self.count == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices)


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The place that torchrun gives this process, or the only one; a CUDA device becomes the one of this process."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes(0, 1, device)
        return
    count = _count_of_torchrun()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(distributed.get_rank(), count, device)
    finally:
        distributed.destroy_process_group()


def _count_of_torchrun() -> int:
    """How many processes there are, of which torchrun has told this one its place."""
    told = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    for name, value in told.items():
        if not value.isdecimal():
            raise UserError(
                f"WORLD_SIZE = {told['WORLD_SIZE']}: several processes, but {name} is {value or 'not set'}, where "
                "torchrun sets a whole number (start them by torchrun, or unset WORLD_SIZE)"
            )
    return int(told["WORLD_SIZE"])
