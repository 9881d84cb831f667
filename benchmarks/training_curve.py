#!/usr/bin/env python3
"""Does training learn, and does WPCA help? Recall of held-out places over epochs, on rendered cities.

Trains NetVLAD over dense RootSIFT, the encoder that needs no weights, on two rendered cities from several seeds, then
fits WPCA on those and three further cities. Recalls are those of two other cities, which neither has seen. Writes
docs/training_curve.png, and prints the figures as Markdown tables.
"""

import argparse
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.checkpoints import build_model, read_checkpoint
from patchnetvlad.config import Config, FeatureExtractConfig, FeatureMatchConfig, GlobalParams, TrainConfig
from patchnetvlad.distributed import Processes
from patchnetvlad.examples.rendered_msls import RenderedCity, write_msls
from patchnetvlad.images import image_batches
from patchnetvlad.model import PlaceModel
from patchnetvlad.training_data import read_cities
from patchnetvlad.training_run import RunOptions, train_model
from patchnetvlad.validation import validate
from patchnetvlad.whitening import WPCAFit, fit_wpca

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

TRAIN, HELD_OUT = ("trondheim", "london"), ("cph", "sf")
FURTHER = ("boston", "melbourne", "tokyo")  # database pictures for WPCA alone
WIDTH, HEIGHT = 160, 120  # pixels
N_VALUES = (1, 5, 10)
WHITENING = (0.0, 0.5, 1.0)
ONE_PROCESS = Processes(0, 1, torch.device("cpu"))

Rows = NDArray[np.float32]


def configuration(seed: int) -> Config:
    """Training at a size for a processor: 160×120 pictures, 16 clusters, a higher rate than VGG16's."""
    return Config(
        FeatureExtractConfig(imageresizew=WIDTH, imageresizeh=HEIGHT),
        FeatureMatchConfig(imageresizew=WIDTH, imageresizeh=HEIGHT, n_values_all=N_VALUES),
        GlobalParams(pooling="netvlad", backbone="rootsift", num_pcs=0, threads=2),
        TrainConfig(
            imageresizew=WIDTH,
            imageresizeh=HEIGHT,
            seed=seed,
            lr=0.01,
            cities=TRAIN,
            val_cities=HELD_OUT,
            patience=0,
            subset_queries=80,
            subset_negatives=200,
        ),
    )


def learning_curve(seed: int, epochs: int, root: Path, runs: Path) -> tuple[Rows, PlaceModel]:
    """Held-out recalls at epochs 0 to the last, one row each, and the model at the end."""
    config = configuration(seed)
    options = RunOptions(
        root, save_path=runs / str(seed), save_every_epoch=True, check_pictures=False, num_epochs=epochs
    )
    folder = train_model(config, options, ONE_PROCESS).folder / "checkpoints"
    start = RunOptions(root, save_path=runs / f"{seed}-start", check_pictures=False, num_epochs=0)
    files = [train_model(config, start, ONE_PROCESS).folder / "checkpoints/checkpoint.pth.tar"]
    files += [folder / f"checkpoint_epoch{epoch}.pth.tar" for epoch in range(1, epochs + 1)]
    checkpoints = [read_checkpoint(file) for file in files]
    curve = np.array([[checkpoint.extras["recalls"][n] for n in N_VALUES] for checkpoint in checkpoints], np.float32)
    return curve, build_model(checkpoints[-1], config.global_params)


@torch.no_grad()
def describe(model: PlaceModel, paths: Sequence[Path]) -> Rows:
    """Global descriptors, one row a picture."""
    return torch.cat([model(pictures) for _, pictures in image_batches(paths, HEIGHT, WIDTH, 20, 2)]).numpy()


def projected(descriptors: Rows, fit: WPCAFit) -> Rows:
    """What the model's WPCA layer makes of descriptors."""
    rows = descriptors @ fit.weight.T + fit.bias
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def recalls_with_wpca(model: PlaceModel, root: Path, dimensions: Sequence[int]) -> Rows:
    """Held-out recalls, whitening × dimensions × N."""
    paths = [
        path
        for city in (*TRAIN, *FURTHER)
        for path in sorted((root / "train_val" / city / "database/images").iterdir())
    ]
    samples = describe(model, paths)
    cities = read_cities(root, HELD_OUT)
    known = {side.source: describe(model, side.paths) for city in cities for side in (city.queries, city.database)}
    recalls = np.zeros((len(WHITENING), len(dimensions), len(N_VALUES)), np.float32)
    for row, whitening in enumerate(WHITENING):
        for column, num_pcs in enumerate(dimensions):
            fit = fit_wpca(samples, num_pcs, whitening)

            def look_up(paths: Sequence[Path], numbers: Sequence[int], label: str, fit: WPCAFit = fit) -> Rows:
                return projected(known[paths[0].parent.parent], fit)

            validation = validate(look_up, cities, 25.0, N_VALUES, ONE_PROCESS.device)
            recalls[row, column] = [validation.total[n] for n in N_VALUES]
    return recalls


