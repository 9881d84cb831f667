"""Global descriptors of many pictures while a model learns, the work shared among processes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.config import Config
from patchnetvlad.distributed import Processes
from patchnetvlad.frozen_layers import FrozenPart, LearnedPart
from patchnetvlad.images import ChangePicture, image_batches


class Describer:
    """Describes pictures with the model as it is now; every process gets all descriptors."""

    def __init__(
        self, frozen: FrozenPart, learned: LearnedPart, config: Config, processes: Processes, progress: bool
    ) -> None:
        self._frozen = frozen
        self._learned = learned
        self._size = (config.train.imageresizeh, config.train.imageresizew)
        self._batch_size = config.train.cachebatchsize
        self._threads = max(1, config.global_params.threads)
        self._processes = processes
        self._progress = progress

    @torch.no_grad()
    def __call__(
        self,
        paths: Sequence[Path],
        numbers: Sequence[int],
        label: str,
        keep: bool = False,
        change: ChangePicture | None = None,
    ) -> NDArray[np.float32]:
        """One row for each number, an index into ``paths``; ``keep`` stores the frozen layers' output for steps.

        ``change`` alters pictures by their number. Batches are the same however many processes share them.
        """
        rows = np.zeros((len(numbers), self._learned.output_dims), dtype=np.float32)
        batches = [
            list(numbers[start : start + self._batch_size]) for start in range(0, len(numbers), self._batch_size)
        ]
        own = [number for batch in self._processes.share(batches) for number in batch]
        row_of = {number: row for row, number in enumerate(numbers)}
        with tqdm(total=len(own), desc=label, unit="img", leave=False, disable=not self._progress) as bar:
            batches_of_own = image_batches(
                paths, *self._size, self._batch_size, self._threads, indices=own, change=change
            )
            for found, pictures in batches_of_own:
                maps = self._frozen(pictures)
                if keep:
                    self._frozen.keep(found, maps)
                rows[[row_of[number] for number in found]] = self._learned(maps).float().cpu().numpy()
                bar.update(len(found))
        return self._processes.joined(rows)
