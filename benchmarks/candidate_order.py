#!/usr/bin/env python3
"""Bytes of patch descriptors that re-ranking reads when memory is short: 200 queries over 1,000 pictures.

    python benchmarks/candidate_order.py --output benchmarks

writes candidate_order.json and candidate_order.md. Pictures lie along a closed route, so that queries near each other
share candidates; each query's 100 nearest by global descriptor are re-ranked from a store on disk. Beside what is read
stand what a least-recently-used cache reads in the order of the list, and the least possible in any order: every
picture once, or what each query's candidates exceed the memory by.
"""

import argparse
import json
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from patchnetvlad.config import FeatureMatchConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.image_lists import ImageList
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.ranking import Ranker
from patchnetvlad.retrieval import DatabaseIndex
from patchnetvlad.store.manifest import StoreHeader
from patchnetvlad.store.reading.feature_store import FeatureStore
from patchnetvlad.store.reading.patch_sources import DescribedPictures
from patchnetvlad.store.writing.feature_writer import FeatureWriter

QUERIES, PICTURES, CANDIDATES = 200, 1000, 100
MEMORY = (50, 80, 120, 200, 400, 800)  # pictures that fit
DIMS = 128
GEOMETRY = EncoderGeometry(16, 196, 90)
GRID = PatchGrid(8, 10, 2, 1, GEOMETRY)
OPTIONS = FeatureMatchConfig(
    matcher="spatialApproximator",
    n_values_all=(CANDIDATES,),
    patchweights2use=(1.0,),
    similarity="float32",
)


def route_descriptors(angles: NDArray[np.float64], seed: int) -> NDArray[np.float32]:
    """Global descriptors, n×D unit rows, that are alike for places near each other on a route, with some noise."""
    frequencies = np.random.default_rng(0).integers(1, 12, DIMS)
    phases = np.random.default_rng(1).uniform(0, 2 * np.pi, DIMS)
    rows = np.cos(angles[:, None] * frequencies + phases)
    rows += 0.3 * np.random.default_rng(seed).standard_normal(rows.shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write_store(folder: Path, global_: NDArray[np.float32], seed: int) -> ImageList:
    """A feature folder of random patches, and its pictures."""
    names = tuple(f"{index:04}.jpg" for index in range(len(global_)))
    pictures = ImageList(names, tuple(map(Path, names)), tuple(name[:-4] for name in names), Path("list.txt"))
    header = StoreHeader("", {}, DIMS, (2,), (1,), GEOMETRY)
    generator = torch.Generator().manual_seed(seed)
    with FeatureWriter(folder, pictures, header) as writer:
        for index, vector in enumerate(global_):
            patches = F.normalize(torch.randn(len(GRID), DIMS, generator=generator), dim=1)
            writer.write(index, torch.from_numpy(vector), PatchFeatures((patches,), (GRID,)))
        writer.finish()
    return pictures


def least_recently_used(rows: Iterable[int], capacity: int) -> int:
    """Pictures that a least-recently-used cache reads."""
    held: OrderedDict[int, None] = OrderedDict()
    reads = 0
    for row in rows:
        reads += row not in held
        held[row] = None
        held.move_to_end(row)
        if len(held) > capacity:
            held.popitem(last=False)
    return reads


def measure(folder: Path, angles: NDArray[np.float64]) -> list[dict[str, float]]:
    """MB read at every size of the memory, before, now and at least."""
    places = np.linspace(0, 2 * np.pi, PICTURES, endpoint=False)
    database, queries = route_descriptors(places, 2), route_descriptors(angles, 3)
    lists = [write_store(folder / name, rows, 4) for name, rows in (("index", database), ("query", queries))]
    neighbours = DatabaseIndex(database).search(queries, CANDIDATES).indices
    picture = len(GRID) * DIMS * 4 / 1e6
    rows = []
    expected = None
    for capacity in MEMORY:
        stores = [
            FeatureStore.open(folder / name, pictures, cache_gb=cache)
            for name, pictures, cache in zip(("index", "query"), lists, (capacity * picture / 1e3, 0.01), strict=True)
        ]
        with stores[0] as index_store, stores[1] as query_store:
            described = [DescribedPictures(store.global_, store) for store in (index_store, query_store)]
            rankings = Ranker(OPTIONS, described[0], torch.device("cpu")).rank(described[1])
            read = index_store.statistics.bytes_read / 1e6
        if expected is None:
            expected = rankings.indices
        if not np.array_equal(rankings.indices, expected):
            raise SystemExit(f"the ranking depends on the memory: {capacity} pictures")
        before = least_recently_used(neighbours.ravel().tolist(), capacity) * picture
        exceeding = CANDIDATES + (QUERIES - 1) * max(0, CANDIDATES - capacity)
        least = max(len(np.unique(neighbours)), exceeding) * picture
        rows.append({"pictures": capacity, "before": before, "now": read, "least": least})
    return rows


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """The figures as Markdown."""
    lines = ["| queries | memory, pictures | before, MB | now, MB | least, MB |", "|---|---|---|---|---|"]
    for name, rows in results.items():
        for row in rows:
            values = " | ".join(f"{row[key]:.1f}" for key in ("before", "now", "least"))
            lines.append(f"| {name} | {row['pictures']:.0f} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder for the figures")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # short memory is what is measured
    shuffled = np.random.default_rng(5).uniform(0, 2 * np.pi, QUERIES)
    results = {}
    for name, angles in (("in any order", shuffled), ("along the route", np.sort(shuffled))):
        with tempfile.TemporaryDirectory() as temporary:
            results[name] = measure(Path(temporary), angles)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "candidate_order.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (args.output / "candidate_order.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
