#!/usr/bin/env python3
"""Time matching beside one float32 product of its sizes, alone and beside a busy process.

    python benchmarks/matching.py --output benchmarks

writes matching.json, matching.md and matching.png. Features come from the example pictures and a model fitted on
them: VGG16 with drawn weights, clusters and WPCA of the pictures, so that nearest patches stand out as they do with a
trained model; builtin.ini has one.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from patchnetvlad.clustering import find_clusters
from patchnetvlad.config import MATCHERS, Config
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.ini import load_config
from patchnetvlad.matching import WAYS, Prepared, rounding_works
from patchnetvlad.model import PlaceModel
from patchnetvlad.model_fitting import initialise_pool, picture_batches, sample_descriptors
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_rounding import approximate_similarities
from patchnetvlad.paths import require_file, shipped_folder
from patchnetvlad.ranking import MOST_A_THREAD
from patchnetvlad.reranking import match_pair, rerank
from patchnetvlad.weights import load_model
from patchnetvlad.whitening import WPCAFit, fit_wpca
from patchnetvlad.workers import Workers

CLUSTERS = 16
SAMPLES = 5000  # patch descriptors that WPCA is fitted on; more than its 4,096 dimensions
SIZES = (2, 5, 8)  # of the patches among them
CPU = torch.device("cpu")
COMPANIES = ("Alone", "Beside a process that keeps one core busy")
LABELS = {
    "8 bits": "8-bit products, checked",
    "float32": "float32",
    "product": "one float32 product",
    "plain": "formulas as they read",
}
WHOLES = tuple(LABELS)


@dataclass(frozen=True)
class Job:
    """One query and its candidates at a preset, in float32 and in 8 bits."""

    config: Config
    query: PatchFeatures
    candidates: list[PatchFeatures]
    rounded_query: PatchFeatures
    rounded: list[PatchFeatures]


def example_pictures() -> tuple[list[Path], list[Path]]:
    """Queries and database pictures of the rendered places."""
    root = shipped_folder("example_images")
    return sorted((root / "queries").glob("*.jpg")), sorted((root / "database").glob("*.jpg"))


@cache
def fit_on_examples() -> tuple[PlaceModel, WPCAFit]:
    """A model without projection, and one for as many dimensions as performance.ini has."""
    config = load_config(require_file("performance.ini", "configs"))
    queries, database = example_pictures()
    torch.manual_seed(0)
    model = PlaceModel("vgg16", "patchnetvlad", CLUSTERS, 0, SIZES, (1,) * len(SIZES)).eval()
    for layer in model.encoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def pictures(label: str) -> Iterator[torch.Tensor]:
        return picture_batches(config, queries + database, CPU, True, label)

    assert isinstance(model.pool, NetVLAD)
    initialise_pool(model.pool, find_clusters(model.encoder, pictures("clusters"), CLUSTERS, 0))
    samples = sample_descriptors(
        model, pictures("descriptors"), len(queries + database), config.global_params.num_pcs, 0
    )
    chosen = np.random.default_rng(0).permutation(len(samples))[:SAMPLES]
    return model, fit_wpca(samples[chosen], config.global_params.num_pcs)


def project(model: PlaceModel, fit: WPCAFit, config: Config) -> PlaceModel:
    """The model with a preset's patch sizes and the first of the fitted dimensions."""
    params, dims = config.global_params, config.global_params.num_pcs
    model.patch_sizes, model.strides = params.patch_sizes, params.strides
    kept = fit.weight[:dims], fit.bias[:dims], fit.eigenvalues[:dims], fit.directions[:, :dims]
    model.add_wpca(replace(fit, weight=kept[0], bias=kept[1], eigenvalues=kept[2], directions=kept[3]))
    return model


def make_job(preset: str, count: int) -> Job:
    """Features of a preset; the first candidates show the query's place."""
    config = load_config(require_file(f"{preset}.ini", "configs"))
    model = load_model(config)[0] if preset == "builtin" else project(*fit_on_examples(), config)
    queries, database = example_pictures()
    batches = picture_batches(config, [queries[0], *database[:count]], CPU, True, preset)
    query, *candidates = [model.describe(picture[None]).picture(0) for batch in batches for picture in batch]
    rounded = [candidate.round_as("reference") for candidate in candidates]
    return Job(config, query, candidates, query.round_as("query"), rounded)


@contextmanager
def one_thread() -> Iterator[None]:
    """What runs inside runs on one core, as a pair does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def busy_process() -> Iterator[None]:
    """Beside this one, a process that never rests."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def least_seconds(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least time of each, all tried in turn, so that what slows the machine down slows all."""
    seconds: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn:
                seconds[name] = min(seconds.get(name, np.inf), time.perf_counter() - started)
    return seconds


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


