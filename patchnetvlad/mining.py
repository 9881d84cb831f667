"""Hard negatives: which pictures a part of an epoch looks at, their descriptors, and which of them make triplets.

Everything random follows from (seed, epoch, subset), so that a resumed run sees what an uninterrupted one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.config import Config
from patchnetvlad.distributed import Processes
from patchnetvlad.frozen_layers import FrozenPart, LearnedPart
from patchnetvlad.images import ChangePicture, image_batches
from patchnetvlad.training_data import Rows, TripletPlaces

_QUERIES_AT_ONCE = 64  # bounds the memory of a distance matrix
# Not by products, which are rounded by the number of threads: another order of negatives would be another training
_EXACT = "donot_use_mm_for_euclid_dist"


@dataclass(frozen=True)
class TripletSet:
    """A query, its closest positive, and negatives from hardest to easiest, as picture numbers of TripletPlaces."""

    query: int
    positive: int
    negatives: tuple[int, ...]

    @property
    def pictures(self) -> tuple[int, ...]:
        """All of them, the query first."""
        return (self.query, self.positive, *self.negatives)


@dataclass(frozen=True, eq=False)
class Subset:
    """A part of an epoch, as picture numbers: queries in the order of training (one may come twice), candidates for
    negatives, and ``pictures``, all that mining describes: queries, their positives, candidates; ascending."""

    queries: Rows
    candidates: Rows
    pictures: Rows


def epoch_queries(places: TripletPlaces, seed: int, epoch: int) -> Rows:
    """As many queries as there are, drawn with replacement by their weights, in the order of training."""
    rng = np.random.default_rng([seed, epoch])
    chances = places.weights / places.weights.sum()
    return rng.choice(places.num_queries, size=places.num_queries, p=chances).astype(np.int64)


def make_subset(
    places: TripletPlaces, queries: Rows, num_candidates: int, seed: int, epoch: int, number: int
) -> Subset:
    """Subset ``number`` of an epoch: its queries, and random database pictures near none of them."""
    rng = np.random.default_rng([seed, epoch, number + 1])
    count = min(num_candidates, places.num_database)
    drawn = rng.choice(places.num_database, size=count, replace=False) + places.num_queries
    distinct = np.unique(queries)
    near = np.unique(np.concatenate([places.near[query] for query in distinct]))
    candidates = np.setdiff1d(drawn, near)
    positives = [places.positives[query] for query in distinct]
    pictures = np.unique(np.concatenate([distinct, candidates, *positives]))
    return Subset(queries, candidates.astype(np.int64), pictures.astype(np.int64))


class Describer:
    """Describes pictures with the model as it is now, the work shared; every process gets all descriptors."""

    def __init__(
        self, frozen: FrozenPart, learned: LearnedPart, config: Config, processes: Processes, progress: bool
    ) -> None:
        self._frozen = frozen
        self._learned = learned
        self._size = (config.train.imageresizeh, config.train.imageresizew)
        self._batch_size = config.train.cachebatchsize
        self._threads = config.global_params.loading_threads
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
            for batch, pictures in batches_of_own:
                maps = self._frozen(pictures)
                if keep:
                    self._frozen.keep(batch, maps)
                rows[[row_of[number] for number in batch]] = self._learned(maps)[0].float().cpu().numpy()
                bar.update(len(batch))
        return self._processes.joined(rows)


def mine(
    places: TripletPlaces,
    subset: Subset,
    descriptors: NDArray[np.float32],
    margin: float,
    num_negatives: int,
    device: torch.device,
) -> list[TripletSet]:
    """Triplet sets of a subset, in the order of its queries; a query without a hard negative has none.

    descriptors: one row for each of ``subset.pictures``.
    """
    if not len(subset.candidates):
        return []
    row_of = {number: row for row, number in enumerate(subset.pictures.tolist())}
    rows = torch.from_numpy(descriptors).to(device)
    candidates = rows[[row_of[number] for number in subset.candidates.tolist()]]
    mined: dict[int, TripletSet] = {}
    distinct = np.unique(subset.queries).tolist()
    for start in range(0, len(distinct), _QUERIES_AT_ONCE):
        chunk = distinct[start : start + _QUERIES_AT_ONCE]
        queries = rows[[row_of[query] for query in chunk]]
        to_candidates = torch.cdist(queries, candidates, compute_mode=_EXACT)
        for query, descriptor, distances in zip(chunk, queries, to_candidates, strict=True):
            positives = places.positives[query]
            own = rows[[row_of[number] for number in positives.tolist()]]
            to_positives = torch.cdist(descriptor[None], own, compute_mode=_EXACT)[0]
            nearest = int(to_positives.argmin())
            hard = hard_negatives(float(to_positives[nearest]), distances, margin, num_negatives)
            if hard:
                negatives = tuple(int(subset.candidates[row]) for row in hard)
                mined[query] = TripletSet(query, int(positives[nearest]), negatives)
    return [mined[query] for query in subset.queries.tolist() if query in mined]


def hard_negatives(positive_distance: float, distances: Tensor, margin: float, count: int) -> list[int]:
    """Places in ``distances`` (M, from the query to the candidates) of the up to ``count`` smallest that violate the
    margin: ‖q−n‖ < ‖q−p‖ + √margin; hardest first, ties in order."""
    order = torch.sort(distances, stable=True)
    hard = order.values < positive_distance + margin**0.5
    return order.indices[hard][:count].tolist()


def training_batches(triplets: Sequence[TripletSet], batch_size: int) -> list[list[TripletSet]]:
    """Triplet sets in steps of ``batch_size``; the last may be smaller."""
    return [list(triplets[start : start + batch_size]) for start in range(0, len(triplets), batch_size)]


def with_all_negatives(step: Sequence[TripletSet], places: TripletPlaces) -> list[TripletSet]:
    """A step in which a query's negatives are all database pictures of the step that are not near it."""
    shown = dict.fromkeys(number for triplet in step for number in triplet.pictures[1:])
    near = {triplet.query: set(places.near[triplet.query].tolist()) for triplet in step}
    return [
        replace(triplet, negatives=tuple(number for number in shown if number not in near[triplet.query]))
        for triplet in step
    ]
