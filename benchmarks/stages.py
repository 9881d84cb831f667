#!/usr/bin/env python3
"""Time every stage of extraction and matching, beside a plain reference and the machine's own floor.

    python benchmarks/stages.py --presets performance speed storage --output benchmarks

writes stages.json, stages.md and stages.png. Weights are random: they change no time. A quiet machine is assumed.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import faiss
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import patchnetvlad
from patchnetvlad.config import Config, load_config
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.feature_store import FeatureStore, FeatureWriter, StoreHeader
from patchnetvlad.images import image_batches, prepare_image, read_image
from patchnetvlad.locations import require_file, shipped_folder
from patchnetvlad.matching import mutual_matches
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_netvlad import patch_descriptors
from patchnetvlad.reranking import MATCHERS, fuse, rerank
from patchnetvlad.retrieval import retrieve

REPEATS = 5


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of a call after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def product_rate(rows: int, inner: int, columns: int) -> float:
    """Measured rate of a float32 matrix product of these sizes, in FLOP/s."""
    first, second = torch.randn(rows, inner), torch.randn(inner, columns)
    return 2 * rows * inner * columns / median_seconds(lambda: first @ second)


def random_model(config: Config) -> PlaceModel:
    """The configured model with 16 clusters and random weights."""
    torch.manual_seed(0)
    params = config.global_params
    model = PlaceModel(
        params.backbone, params.pooling, 16, params.num_pcs, params.patch_sizes, params.strides, params.vladv2
    )
    assert isinstance(model.pool, NetVLAD)
    centers = F.normalize(torch.rand(16, model.pool.channels), dim=1)
    model.pool.initialise(centers, F.normalize(torch.rand(500, model.pool.channels), dim=1))
    return model.eval()


@torch.inference_mode()
def extraction_stages(config: Config, pictures: list[Path], folder: Path) -> dict[str, float]:
    """Seconds a picture for each stage, and for the whole with loading and writing overlapped."""
    model = random_model(config)
    assert isinstance(model.pool, NetVLAD) and model.WPCA is not None
    pool, wpca = model.pool, model.WPCA
    picture = prepare_image(read_image(pictures[0]), 480, 640)[None]
    feature_map = model.encoder(picture)
    local, assignment = pool.assign(feature_map)
    sizes, strides = model.patch_sizes, model.strides
    pooled = patch_descriptors(local, assignment, pool.centroids, sizes, strides)
    stages = {
        "load": median_seconds(lambda: prepare_image(read_image(pictures[0]), 480, 640)),
        "encode": median_seconds(lambda: model.encoder(picture)),
        "pool": median_seconds(lambda: patch_descriptors(*pool.assign(feature_map), pool.centroids, sizes, strides)),
        "wpca": median_seconds(lambda: [wpca(patches) for patches in pooled]),
    }
    described = model.describe(picture)
    header = store_header(model, [path.stem for path in pictures])
    with FeatureWriter(folder / "stages", header, overwrite=True) as writer:
        started = time.perf_counter()
        for index in range(len(pictures)):
            writer.write(index, described.global_[0], described.picture(0))
        writer.finish()
        stages["write"] = (time.perf_counter() - started) / len(pictures)
    batch = config.feature_extract.cachebatchsize
    with FeatureWriter(folder / "whole", header, overwrite=True) as writer:
        started = time.perf_counter()
        for indices, tensors in image_batches(pictures, 480, 640, batch, 2):
            together = model.describe(tensors)
            for position, index in enumerate(indices):
                writer.write(index, together.global_[position], together.picture(position))
        writer.finish()
        stages["whole"] = (time.perf_counter() - started) / len(pictures)
    return stages


def store_header(model: PlaceModel, names: list[str]) -> StoreHeader:
    return StoreHeader(
        "", {}, tuple(names), tuple(names), model.output_dims, model.patch_sizes, model.strides, model.geometry
    )


def related_pictures(config: Config, count: int) -> list[PatchFeatures]:
    """Descriptors with the statistics that matter for time: unit rows, of which a part finds a true counterpart."""
    params = config.global_params
    model = PlaceModel("vgg16", "patchnetvlad", 16, 0, params.patch_sizes, params.strides)
    grids = model.grids(30, 40)
    generator = torch.Generator().manual_seed(1)
    common = [torch.randn(len(grid), params.num_pcs, generator=generator) for grid in grids]
    pictures = []
    for _ in range(count):
        rows = [F.normalize(shared + 1.5 * torch.randn(shared.shape, generator=generator), dim=1) for shared in common]
        pictures.append(PatchFeatures(tuple(rows), grids))
    return pictures


@torch.inference_mode()
def matching_stages(config: Config, folder: Path) -> dict[str, float]:
    """Seconds a pair for each stage, for the whole in memory, and for the plain reference."""
    pictures = related_pictures(config, 6)
    query, candidates = pictures[0], pictures[1:]
    weights = config.feature_match.patchweights2use
    pairs = [
        (query.descriptors[scale], candidate.descriptors[scale], grid)
        for candidate in candidates
        for scale, grid in enumerate(query.grids)
    ]
    count = len(candidates)
    found = [mutual_matches(first, second) for first, second, _ in pairs]
    matcher = MATCHERS[config.feature_match.matcher]
    stages = {
        "similarity": median_seconds(lambda: [first @ second.T for first, second, _ in pairs]) / count,
        "matches": median_seconds(lambda: [mutual_matches(first, second) for first, second, _ in pairs]) / count,
    }
    for name, scoring in MATCHERS.items():
        stages[name] = (
            median_seconds(lambda: [scoring(m, g, g) for m, (_, _, g) in zip(found, pairs, strict=True)]) / count  # noqa: B023
        )
    stages["fusion"] = median_seconds(lambda: fuse(np.random.default_rng(0).random((100, len(weights))), weights))
    stages["whole"] = median_seconds(lambda: rerank(query, candidates, weights, matcher)) / count
    stages["reference"] = median_seconds(lambda: [plain_pair(query, other) for other in candidates], 2) / count
    names = [f"p{index}" for index in range(len(pictures))]
    model = PlaceModel("vgg16", "patchnetvlad", 16, 0, config.global_params.patch_sizes, config.global_params.strides)
    header = replace(store_header(model, names), num_dims=config.global_params.num_pcs)
    with FeatureWriter(folder / "read", header, overwrite=True) as writer:
        for index, picture in enumerate(pictures):
            writer.write(index, picture.descriptors[0][0], picture)
        writer.finish()

    def read_all() -> None:
        with FeatureStore.open(folder / "read", names, names, header) as store:
            for index in range(len(names)):
                store.patches(index)

    stages["read"] = median_seconds(read_all) / len(names)
    return stages


def plain_pair(query: PatchFeatures, reference: PatchFeatures) -> list[float]:
    """One pair as the formulas read: distances of unit vectors, arg-min in both directions, a loop over matches."""
    scores = []
    for rows, others, grid in zip(query.descriptors, reference.descriptors, query.grids, strict=True):
        distances = (2 - 2 * (rows @ others.T)).clamp(min=0).sqrt()
        forward, backward = distances.argmin(dim=1), distances.argmin(dim=0)
        matched = [(i, int(j)) for i, j in enumerate(forward) if backward[j] == i]
        indices = grid.indices()
        moved = [(indices[j] - indices[i]).tolist() for i, j in matched]
        mean = np.mean(moved, axis=0) if moved else np.zeros(2)
        total = sum(
            sum((m - abs(d - c)) ** 2 for m, d, c in zip(grid.max_index, move, mean, strict=True)) for move in moved
        )
        scores.append(float(total) / len(grid))
    return scores


def retrieval_times(dims: int, sizes: list[int]) -> dict[int, float]:
    """Seconds a query of exact search among so many vectors, 64 queries at once."""
    times = {}
    for size in sizes:
        database = np.random.default_rng(0).standard_normal((size, dims), dtype=np.float32)
        times[size] = median_seconds(lambda: retrieve(database[:64], database, 100), 3) / 64  # noqa: B023
    return times


def floors(config: Config, rate: float) -> dict[str, float]:
    """Seconds of the matrix products alone at a measured rate: WPCA a picture, similarities a pair."""
    model = PlaceModel("vgg16", "patchnetvlad", 16, 0, config.global_params.patch_sizes, config.global_params.strides)
    counts = [len(grid) for grid in model.grids(30, 40)]
    dims = config.global_params.num_pcs
    return {
        "wpca": 2 * sum(counts) * 8192 * dims / rate,
        "similarity": sum(2 * n * n * dims for n in counts) / rate,
    }


@contextmanager
def synthetic_pictures(folder: Path, count: int) -> Iterator[list[Path]]:
    """Copies of an example picture under names of their own."""
    source = shipped_folder("example_images") / "database/place00_0.jpg"
    folder.mkdir()
    paths = [folder / f"picture{index}.jpg" for index in range(count)]
    with Image.open(source) as picture:
        for path in paths:
            picture.save(path)
    yield paths


def machine() -> dict[str, str | int]:
    """What the figures belong to."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "patchnetvlad": patchnetvlad.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "faiss": faiss.__version__,
    }


