#!/usr/bin/env python3
"""What a candidate costs when patches are stored as codes, beside float32: to read, to decode and to match.

    python benchmarks/code_costs.py --work WORK --output benchmarks

Descriptors are drawn, for the sizes of builtin.ini, speed.ini, storage.ini and performance.ini: means over windows of
random fields, so that patches are as alike as patches that overlap are. Times are of one thread, a picture or a pair at
a time; "cold" after the system was told to forget the files. Writes code_costs.md.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scale import forget_files, timed

from patchnetvlad.config_values import code_form
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.image_lists import ImageList
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_codes import rows_to_code, train_codec
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.reranking import match_pair
from patchnetvlad.store.arrays.codecs import Trained
from patchnetvlad.store.arrays.map_codes import PatchHead, train_map_codec
from patchnetvlad.store.manifest import StoreHeader
from patchnetvlad.store.reading.feature_store import FeatureStore
from patchnetvlad.store.writing.feature_writer import FeatureWriter
from patchnetvlad.whitening import WPCA

MAP = 30, 40
PICTURES = 12
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """A configuration's sizes: D; patch sizes; clusters and channels of the map; how the database may be stored."""

    name: str
    dims: int
    patch_sizes: tuple[int, ...]
    clusters: int
    channels: int
    stored: tuple[str, ...]


CASES = (
    Case("builtin.ini", 768, (5,), 16, 112, ("float32", "map40", "map12", "pq192", "pq64")),
    Case("speed.ini", 512, (5,), 16, 512, ("float32", "pq192", "pq64")),
    Case("storage.ini", 128, (5,), 16, 512, ("float32", "pq64")),
    Case("performance.ini", 4096, (2, 5, 8), 16, 512, ("float32", "pq96")),
)


def drawn(case: Case, seed: int) -> PatchFeatures:
    """A picture: unit rows of window means, and a map of unit rows."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.randn(1, case.dims, *MAP, generator=generator)
    rows = [F.normalize(F.avg_pool2d(field, size, 1)[0].flatten(1).T.contiguous(), dim=1) for size in case.patch_sizes]
    grids = PatchGrid.of_map(MAP, case.patch_sizes, (1,) * len(rows), EncoderGeometry())
    local = F.normalize(torch.randn(*MAP, case.channels, generator=generator), dim=2)
    return PatchFeatures(tuple(rows), grids, local=local)


def trained_for(case: Case, dtype: str) -> Trained | None:
    """The quantiser of a storage type, None for plain numbers."""
    form = code_form(dtype)
    if form is None:
        return None
    pictures = [drawn(case, 1000 + number) for number in range(6)]
    if form.kind == "pq":
        rows = [row for picture in pictures for row in rows_to_code(picture.descriptors, picture.grids)]
        return train_codec(torch.cat(rows), form.num_bytes)
    torch.manual_seed(0)
    head = PatchHead.of(NetVLAD(case.clusters, case.channels), WPCA(case.clusters * case.channels, case.dims))
    maps = [picture.local.flatten(0, 1) for picture in pictures if picture.local is not None]
    return train_map_codec(torch.cat(maps), form.num_bytes, head)


def written(case: Case, dtype: str, folder: Path) -> FeatureStore:
    """A folder of drawn pictures, opened without memory of them."""
    names = [f"{number:02}.jpg" for number in range(PICTURES)]
    pictures = ImageList(names, [Path(name) for name in names], names, Path("drawn"))
    trained = trained_for(case, dtype)
    sha256 = "" if trained is None else trained.sha256
    strides = (1,) * len(case.patch_sizes)
    header = StoreHeader("0", {}, case.dims, case.patch_sizes, strides, EncoderGeometry(), dtype, sha256)
    with FeatureWriter(folder, pictures, header, trained=trained) as writer:
        for index in range(PICTURES):
            writer.write(index, F.normalize(torch.ones(case.dims), dim=0), drawn(case, index))
        writer.finish()
    return FeatureStore.open(folder, pictures, cache_gb=0)


def costs(case: Case, dtype: str, folder: Path) -> list[float]:
    """Bytes of a picture and seconds: read and decoded from the disk, the same from memory, matched in float32, and
    rounded and matched by 8-bit products."""
    store = written(case, dtype, folder)
    for _ in range(2):  # buffers and tables are made meanwhile
        query = drawn(case, PICTURES)
        match_pair(query, store.patches(0))
    forget_files(folder)
    cold = float(np.median([timed(store.patches, index) for index in range(1, PICTURES)]))
    warm = float(np.median([min(timed(store.patches, index) for _ in range(REPEATS)) for index in range(1, PICTURES)]))
    rounded_query, reference = query.round_as("query"), store.patches(1)
    exact = min(timed(lambda other: match_pair(query, other), reference) for _ in range(REPEATS))
    rounded = min(
        timed(lambda other: match_pair(rounded_query, other.round_as("reference")), reference) for _ in range(REPEATS)
    )
    return [float(store.picture_bytes(1)), cold, warm, exact, rounded]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    parser.add_argument("--configs", nargs="+", default=[case.name for case in CASES])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = [
        "| sizes of | stored | kB a picture | read and decoded, from the disk, ms | from memory, ms | "
        "matched in float32, ms | rounded and matched by 8-bit products, ms |",
        "|---" * 7 + "|",
    ]
    for case in CASES:
        for dtype in case.stored if case.name in args.configs else ():
            folder = args.work / f"{case.name}_{dtype}"
            num_bytes, *seconds = costs(case, dtype, folder)
            shutil.rmtree(folder)
            numbers = " | ".join(f"{1000 * value:.3g}" for value in seconds)
            lines.append(f"| {case.name} | {dtype} | {num_bytes / 1000:,.1f} | {numbers} |")
            print(lines[-1], flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "code_costs.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