def whole_times(job: Job, workers: Workers, repeats: int) -> dict[str, float]:
    """Seconds a pair of re-ranking in both ways, of the float32 products alone, and of the formulas as they read."""
    options, all_of_them = job.config.feature_match, range(len(job.candidates))
    weights, matcher = options.patchweights2use, MATCHERS[options.matcher]

    def products() -> None:
        for candidate in job.candidates:
            for rows, others in zip(job.query.descriptors, candidate.descriptors, strict=True):
                rows @ others.T

    works: dict[str, Callable[[], object]] = {
        "product": products,
        "8 bits": lambda: rerank(
            job.rounded_query, all_of_them, job.rounded.__getitem__, weights, matcher, MOST_A_THREAD, workers.map
        ),
        "float32": lambda: rerank(
            job.query, all_of_them, job.candidates.__getitem__, weights, matcher, MOST_A_THREAD, workers.map
        ),
        "plain": lambda: [plain_pair(job.query, candidate, options.matcher) for candidate in job.candidates],
    }
    return {name: value / len(job.candidates) for name, value in least_seconds(works, repeats).items()}


def part_times(job: Job, repeats: int) -> dict[str, float]:
    """Seconds of one core a pair: the 8-bit products, the rest of matching, the scores; and rounding a candidate."""
    options, all_of_them = job.config.feature_match, range(len(job.candidates))
    weights, matcher = options.patchweights2use, MATCHERS[options.matcher]

    def products() -> None:
        for candidate in job.rounded:
            for rows, others in zip(job.rounded_query.rounded, candidate.rounded, strict=True):
                approximate_similarities(rows, others)

    works: dict[str, Callable[[], object]] = {
        "8-bit products": products,
        "matches": lambda: [match_pair(job.rounded_query, candidate) for candidate in job.rounded],
        "whole": lambda: rerank(job.rounded_query, all_of_them, job.rounded.__getitem__, weights, matcher),
        "rounding": lambda: [candidate.round_as("reference") for candidate in job.candidates],
    }
    with one_thread():
        least = {name: value / len(job.rounded) for name, value in least_seconds(works, repeats).items()}
    return {
        "8-bit products": least["8-bit products"],
        "comparisons": least["matches"] - least["8-bit products"],
        "scores": least["whole"] - least["matches"],
        "rounding": least["rounding"],
    }


def differing_matches(job: Job) -> int:
    """Matches that are not those of float32, over all candidates; 0 or the ways do not agree."""
    differing = 0
    for candidate, rounded in zip(job.candidates, job.rounded, strict=True):
        for query_rows, reference_rows, eight in zip(
            job.query.descriptors, candidate.descriptors, match_pair(job.rounded_query, rounded), strict=True
        ):
            exact = WAYS["float32"].match(Prepared(query_rows), Prepared(reference_rows))
            pairs = [
                set(zip(matches.query.tolist(), matches.reference.tolist(), strict=True)) for matches in (eight, exact)
            ]
            differing += len(pairs[0] ^ pairs[1])
    return differing


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as Markdown, in milliseconds a pair."""
    lines = []
    for company in COMPANIES:
        lines += [f"{company}:", "", "| preset | " + " | ".join(WHOLES) + " | fastest / product |", "|---" * 6 + "|"]
        for preset, measured in results.items():
            times = measured[company]
            cells = " | ".join(f"{1000 * times[name]:.3g}" for name in WHOLES)
            lines.append(f"| {preset} | {cells} | {fastest(times) / times['product']:.2f} |")
        lines.append("")
    lines += ["Of one core, alone; rounding is once a candidate, not a pair:", ""]
    stages = list(next(iter(results.values()))["parts"])
    lines += ["| preset | " + " | ".join(stages) + " |", "|---" * (len(stages) + 1) + "|"]
    for preset, measured in results.items():
        lines.append(
            f"| {preset} | " + " | ".join(f"{1000 * value:.3g}" for value in measured["parts"].values()) + " |"
        )
    return "\n".join(lines) + "\n"


def fastest(times: dict[str, float]) -> float:
    """What a run takes: it measures both ways on its first pair."""
    return min(times["8 bits"], times["float32"])


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Times of a pair relative to the float32 product of its sizes."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, company in zip(figure.subplots(1, 2, sharey=True), COMPANIES, strict=True):
        for place, (name, colour) in enumerate(zip(WHOLES, ("#3b6ea8", "#5aa469", "#c44e52", "#9aa0a6"), strict=True)):
            positions = np.arange(len(results)) + 0.2 * (place - 1.5)
            times = [1000 * measured[company][name] for measured in results.values()]
            bars = axes.bar(positions, times, 0.2, color=colour, label=LABELS[name])
            axes.bar_label(bars, [f"{value:.3g}" for value in times], fontsize=7)
        axes.set_xticks(range(len(results)), list(results))
        axes.set(title=company, yscale="log")
        axes.margins(y=0.15)
    figure.axes[0].set_ylabel("milliseconds a pair")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


@torch.inference_mode()
def main() -> None:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["performance", "speed", "storage", "builtin"])
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    if not rounding_works():
        sys.exit("this processor does not multiply 8-bit numbers exactly: there is one way, float32, and no comparison")
    workers = Workers()
    results = {}
    for preset in args.presets:
        job = make_job(preset, args.candidates)
        times = {COMPANIES[0]: whole_times(job, workers, args.repeats), "parts": part_times(job, args.repeats)}
        with busy_process():
            times[COMPANIES[1]] = whole_times(job, workers, args.repeats)
        results[preset] = times
        print(f"{preset}: {differing_matches(job)} matches differ from float32", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "matching.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "matching.md").write_text(table(results))
    plot(results, args.output / "matching.png")
    print(table(results))


if __name__ == "__main__":
    main()
