#!/usr/bin/env python3
"""Time every stage of extraction beside the machine's own floor, and exact retrieval.

    python benchmarks/stages.py --presets performance speed storage --output benchmarks

writes stages.json, stages.md and stages.png. Weights are random: they change no time. A quiet machine is assumed.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import faiss
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import patchnetvlad
from patchnetvlad.config import Config
from patchnetvlad.image_lists import ImageList
from patchnetvlad.images import image_batches, prepare_image, read_image
from patchnetvlad.ini import load_config
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_netvlad import patch_descriptors
from patchnetvlad.paths import require_file, shipped_folder
from patchnetvlad.products import KeptWeight
from patchnetvlad.retrieval import DatabaseIndex
from patchnetvlad.store.manifest import StoreHeader
from patchnetvlad.store.writing.feature_writer import FeatureWriter
from patchnetvlad.workers import PICTURE_MEMORY, keep_freed_memory

REPEATS = 5
COSINE = "cosine, bfloat16"
MAP_SIZE = (30, 40)  # of 640×480 pictures


def seconds_of(work: Callable[[], object], repeats: int) -> list[float]:
    """Times of some calls after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of a call."""
    return float(np.median(seconds_of(work, repeats)))


def least_seconds(work: Callable[[], object], repeats: int = 15) -> float:
    """Least time of a call: what the machine can do when nothing disturbs it."""
    return min(seconds_of(work, repeats))


def product_rate(rows: int, inner: int, columns: int) -> float:
    """Measured rate of a float32 product with a kept weight of these sizes, in FLOP/s."""
    kept, left, weight, bias = KeptWeight(), torch.randn(rows, inner), torch.randn(columns, inner), torch.zeros(columns)
    return 2 * rows * inner * columns / least_seconds(lambda: kept.product(left, weight, bias))


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
    header, names = store_header(model), listed([path.stem for path in pictures])
    with FeatureWriter(folder / "stages", names, header, overwrite=True) as writer:
        started = time.perf_counter()
        for index in range(len(pictures)):
            writer.write(index, described.global_[0], described.picture(0))
        writer.finish()
        stages["write"] = (time.perf_counter() - started) / len(pictures)
    batch = config.feature_extract.cachebatchsize
    with FeatureWriter(folder / "whole", names, header, overwrite=True) as writer:
        started = time.perf_counter()
        for indices, tensors in image_batches(pictures, 480, 640, batch, 2):
            for position, index in enumerate(indices):
                single = model.describe(tensors[position : position + 1])
                writer.write(index, single.global_[0], single.picture(0))
        writer.finish()
        stages["whole"] = (time.perf_counter() - started) / len(pictures)
    exact = model.describe(picture)
    model.precision = "bfloat16"
    stages["describe, bfloat16"] = median_seconds(lambda: model.describe(picture), 3)
    rough = model.describe(picture)
    stages[COSINE] = min(map(centred_cosine, exact.patches, rough.patches))
    return stages


def centred_cosine(exact: torch.Tensor, rough: torch.Tensor) -> float:
    """Median cosine of descriptors after their common mean, which random weights make large, is taken off."""
    mean = exact.mean(dim=1, keepdim=True)
    return float(F.cosine_similarity(exact - mean, rough - mean, dim=-1).median())


def store_header(model: PlaceModel) -> StoreHeader:
    return StoreHeader("", {}, model.output_dims, model.patch_sizes, model.strides, model.geometry)


def listed(names: Sequence[str]) -> ImageList:
    return ImageList(tuple(names), tuple(map(Path, names)), tuple(names), Path("pictures.txt"))


@torch.inference_mode()
def growth(pictures: list[Path]) -> dict[str, float]:
    """Seconds to extract so many pictures with speed.ini."""
    model = random_model(load_config(require_file("speed.ini", "configs")))

    def extract(count: int) -> None:
        for _, tensors in image_batches((pictures * count)[:count], 480, 640, 1, 2):
            model.describe(tensors)

    return {str(n): median_seconds(lambda: extract(n), 2) for n in (1, 2, 5, 10)}  # noqa: B023


def retrieval_times(dims: int, sizes: list[int]) -> dict[int, float]:
    """Seconds a query of exact search among so many vectors, 64 queries at once."""
    times = {}
    for size in sizes:
        database = np.random.default_rng(0).standard_normal((size, dims), dtype=np.float32)
        times[size] = median_seconds(lambda: DatabaseIndex(database).search(database[:64], 100), 3) / 64  # noqa: B023
    return times


def projection_floor(config: Config, rate: float) -> float:
    """Seconds a picture of the WPCA product alone, at a measured rate."""
    model = PlaceModel("vgg16", "patchnetvlad", 16, 0, config.global_params.patch_sizes, config.global_params.strides)
    rows = sum(len(grid) for grid in model.grids(*MAP_SIZE))
    return 2 * rows * 8192 * config.global_params.num_pcs / rate


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
    """Stages of each preset as stacked bars beside the floor of its matrix products, and how time grows."""
    presets = list(results["presets"])
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    first, second, third = figure.subplots(1, 3)
    left = np.zeros(len(presets))
    for stage, colour in zip(("encode", "pool", "wpca"), ("#3b6ea8", "#e0a030", "#5aa469"), strict=True):
        values = np.array([results["presets"][name][stage] for name in presets])
        first.barh(presets, values, left=left, label=stage, color=colour)
        left += values
    for column, mark, label in (("whole", "k|", "whole"), ("floor", "r|", "float32 floor")):
        times = [results["presets"][name][column] for name in presets]
        first.plot(times, presets, mark, markersize=22, markeredgewidth=2, label=label)
    first.set(title="extraction", xlabel="seconds a picture")
    first.margins(y=0.25)
    first.invert_yaxis()
    first.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))

    def line(axes: Axes, times: dict[str, float], scale: float = 1.0) -> None:
        axes.plot([int(n) for n in times], [scale * seconds for seconds in times.values()], "o-")
        axes.grid(alpha=0.3)

    line(second, results["growth"])
    second.set(title="extraction, speed.ini", xlabel="pictures", ylabel="seconds", ylim=(0, None))
    line(third, results["retrieval"], 1000)
    third.set(title="exact retrieval, 512 dimensions", xlabel="pictures", ylabel="milliseconds a query")
    third.set(xscale="log", yscale="log")
    figure.savefig(path, dpi=110)


def table(results: dict) -> str:
    """The results as Markdown."""
    who = results["machine"]
    versions = ", ".join(f"{key} {who[key]}" for key in ("patchnetvlad", "torch", "numpy", "opencv", "faiss"))
    columns = list(next(iter(results["presets"].values())))
    lines = [
        f"{who['processor']}, {who['cores']} cores, {who['threads']} threads; {versions}.",
        f"Product with a kept weight: {results['gflops']:.0f} GFLOP/s in float32.",
        "",
        "Extraction, seconds a picture:",
        "",
        "| preset | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for preset, values in results["presets"].items():
        cells = [f"{values[column]:.{6 if column == COSINE else 3}g}" for column in columns]
        lines.append(f"| {preset} | {' | '.join(cells)} |")
    for title, times, scale in (
        ("Exact retrieval, 512 dimensions, 100 candidates, milliseconds a query, by pictures", "retrieval", 1000),
        ("Extraction with speed.ini, seconds for so many pictures", "growth", 1),
    ):
        sizes = results[times]
        lines += ["", f"{title}:", "", "| " + " | ".join(f"{int(size):,}" for size in sizes) + " |"]
        lines += ["|---" * len(sizes) + "|"]
        lines.append("| " + " | ".join(f"{scale * seconds:.3g}" for seconds in sizes.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["performance", "speed", "storage"])
    parser.add_argument("--pictures", type=int, default=10, help="pictures extracted for the overlapped time")
    parser.add_argument("--database_sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    keep_freed_memory(*PICTURE_MEMORY)  # as extraction does
    rate = product_rate(2826, 8192, 4096)  # as performance.ini has it
    results: dict = {"machine": machine(), "gflops": rate / 1e9, "presets": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with synthetic_pictures(folder / "pictures", args.pictures) as pictures:
            for preset in args.presets:
                config = load_config(require_file(f"{preset}.ini", "configs"))
                stages = extraction_stages(config, pictures, folder)
                stages["floor"] = stages["encode"] + projection_floor(config, rate)
                results["presets"][preset] = stages
                print(preset, json.dumps(stages, indent=1), flush=True)
            results["growth"] = growth(pictures)
    results["retrieval"] = {str(size): value for size, value in retrieval_times(512, args.database_sizes).items()}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "stages.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "stages.md").write_text(table(results))
    plot(results, args.output / "stages.png")
    print(table(results))


if __name__ == "__main__":
    main()
