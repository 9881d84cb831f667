"""How well a model places the queries of validation cities, each searched on its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.errors import UserError
from patchnetvlad.recall import Recall, recall_at
from patchnetvlad.retrieval import DatabaseIndex
from patchnetvlad.training_data import CityPictures

DescribeFiles = Callable[[Sequence[Path], Sequence[int], str], NDArray[np.float32]]


@dataclass(frozen=True)
class Validation:
    """Recalls of each city, and of all their queries together. Queries without a positive do not count."""

    cities: dict[str, Recall]
    total: dict[int, float]


def check_validation(cities: Sequence[CityPictures], radius: float) -> None:
    """UserError when a city has no query with a true match: its recall would mean nothing."""
    for city in cities:
        if not any(map(len, city.positives(radius))):
            raise UserError(
                f"{city.queries.source}: none of the {len(city.queries)} queries of {city.name} has a database picture "
                f"within {radius:g} m, so it cannot validate (leave the city out of val_cities?)"
            )


def validate(
    describe: DescribeFiles,
    cities: Sequence[CityPictures],
    radius: float,
    n_values: Sequence[int],
    device: torch.device,
) -> Validation:
    """Recall@N of every city of single pictures; a match is a picture within the radius.

    describe: paths, numbers of some of them and a label to their descriptors.
    """
    recalls: dict[str, Recall] = {}
    for city in cities:
        queries, database = (
            describe(side.paths, range(len(side)), f"Validating: {city.name}") for side in (city.queries, city.database)
        )
        neighbours = DatabaseIndex(database, device=device).search(queries, max(n_values))
        recalls[city.name] = recall_at(neighbours.indices, city.positives(radius), n_values)
    counts = [recall.num_queries - recall.num_without_match for recall in recalls.values()]
    total = {
        n: sum(count * recall.with_match[place] for count, recall in zip(counts, recalls.values(), strict=True))
        / sum(counts)
        for place, n in enumerate(n_values)
    }
    return Validation(recalls, total)
