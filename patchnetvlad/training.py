"""The training loop: draw, mine, learn, validate, keep the best; every subset ends in a checkpoint.

docs/training.md says the course in full; the paper's section 4.1 gives its settings.
"""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from patchnetvlad.config import LOSSES, Config
from patchnetvlad.distributed import Processes
from patchnetvlad.errors import UserError, counted
from patchnetvlad.files import sync_files
from patchnetvlad.frozen_layers import FrozenPart, LearnedPart
from patchnetvlad.images import ChangePicture
from patchnetvlad.losses import ViewPair, seen_positions, view_loss
from patchnetvlad.mining import (
    Describer,
    Subset,
    TripletSet,
    epoch_queries,
    make_subset,
    mine,
    training_batches,
    with_all_negatives,
)
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.picture_changes import Picture, changed, changed_view
from patchnetvlad.training_data import CityPictures, TripletPlaces
from patchnetvlad.training_state import BEST, LAST, Learning, learning_rate, run_settings, save_learning
from patchnetvlad.validation import Validation, validate

logger = logging.getLogger(__name__)

_POINTS = 64  # of a picture whose local features are compared with those of its changed view
_DECIDING_N = 5  # the best model is that of the best Recall@5


class Trainer:
    """One training run over its data, from wherever ``learning`` stands."""

    def __init__(
        self,
        config: Config,
        learning: Learning,
        places: TripletPlaces,
        validation: tuple[CityPictures, ...],
        folder: Path,
        processes: Processes,
        save_every_epoch: bool = False,
        progress: bool = False,
    ) -> None:
        """folder: where events and checkpoints go, written by the first process."""
        train = config.train
        self._config = config
        self._loss = LOSSES.find(train.loss)
        self._learning = learning
        self._places = places
        self._validation = validation
        self._checkpoints = folder / "checkpoints"
        self._processes = processes
        self._save_every_epoch = save_every_epoch
        self._progress = progress
        self._settings = run_settings(config, places)
        # Behind all pictures come the queries once more, as they are: their numbers begin with `unchanged`
        self._unchanged = len(places.paths)
        self._paths = (*places.paths, *places.paths[: places.num_queries]) if train.local_weight else places.paths
        self._frozen = FrozenPart(learning.model, train.mixed_precision, train.frozen_cache_gb * 1e9)
        learned = LearnedPart(learning.model, train.mixed_precision)
        self._learned = processes.wrapped(learned)
        self._describe = Describer(self._frozen, learned, config, processes, progress)
        self._log = _TrainingLog(folder if processes.is_first else None, learning.progress.step)

    def run(self, num_epochs: int) -> None:
        """Learn until ``num_epochs`` epochs are finished, or Recall@5 has not risen for [train] patience validations.

        A new run is validated before its first step. Raises UserError when the loss or a gradient is not finite.
        """
        train, progress = self._config.train, self._learning.progress
        try:
            if progress.best_score < 0:
                self._validate()
                self._save(LAST)
            while progress.epoch < num_epochs:
                self._epoch(progress.epoch + 1)
                if train.patience and progress.not_improved >= train.patience:
                    logger.info("Recall@%d has not risen for %d validations: done", _DECIDING_N, progress.not_improved)
                    break
        finally:
            self._log.close()

    def _epoch(self, epoch: int) -> None:
        train, progress = self._config.train, self._learning.progress
        rate = learning_rate(train, epoch)
        for group in self._learning.optimizer.param_groups:
            group["lr"] = rate
        queries = epoch_queries(self._places, train.seed, epoch)
        subsets = [
            queries[start : start + train.subset_queries] for start in range(0, len(queries), train.subset_queries)
        ]
        for number in range(progress.subset, len(subsets)):
            label = f"epoch {epoch}, subset {number + 1} of {len(subsets)}"
            subset = make_subset(self._places, subsets[number], train.subset_negatives, train.seed, epoch, number)
            self._learn_from(subset, label, epoch)
            progress.subset = number + 1
            self._save(LAST)
        if not progress.loss_steps:
            logger.warning(
                "epoch %d: no query has a negative within the margin, nothing was learned (a good model already, or "
                "too few pictures?)",
                epoch,
            )
        else:
            average = progress.loss_sum / progress.loss_steps
            logger.info(
                "epoch %d: mean loss %.4f over %d steps, learning rate %g", epoch, average, progress.loss_steps, rate
            )
            self._log.epoch(epoch, average, rate)
        progress.epoch, progress.subset = epoch, 0
        progress.loss_sum, progress.loss_steps = 0.0, 0
        if epoch % train.evalevery == 0:
            self._validate()
        self._save(LAST)
        if self._save_every_epoch:
            self._save(f"checkpoint_epoch{epoch}.pth.tar")

    def _change(self, epoch: int) -> ChangePicture | None:
        """What augmentation does to a query in an epoch; the same whenever it is asked."""
        train = self._config.train
        if not train.augmentation:
            return None

        def change(number: int, picture: Picture) -> Picture:
            if number >= self._places.num_queries:
                return picture
            return changed(picture, train.changes, self._random(epoch, number))

        return change

    def _random(self, epoch: int, number: int) -> np.random.Generator:
        """What changes a query in an epoch."""
        return np.random.default_rng([self._config.train.seed, epoch, number])

    def _learn_from(self, subset: Subset, label: str, epoch: int) -> None:
        """Mine one subset and take its steps."""
        train, progress, started = self._config.train, self._learning.progress, time.perf_counter()
        change = self._change(epoch)
        self._frozen.clear()
        descriptors = self._describe(self._places.paths, subset.pictures.tolist(), f"Mining: {label}", True, change)
        triplets = self._mined(subset, descriptors)
        if not triplets:
            logger.warning("%s: no query has a negative within the margin, the subset is skipped", label)
            return
        steps = training_batches(triplets, train.batchsize)
        if self._loss.whole_step:
            steps = [with_all_negatives(step, self._places) for step in steps]
        shares = [self._processes.share(step) for step in steps]
        # A process without a share of the last step takes part with weight 0, since all must
        taken = [self._both_views(share or step[:1]) for share, step in zip(shares, steps, strict=True)]
        pictures = [list(dict.fromkeys(number for triplet in share for number in triplet.pictures)) for share in taken]
        outputs = self._frozen.steps(
            pictures,
            self._paths,
            (train.imageresizeh, train.imageresizew),
            train.cachebatchsize,
            self._config.global_params.loading_threads,
            change,
        )
        total = 0.0
        bar = tqdm(steps, f"Learning: {label}", unit="step", leave=False, disable=not self._progress)
        for step, share, own, numbers, maps in zip(bar, shares, taken, pictures, outputs, strict=True):
            whole = [(triplet.query, triplet.positive, triplet.negatives) for triplet in self._both_views(step)]
            terms = self._loss.terms(whole), len(step)
            loss = self._step(maps, numbers, own, float(len(share) > 0), terms, epoch, label)
            total += loss
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._log.step(progress.step, loss, sum(len(triplet.negatives) for triplet in step))
        seconds = time.perf_counter() - started
        speed = (len(subset.pictures) + sum(map(len, pictures)) * self._processes.count) / seconds
        logger.info(
            "%s: %d of %s with negatives, mean loss %.4f, %.1f pictures a second",
            label,
            len(triplets),
            counted(len(subset.queries), "query", "queries"),
            total / len(steps),
            speed,
        )
        self._log.subset(progress.step, speed, len(triplets), len(subset.queries))

    def _mined(self, subset: Subset, descriptors: NDArray[np.float32]) -> list[TripletSet]:
        """Triplet sets as the first process finds them: on other cards distances may round to another order."""
        train, triplets = self._config.train, []
        if self._processes.is_first:
            triplets = mine(self._places, subset, descriptors, train.margin, train.nneg, self._processes.device)
        return self._processes.from_first(triplets)

    def _step(
        self,
        maps: torch.Tensor,
        numbers: list[int],
        triplets: list[TripletSet],
        counts: float,
        terms: tuple[int, int],
        epoch: int,
        label: str,
    ) -> float:
        """One step of the optimiser; returns the loss of the whole step, over all processes.

        counts: 0 for a process that only takes part; terms: of the loss in the whole step, and queries there.
        """
        learning, progress, train = self._learning, self._learning.progress, self._config.train
        row_of = {number: row for row, number in enumerate(numbers)}
        rows = [
            (row_of[triplet.query], row_of[triplet.positive], [row_of[number] for number in triplet.negatives])
            for triplet in triplets
        ]
        learning.optimizer.zero_grad(set_to_none=True)
        descriptors, features = self._learned(maps)
        loss_share = self._loss.total(descriptors, rows, train.margin) / terms[0] * counts
        if train.local_weight:
            local = self._local_loss(features, row_of, triplets, epoch)
            loss_share = loss_share + train.local_weight * counts * local / terms[1]
        (loss_share * self._processes.count).backward()  # gradients of processes are averaged, losses are summed
        loss = float(self._processes.sum(loss_share.detach()))
        gradients = [parameter.grad for parameter in learning.parameters if parameter.grad is not None]
        steepness = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        if not (math.isfinite(loss) and math.isfinite(steepness)):
            fault = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss's gradient is {steepness}"
            places = ", ".join(self._places.paths[triplet.query].name for triplet in triplets[:4])
            raise UserError(
                f"{label}, step {progress.step + 1}: {fault}, training stops; queries {places} "
                f"({self._last_good()}; lower [train] lr, or mixed_precision = False?)"
            )
        learning.optimizer.step()
        progress.step += 1
        progress.loss_sum += loss
        progress.loss_steps += 1
        return loss

    def _both_views(self, triplets: list[TripletSet]) -> list[TripletSet]:
        """The sets, and behind each one the same with its query unchanged, where local features are compared."""
        if not self._config.train.local_weight:
            return triplets
        return [
            view for triplet in triplets for view in (triplet, replace(triplet, query=triplet.query + self._unchanged))
        ]

    def _local_loss(
        self, features: torch.Tensor, row_of: dict[int, int], triplets: list[TripletSet], epoch: int
    ) -> torch.Tensor:
        """The loss of local features between the unchanged queries of a step and their changed views, both ways."""
        train, pairs = self._config.train, []
        height, width = features.shape[2:]
        (grid,) = PatchGrid.of_map((height, width), (1,), (1,), self._learning.model.geometry)
        for query in (triplet.query for triplet in triplets if triplet.query >= self._unchanged):
            number = query - self._unchanged
            rng = self._random(epoch, number)
            moved = torch.from_numpy(changed_view(train.changes, rng, train.imageresizew, train.imageresizeh))
            views = features[row_of[query]], features[row_of[number]]
            for first, second, homography in ((*views, moved), (*views[::-1], torch.linalg.inv(moved))):
                seen = seen_positions(homography, grid)
                chosen = seen[torch.from_numpy(rng.permutation(len(seen))[:_POINTS])]
                pairs.append(ViewPair(number, first, second, homography, chosen.to(first.device)))
        return view_loss(pairs, grid)

    def _validate(self) -> None:
        train, progress = self._config.train, self._learning.progress
        n_values = sorted({*self._config.feature_match.n_values_all, _DECIDING_N})
        measured = validate(self._describe, self._validation, train.match_radius, n_values, self._processes.device)
        validation = self._processes.from_first(measured)  # so that all of them end at the same epoch
        for city, recall in validation.cities.items():
            values = ", ".join(f"@{n} {100 * value:.1f}" for n, value in zip(n_values, recall.with_match, strict=True))
            logger.info("epoch %d: %s: Recall (%%) %s", progress.epoch, city, values)
        self._log.validation(progress.epoch, validation)
        progress.recalls = validation.total
        score = validation.total[_DECIDING_N]
        if score > progress.best_score:
            progress.best_score, progress.not_improved = score, 0
            self._save(BEST)
        else:
            progress.not_improved += 1
        logger.info(
            "epoch %d: Recall@%d %.1f %%, best %.1f %%",
            progress.epoch,
            _DECIDING_N,
            100 * score,
            100 * progress.best_score,
        )

    def _save(self, name: str) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._learning.parameters):
            raise UserError(
                f"weights are no longer finite after step {self._learning.progress.step}, training stops "
                f"({self._last_good()}; lower [train] lr?)"
            )
        if self._processes.is_first:
            save_learning(self._checkpoints / name, self._learning, self._settings, self._processes.device)

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self._checkpoints / LAST}"


