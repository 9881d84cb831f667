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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.image_lists import ImageList
from patchnetvlad.images import image_batches, prepare_image, read_image
from patchnetvlad.ini import load_config
from patchnetvlad.matching import Matches
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_netvlad import patch_descriptors, window_sums
from patchnetvlad.paths import require_file, shipped_folder
from patchnetvlad.reranking import MATCHERS, fuse, match_pair, rerank
from patchnetvlad.retrieval import DatabaseIndex
from patchnetvlad.store.feature_header import StoreHeader
from patchnetvlad.store.feature_store import FeatureStore
from patchnetvlad.store.feature_writer import FeatureWriter

REPEATS = 5
NO_TIMES = ("differing matches", "cosine, bfloat16")
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
    """Measured rate of a float32 matrix product of these sizes, in FLOP/s."""
    first, second = torch.randn(rows, inner), torch.randn(inner, columns)
    return 2 * rows * inner * columns / least_seconds(lambda: first @ second)


def int8_rate(rows: int, inner: int, columns: int) -> float:
    """Measured rate of an int8 matrix product of these sizes, in operations a second."""
    first, second = (torch.randint(-127, 127, (n, inner), dtype=torch.int8) for n in (rows, columns))
    return 2 * rows * inner * columns / least_seconds(lambda: torch._int_mm(first, second.T))


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
    stages["cosine, bfloat16"] = min(map(centred_cosine, exact.patches, rough.patches))
    return stages


def centred_cosine(exact: torch.Tensor, rough: torch.Tensor) -> float:
    """Median cosine of descriptors after their common mean, which random weights make large, is taken off."""
    mean = exact.mean(dim=1, keepdim=True)
    return float(F.cosine_similarity(exact - mean, rough - mean, dim=-1).median())


def store_header(model: PlaceModel) -> StoreHeader:
    return StoreHeader("", {}, model.output_dims, model.patch_sizes, model.strides, model.geometry)


def listed(names: Sequence[str]) -> ImageList:
    return ImageList(tuple(names), tuple(map(Path, names)), tuple(names), Path("pictures.txt"))


