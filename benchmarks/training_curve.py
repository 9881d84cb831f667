#!/usr/bin/env python3
"""Does training learn, and does WPCA help? Recall of held-out places over epochs, on rendered cities.

Trains NetVLAD over dense RootSIFT, the encoder that needs no weights, on two rendered cities with several seeds, and
after each run fits WPCA on the training cities. Recalls are those of two other cities, which neither has seen. Writes
docs/training_curve.png and a table beside it.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.checkpoints import build_model, read_checkpoint
from patchnetvlad.config import Config, FeatureExtractConfig, FeatureMatchConfig, GlobalParams, TrainConfig
from patchnetvlad.distributed import Processes
from patchnetvlad.images import image_batches
from patchnetvlad.mapillary import read_cities
from patchnetvlad.rendered_msls import RenderedCity, write_msls
from patchnetvlad.training_run import RunOptions, add_wpca, train_model
from patchnetvlad.validation import Validation, validate

matplotlib.use("Agg")

TRAIN, HELD_OUT = ("trondheim", "london"), ("cph", "sf")
WIDTH, HEIGHT = 160, 120  # pixels
N_VALUES = (1, 5, 10)
CPU = torch.device("cpu")


def configuration(seed: int, num_pcs: int = 0) -> Config:
    """Training at a size for a processor: 160×120 pictures, 16 clusters, a higher rate than VGG16's."""
    size = {"imageresizew": WIDTH, "imageresizeh": HEIGHT}
    return Config(
        FeatureExtractConfig(**size),
        FeatureMatchConfig(**size, n_values_all=N_VALUES),
        GlobalParams(pooling="netvlad", backbone="rootsift", num_pcs=num_pcs, threads=2),
        TrainConfig(
            **size,
            seed=seed,
            lr=0.01,
            cities=TRAIN,
            val_cities=HELD_OUT,
            patience=0,
            subset_queries=80,
            subset_negatives=200,
        ),
    )


def held_out_recalls(checkpoint: Path, root: Path) -> dict[int, float]:
    """Recall@N of the held-out cities with a checkpoint's descriptors."""
    read = read_checkpoint(checkpoint)
    model = build_model(read, GlobalParams(pooling="netvlad", backbone="rootsift", num_pcs=read.num_pcs))

    @torch.no_grad()
    def describe(paths: Sequence[Path], numbers: Sequence[int], label: str) -> NDArray[np.float32]:
        batches = image_batches(paths, HEIGHT, WIDTH, 20, 2, indices=numbers)
        return torch.cat([model(pictures) for _, pictures in batches]).numpy()

    found: Validation = validate(describe, read_cities(root, HELD_OUT), 25.0, N_VALUES, CPU)
    return found.total


def one_seed(seed: int, epochs: int, root: Path, runs: Path, dimensions: Sequence[int]) -> dict[str, object]:
    """Recalls after every epoch from 0, and with WPCA of each dimension before and after training."""
    config = configuration(seed)
    # A run of one epoch per call: the same as one call, since a run resumes exactly, with every checkpoint at hand
    options = RunOptions(
        root, save_path=runs / str(seed), num_epochs=epochs, save_every_epoch=True, check_pictures=False
    )
    run = train_model(config, options, Processes(0, 1, CPU))
    checkpoints = run.folder / "checkpoints"
    start = checkpoints / "model_start.pth.tar"
    train_model(config, replace(options, save_path=runs / f"{seed}-start", num_epochs=0), Processes(0, 1, CPU))
    (first,) = (runs / f"{seed}-start").glob("*/checkpoints/checkpoint.pth.tar")
    first.rename(start)
    files = [start, *(checkpoints / f"checkpoint_epoch{epoch}.pth.tar" for epoch in range(1, epochs + 1))]
    curve = [held_out_recalls(file, root) for file in files]
    paths = [path for city in read_cities(root, TRAIN) for path in city.database.paths]
    projected = {
        name: {
            num_pcs: held_out_recalls(add_wpca(configuration(seed, num_pcs), file, paths, CPU), root)
            for num_pcs in dimensions
        }
        for name, file in (("start", files[0]), ("end", files[-1]))
    }
    return {"seed": seed, "curve": curve, "wpca": projected}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--places", type=int, default=40, help="rendered places of each of the four cities")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="runs from different clusters and draws")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[32, 64, 128], help="WPCA's")
    parser.add_argument("--tree", type=Path, help="folder for the rendered cities; kept, and used again")
    parser.add_argument("--output", type=Path, default=Path("docs/training_curve.png"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        root = options.tree or Path(folder) / "msls"
        if not (root / "train_val").exists():
            cities = [RenderedCity(name, options.places, 101 + n) for n, name in enumerate((*TRAIN, *HELD_OUT))]
            write_msls(root, cities, (WIDTH, HEIGHT), panoramas=False)
        results = []
        for seed in range(options.seeds):
            results.append(one_seed(seed, options.epochs, root, Path(folder) / "runs", options.dimensions))
            print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