class _TrainingLog:
    """TensorBoard events of a run; a silent one (folder None) takes everything and writes nothing."""

    def __init__(self, folder: Path | None, after_step: int) -> None:
        """after_step: events of later steps, of a run that was killed after its last checkpoint, are dropped."""
        self._writer: SummaryWriter | None = None
        if folder is not None:
            self._writer = SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)

    def step(self, step: int, loss: float, num_negatives: int) -> None:
        """One step's mean loss over its negatives, and how many those were."""
        self._add("Train/Loss", loss, step)
        self._add("Train/nNeg", num_negatives, step)

    def subset(self, step: int, pictures_a_second: float, with_negatives: int, queries: int) -> None:
        """After a subset: speed of mining and learning, and the share of queries that had a hard negative."""
        self._add("Train/PicturesPerSecond", pictures_a_second, step)
        self._add("Train/QueriesWithNegatives", with_negatives / queries, step)
        self.flush()

    def epoch(self, epoch: int, average_loss: float, learning_rate: float) -> None:
        self._add("Train/AvgLoss", average_loss, epoch)
        self._add("Train/LearningRate", learning_rate, epoch)
        self.flush()

    def validation(self, epoch: int, validation: Validation) -> None:
        """Recall@N of all cities together and of each."""
        for n, value in validation.total.items():
            self._add(f"Val/Recall@{n}", value, epoch)
        for city, recall in validation.cities.items():
            for n, value in zip(recall.n_values, recall.with_match, strict=True):
                self._add(f"Val_{city}/Recall@{n}", value, epoch)
        self.flush()

    def flush(self) -> None:
        """Put what was told on the disk, so that the checkpoint that follows outlives no loss before it."""
        if self._writer is not None:
            self._writer.flush()
            sync_files(Path(self._writer.log_dir).glob("events.*"))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, tag: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, value, step)