def plot(results: dict, path: Path) -> None:
    """Stages of each preset as stacked bars, beside the floor of its matrix products."""
    presets = list(results["presets"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    kinds = [
        ("extraction", ("encode", "pool", "wpca"), "a picture"),
        ("matching", ("matches", "scoring"), "a pair"),
    ]
    for axes, (kind, stages, unit) in zip(figure.subplots(1, 2), kinds, strict=True):
        left = np.zeros(len(presets))
        for stage, colour in zip(stages, ("#3b6ea8", "#e0a030", "#5aa469"), strict=False):
            values = np.array([results["presets"][name][kind][stage] for name in presets]) * 1000
            axes.barh(presets, values, left=left, label=stage, color=colour)
            left += values
        whole = [results["presets"][name][kind]["whole"] * 1000 for name in presets]
        axes.plot(whole, presets, "k|", markersize=18, markeredgewidth=2, label="whole, overlapped")
        floor = [results["presets"][name][kind]["floor"] * 1000 for name in presets]
        axes.plot(floor, presets, "r|", markersize=18, markeredgewidth=2, label="floor")
        axes.set_xlabel(f"milliseconds {unit}")
        if kind == "matching":
            axes.set_xscale("log")
        axes.invert_yaxis()
        axes.legend(fontsize=7, frameon=False)
        axes.set_title(kind)
    figure.savefig(path, dpi=150)


def table(results: dict) -> str:
    """The results as Markdown."""
    who = results["machine"]
    versions = ", ".join(f"{key} {who[key]}" for key in ("patchnetvlad", "torch", "numpy", "opencv", "faiss"))
    lines = [
        f"{who['processor']}, {who['cores']} cores, {who['threads']} threads; {versions}.",
        f"Matrix product in float32: {results['gflops']:.0f} GFLOP/s.",
        "",
    ]
    for kind, unit, scale in (("extraction", "seconds a picture", 1.0), ("matching", "milliseconds a pair", 1000.0)):
        columns = list(next(iter(results["presets"].values()))[kind])
        lines += [f"{kind.capitalize()}, {unit}:", "", "| preset | " + " | ".join(columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for preset, values in results["presets"].items():
            cells = [f"{values[kind][column] * scale:.3g}" for column in columns]
            lines.append(f"| {preset} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["Exact retrieval, 512 dimensions, 100 candidates, milliseconds a query:", ""]
    sizes = results["retrieval"]
    lines.append("| pictures | " + " | ".join(f"{int(size):,}" for size in sizes) + " |")
    lines.append("|---" * (len(sizes) + 1) + "|")
    lines.append("| time | " + " | ".join(f"{1000 * seconds:.3g}" for seconds in sizes.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["performance", "speed", "storage"])
    parser.add_argument("--pictures", type=int, default=10, help="pictures extracted for the overlapped time")
    parser.add_argument("--database_sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    rate = product_rate(1131, 4096, 1131)
    results: dict = {"machine": machine(), "gflops": rate / 1e9, "presets": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with synthetic_pictures(folder / "pictures", args.pictures) as pictures:
            for preset in args.presets:
                config = load_config(require_file(f"{preset}.ini", "configs"))
                extraction = extraction_stages(config, pictures, folder)
                matching = matching_stages(config, folder)
                matching["scoring"] = matching[config.feature_match.matcher]
                floor = floors(config, rate)
                extraction["floor"] = extraction["encode"] + floor["wpca"]
                matching["floor"] = floor["similarity"]
                results["presets"][preset] = {"extraction": extraction, "matching": matching}
                print(preset, json.dumps(results["presets"][preset], indent=1), flush=True)
    results["retrieval"] = {str(size): value for size, value in retrieval_times(512, args.database_sizes).items()}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "stages.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "stages.md").write_text(table(results))
    plot(results, args.output / "stages.png")
    print(table(results))


if __name__ == "__main__":
    main()