def overlapping_pictures(config: Config, count: int, dims: int | None = None) -> list[PatchFeatures]:
    """Descriptors with the statistics that matter for time: patches that overlap are alike, as means of one random
    field over windows, and similarities spread as those of fully whitened RootSIFT, which half as many directions as
    dimensions give. Picture 1 shows the place of picture 0, the others are of other places."""
    params = config.global_params
    dims = dims or params.num_pcs
    model = PlaceModel("vgg16", "patchnetvlad", 16, 0, params.patch_sizes, params.strides)
    grids = model.grids(*MAP_SIZE)
    generator = torch.Generator().manual_seed(1)
    pictures = []
    directions = torch.randn(dims // 2, dims, generator=generator)
    shared = torch.randn(*MAP_SIZE, dims // 2, generator=generator)
    for number in range(count):
        field = torch.randn(*MAP_SIZE, dims // 2, generator=generator)
        field = (field + shared if number < 2 else field) @ directions
        rows = []
        for size, stride in zip(params.patch_sizes, params.strides, strict=True):
            sums = window_sums(window_sums(field, size, stride, 1), size, stride, 0)
            rows.append(F.normalize(sums.flatten(0, 1), dim=1))
        pictures.append(PatchFeatures(tuple(rows), grids))
    return pictures


def check_differences(query: torch.Tensor, reference: torch.Tensor, first: Matches, second: Matches) -> int:
    """How many matches two ways of matching do not share; each must be a tie within the rounding of float32."""
    either = set(zip(*(side.tolist() for side in (first.query, first.reference)), strict=True))
    either ^= set(zip(*(side.tolist() for side in (second.query, second.reference)), strict=True))
    similarity = query.double() @ reference.double().T
    for row, column in either:
        gaps = [float(-line.topk(2).values.diff()) for line in (similarity[row], similarity[:, column])]
        assert min(gaps) < 1e-6, f"match {row}, {column} differs though it is clear by {min(gaps):.2g}"
    return len(either)


@torch.inference_mode()
def matching_stages(config: Config, folder: Path) -> dict[str, float]:
    """Seconds a pair for each stage, for the whole in memory, and for the plain reference."""
    pictures = overlapping_pictures(config, 6)
    query, candidates = pictures[0], pictures[1:]
    rounded_query = query.round_as("query")
    rounded = [candidate.round_as("reference") for candidate in candidates]
    weights = config.feature_match.patchweights2use
    name = config.feature_match.matcher
    pairs = [
        (query.descriptors[scale], candidate.descriptors[scale])
        for candidate in candidates
        for scale in range(len(query.grids))
    ]
    count, sizes = len(candidates), len(query.grids)
    float32_matches = [match_pair(query, candidate) for candidate in candidates]
    differing = 0
    for candidate, eight, exact in zip(
        candidates, [match_pair(rounded_query, reference) for reference in rounded], float32_matches, strict=True
    ):
        for scale, (first, second) in enumerate(zip(eight, exact, strict=True)):
            differing += check_differences(query.descriptors[scale], candidate.descriptors[scale], first, second)

    def score(matcher: str) -> None:
        for matches in float32_matches:
            MATCHERS[matcher].score(matches, query.grids, query.grids, torch.device("cpu"))

    stages = {
        "similarity": median_seconds(lambda: [first @ second.T for first, second in pairs]) / count,
        "matches": median_seconds(lambda: [match_pair(query, candidate) for candidate in candidates]) / count,
        "rounding": median_seconds(lambda: [candidate.round_as("reference") for candidate in candidates]) / count,
        "matches, 8 bits": median_seconds(lambda: [match_pair(rounded_query, other) for other in rounded]) / count,
    }
    stages |= {matcher: median_seconds(lambda: score(matcher)) / count for matcher in MATCHERS}  # noqa: B023
    stages["fusion"] = median_seconds(lambda: fuse(np.random.default_rng(0).random((100, sizes)), weights)) / 100
    matcher = MATCHERS[name]
    stages["whole, float32"] = median_seconds(lambda: rerank(query, candidates, weights, matcher)) / count
    stages["whole, 8 bits"] = median_seconds(lambda: rerank(rounded_query, rounded, weights, matcher)) / count
    stages["reference"] = median_seconds(lambda: [plain_pair(query, other, name) for other in candidates], 2) / count
    stages["differing matches"] = differing
    names = listed([f"p{index}" for index in range(len(pictures))])
    model = PlaceModel("vgg16", "patchnetvlad", 16, 0, config.global_params.patch_sizes, config.global_params.strides)
    header = replace(store_header(model), num_dims=config.global_params.num_pcs)
    with FeatureWriter(folder / "read", names, header, overwrite=True) as writer:
        for index, picture in enumerate(pictures):
            writer.write(index, picture.descriptors[0][0], picture)
        writer.finish()

    def read_all() -> None:
        with FeatureStore.open(folder / "read", names, header) as store:
            for index in range(len(names)):
                store.patches(index)

    stages["read"] = median_seconds(read_all) / len(names)
    return stages


def plain_pair(query: PatchFeatures, reference: PatchFeatures, matcher: str) -> list[float]:
    """One pair as the formulas read: distances of unit vectors, arg-min in both directions, a loop over matches or
    OpenCV's homography."""
    scores = []
    for rows, others, grid in zip(query.descriptors, reference.descriptors, query.grids, strict=True):
        distances = (2 - 2 * (rows @ others.T)).clamp(min=0).sqrt()
        forward, backward = distances.argmin(dim=1), distances.argmin(dim=0)
        matched = [(i, int(j)) for i, j in enumerate(forward) if backward[j] == i]
        indices, centers = grid.indices(), grid.centers()
        if matcher == "RANSAC":
            query_rows, reference_rows = zip(*matched, strict=True)
            points = centers[list(reference_rows)].numpy(), centers[list(query_rows)].numpy()
            _, mask = cv2.findHomography(*points, cv2.RANSAC, 1.5 * grid.pitch_pixels)
            scores.append(float(mask.sum()) / len(grid))
            continue
        moved = [(indices[j] - indices[i]).tolist() for i, j in matched]
        mean = np.mean(moved, axis=0) if moved else np.zeros(2)
        total = sum(
            sum((m - abs(d - c)) ** 2 for m, d, c in zip(grid.max_index, move, mean, strict=True)) for move in moved
        )
        scores.append(float(total) / len(grid))
    return scores


@torch.inference_mode()
def curves(pictures: list[Path]) -> dict[str, dict[str, float]]:
    """How time grows: seconds to extract n pictures, to re-rank n candidates of a query, to match a pair of n
    dimensions."""
    speed, performance = (load_config(require_file(f"{name}.ini", "configs")) for name in ("speed", "performance"))
    model = random_model(speed)

    def extract(count: int) -> None:
        for _, tensors in image_batches((pictures * count)[:count], 480, 640, 1, 2):
            model.describe(tensors)

    query, *others = overlapping_pictures(speed, 11)
    weights, matcher = speed.feature_match.patchweights2use, MATCHERS[speed.feature_match.matcher]
    by_dims, by_dims_rounded = {}, {}
    for dims in (128, 256, 512, 1024, 2048, 4096):
        pair = overlapping_pictures(performance, 3, dims)[1:]
        rounded = pair[0].round_as("query"), pair[1].round_as("reference")
        by_dims[str(dims)] = median_seconds(lambda: match_pair(*pair))  # noqa: B023
        by_dims_rounded[str(dims)] = median_seconds(lambda: match_pair(*rounded))  # noqa: B023
    return {
        "pictures": {str(n): median_seconds(lambda: extract(n), 2) for n in (1, 2, 5, 10)},  # noqa: B023
        "candidates": {
            str(n): median_seconds(lambda: rerank(query, (others * n)[:n], weights, matcher), 3)  # noqa: B023
            for n in (1, 5, 10, 25, 50, 100)
        },
        "dimensions, float32": by_dims,
        "dimensions, 8 bits": by_dims_rounded,
    }


def retrieval_times(dims: int, sizes: list[int]) -> dict[int, float]:
    """Seconds a query of exact search among so many vectors, 64 queries at once."""
    times = {}
    for size in sizes:
        database = np.random.default_rng(0).standard_normal((size, dims), dtype=np.float32)
        times[size] = median_seconds(lambda: DatabaseIndex(database).search(database[:64], 100), 3) / 64  # noqa: B023
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
    """Stages of each preset as stacked bars beside the floor of its matrix products, and how time grows."""
    presets = list(results["presets"])
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    (first, second, third), (fourth, fifth, sixth) = figure.subplots(2, 3)
    kinds = [
        (first, "extraction", ("encode", "pool", "wpca"), "whole", 1, "seconds a picture"),
        (second, "matching", ("matches, 8 bits", "scoring"), "whole, 8 bits", 1000, "milliseconds a pair"),
    ]
    for axes, kind, stages, whole, scale, unit in kinds:
        left = np.zeros(len(presets))
        for stage, colour in zip(stages, ("#3b6ea8", "#e0a030", "#5aa469"), strict=False):
            values = np.array([results["presets"][name][kind][stage] for name in presets]) * scale
            axes.barh(presets, values, left=left, label=stage, color=colour)
            left += values
        for column, mark, label in (
            (whole, "k|", "whole"),
            ("reference", "b|", "plain"),
            ("floor", "r|", "float32 floor"),
        ):
            times = [results["presets"][name][kind].get(column) for name in presets]
            if None not in times:
                axes.plot(np.array(times) * scale, presets, mark, markersize=22, markeredgewidth=2, label=label)
        axes.set_xlabel(unit)
        axes.set_title(kind)
        if kind == "matching":
            axes.set_xscale("log")
        axes.margins(y=0.25)
        axes.invert_yaxis()
        axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))

    def line(axes: Axes, times: dict[str, float], label: str = "", scale: float = 1.0) -> None:
        axes.plot([int(n) for n in times], [scale * seconds for seconds in times.values()], "o-", label=label)

    grown = results["curves"]
    line(third, grown["pictures"])
    third.set(title="extraction, speed.ini", xlabel="pictures", ylabel="seconds", ylim=(0, None))
    line(fourth, grown["candidates"])
    fourth.set(title="re-ranking, speed.ini", xlabel="candidates", ylabel="seconds a query", ylim=(0, None))
    line(fifth, grown["dimensions, float32"], "float32", 1000)
    line(fifth, grown["dimensions, 8 bits"], "8 bits, checked", 1000)
    fifth.set(title="matches, patches 2, 5, 8", xlabel="dimensions", ylabel="milliseconds a pair", ylim=(0, None))
    fifth.legend(frameon=False)
    line(sixth, results["retrieval"], scale=1000)
    sixth.set(title="exact retrieval, 512 dimensions", xlabel="pictures", ylabel="milliseconds a query")
    sixth.set(xscale="log", yscale="log")
    for axes in (third, fourth, fifth, sixth):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def table(results: dict) -> str:
    """The results as Markdown."""
    who = results["machine"]
    versions = ", ".join(f"{key} {who[key]}" for key in ("patchnetvlad", "torch", "numpy", "opencv", "faiss"))
    lines = [
        f"{who['processor']}, {who['cores']} cores, {who['threads']} threads; {versions}.",
        f"Matrix product: {results['gflops']:.0f} GFLOP/s in float32, {results['gops_int8']:.0f} GOP/s in int8.",
        "",
    ]
    for kind, unit, scale in (("extraction", "seconds a picture", 1.0), ("matching", "milliseconds a pair", 1000.0)):
        columns = list(next(iter(results["presets"].values()))[kind])
        lines += [f"{kind.capitalize()}, {unit}:", "", "| preset | " + " | ".join(columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for preset, values in results["presets"].items():
            cells = [
                f"{values[kind][column]:.6g}" if column in NO_TIMES else f"{values[kind][column] * scale:.3g}"
                for column in columns
            ]
            lines.append(f"| {preset} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["Exact retrieval, 512 dimensions, 100 candidates, milliseconds a query:", ""]
    sizes = results["retrieval"]
    lines.append("| pictures | " + " | ".join(f"{int(size):,}" for size in sizes) + " |")
    lines.append("|---" * (len(sizes) + 1) + "|")
    lines.append("| time | " + " | ".join(f"{1000 * seconds:.3g}" for seconds in sizes.values()) + " |")
    units = {
        "pictures": "Extraction with speed.ini, seconds for so many pictures",
        "candidates": "Re-ranking with speed.ini, milliseconds a query for so many candidates",
        "dimensions, float32": "Matches at patch sizes 2, 5, 8 in float32, milliseconds a pair by dimensions",
        "dimensions, 8 bits": "The same by 8-bit products, checked in float32",
    }
    for name, title in units.items():
        times = results["curves"][name]
        scale = 1 if name == "pictures" else 1000
        lines += ["", f"{title}:", "", "| " + " | ".join(times) + " |", "|---" * len(times) + "|"]
        lines.append("| " + " | ".join(f"{scale * seconds:.3g}" for seconds in times.values()) + " |")
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
    results["gops_int8"] = int8_rate(1131, 4096, 1131) / 1e9
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
            results["curves"] = curves(pictures)
    results["retrieval"] = {str(size): value for size, value in retrieval_times(512, args.database_sizes).items()}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "stages.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "stages.md").write_text(table(results))
    plot(results, args.output / "stages.png")
    print(table(results))


if __name__ == "__main__":
    main()