def draw(axes: Axes, x: Sequence[float], runs: Rows, color: str, label: str) -> None:
    """Mean over the runs (runs × points), and their range."""
    axes.plot(x, 100 * runs.mean(0), color=color, marker="o", markersize=4, label=label)
    axes.fill_between(x, 100 * runs.min(0), 100 * runs.max(0), color=color, alpha=0.15, linewidth=0)


def figure(curves: Rows, wpca: Rows, dimensions: Sequence[int], path: Path) -> None:
    """curves: runs × epochs × N; wpca: runs × whitening × dimensions × N."""
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for place, color in enumerate(("#1b6ca8", "#d1495b")):
        draw(left, range(curves.shape[1]), curves[:, :, place], color, f"Recall@{N_VALUES[place]}")
    left.set(xlabel="epoch", ylabel="held-out recall (%)", title="Training (mean and range of runs)")
    five = N_VALUES.index(5)
    plain = 100 * curves[:, -1, five].mean()
    right.axhline(plain, color="0.4", linestyle="--", label="without WPCA, 2048 dimensions")
    for row, color in enumerate(("#8d99ae", "#2a9d8f", "#e76f51")):
        draw(right, dimensions, wpca[:, row, :, five], color, f"whitening {WHITENING[row]:g}")
    right.set_xscale("log", base=2)
    right.set_xticks(dimensions, [str(number) for number in dimensions])
    right.minorticks_off()
    right.set(xlabel="dimensions after WPCA", ylabel="held-out Recall@5 (%)", title="WPCA of the trained models")
    for axes in (left, right):
        axes.grid(axis="y", color="0.9")
        axes.legend(frameon=False, loc="lower right")
    drawing.savefig(path, dpi=130)


def tables(curves: Rows, wpca: Rows, dimensions: Sequence[int]) -> str:
    """The figures as Markdown, means over the runs in percent."""
    lines = ["| | " + " | ".join(f"Recall@{n}" for n in N_VALUES) + " |", "|---|" + "---|" * len(N_VALUES)]

    def add(label: str, recalls: Rows) -> None:
        lines.append(f"| {label} | " + " | ".join(f"{100 * value:.1f}" for value in recalls) + " |")

    add("initialised by k-means", curves[:, 0].mean(0))
    add(f"after {curves.shape[1] - 1} epochs", curves[:, -1].mean(0))
    for row, whitening in enumerate(WHITENING):
        for column, num_pcs in enumerate(dimensions):
            add(f"… and WPCA to {num_pcs}, whitening {whitening:g}", wpca[:, row, column].mean(0))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--places", type=int, default=40, help="rendered places of each city with queries")
    parser.add_argument("--further", type=int, default=110, help="rendered places of each city for WPCA alone")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="runs from different clusters and draws")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 128, 256, 512], help="WPCA's")
    parser.add_argument("--tree", type=Path, help="folder for the rendered cities; kept, and used again")
    parser.add_argument("--output", type=Path, default=Path("docs/training_curve.png"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        root = options.tree or Path(folder) / "msls"
        if not (root / "train_val").exists():
            cities = [RenderedCity(name, options.places, 101 + n) for n, name in enumerate((*TRAIN, *HELD_OUT))]
            write_msls(root, cities, (WIDTH, HEIGHT), panoramas=False)
            further = [RenderedCity(name, options.further, 201 + n) for n, name in enumerate(FURTHER)]
            write_msls(root, further, (WIDTH, HEIGHT), query_views=0, panoramas=False)
        curves, wpca = [], []
        for seed in range(options.seeds):
            curve, model = learning_curve(seed, options.epochs, root, Path(folder) / "runs")
            curves.append(curve)
            wpca.append(recalls_with_wpca(model, root, options.dimensions))
            shutil.rmtree(Path(folder) / "runs")
            print(f"seed {seed}: Recall@5 (%)", np.round(100 * curve[:, N_VALUES.index(5)], 1), flush=True)
    print(tables(np.array(curves), np.array(wpca), options.dimensions))
    figure(np.array(curves), np.array(wpca), options.dimensions, options.output)
    print(f"figure in {options.output}")


if __name__ == "__main__":
    main()
