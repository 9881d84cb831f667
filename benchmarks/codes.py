#!/usr/bin/env python3
"""Recall by bytes a picture, where the database's patches are stored as codes (feature_dtype = pqN).

    python benchmarks/codes.py --dataset_root_dir ROOT --datasets corridor ietower_small --work WORK --output benchmarks

ROOT holds a folder for each data set as benchmarks/recalls.py takes it; queries stay as they are. --stored lists ways
of storing the database: float32, pqN, or either with @S for every S-th patch along both axes of its grids only. WORK
keeps the features, so that a run that was ended goes on. Writes codes.json, codes.md and codes.png.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from recalls import N_VALUES, SIDES

from patchnetvlad.config import Config
from patchnetvlad.config_values import code_bytes
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.extraction import describe_list
from patchnetvlad.ground_truth import read_ground_truth
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.ini import load_config
from patchnetvlad.patch_codes import SAMPLE_ROWS, PatchCodec, coded_grids, rows_to_code, train_codec
from patchnetvlad.paths import require_file
from patchnetvlad.ranking import Ranker
from patchnetvlad.store.arrays.codecs import CPU
from patchnetvlad.store.cache.memory_cache import CacheStatistics
from patchnetvlad.store.reading.feature_store import FeatureStore
from patchnetvlad.store.reading.patch_sources import DescribedPictures
from patchnetvlad.weights import load_model

SAMPLE_PICTURES = 100


@dataclass(frozen=True)
class Form:
    """A way of storing a database: num_bytes of a code, None for float32; step from one patch to the next."""

    num_bytes: int | None
    step: int

    @classmethod
    def of(cls, text: str) -> "Form":
        dtype, _, step = text.partition("@")
        if (dtype != "float32" and code_bytes(dtype) is None) or not re.fullmatch(r"\d*", step):
            raise argparse.ArgumentTypeError(f"{text}: expected float32 or pqN, and perhaps @S")
        return cls(code_bytes(dtype), int(step or 1))

    def thin(self, features: PatchFeatures) -> PatchFeatures:
        """The patches that are kept, at the places where they are."""
        rows = []
        for descriptors, grid in zip(features.descriptors, features.grids, strict=True):
            places = torch.arange(len(grid)).reshape(grid.rows, grid.columns)[:: self.step, :: self.step]
            rows.append(descriptors[places.reshape(-1)])
        grids = tuple(replace(grid, stride=grid.stride * self.step) for grid in features.grids)
        return PatchFeatures(tuple(rows), grids)


class StoredDatabase:
    """A database as it comes back from how it is stored; a PatchSource."""

    cache_bytes = None

    def __init__(self, store: FeatureStore, form: Form) -> None:
        self._store, self._form = store, form
        self._codec = self._train() if form.num_bytes is not None else None
        self._kept: dict[int, tuple[list[NDArray[np.uint8]], PatchFeatures]] = {}
        self._rounded = False

    def _train(self) -> PatchCodec:
        """As feature_extract does: on some patches of some pictures."""
        assert self._form.num_bytes is not None
        pictures = np.unique(np.linspace(0, len(self._store) - 1, SAMPLE_PICTURES).astype(int)).tolist()
        count = SAMPLE_ROWS // len(pictures) + 1
        sample = []
        for index in pictures:
            features = self._form.thin(self._store.patches(index))
            rows = torch.cat(rows_to_code(features.descriptors, features.grids))
            sample.append(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(index))[:count]])
        return train_codec(torch.cat(sample), self._form.num_bytes)

    def patches(self, index: int, device: torch.device = CPU) -> PatchFeatures:
        if self._codec is None:
            features = self._form.thin(self._store.patches(index))
        else:
            if index not in self._kept:
                thinned = self._form.thin(self._store.patches(index))
                codes = [self._codec.encode(rows) for rows in rows_to_code(thinned.descriptors, thinned.grids)]
                self._kept[index] = codes, PatchFeatures((), thinned.grids)
            codes, without = self._kept[index]
            rows = list(map(self._codec.decode, codes))
            grids = without.grids
            features = PatchFeatures(self._codec.estimate(rows, coded_grids(grids), grids), grids)
        return (features.round_as("reference") if self._rounded else features).to(device)

    def round_references(self) -> None:
        self._rounded = True

    def prefetch(self, indices: Iterable[int]) -> None:
        self._store.prefetch(indices)

    def pass_over(self, index: int) -> None:
        self._store.pass_over(index)

    def picture_bytes(self, index: int) -> int:
        """On disk."""
        grids = self._form.thin(self._store.patches(index)).grids
        if self._form.num_bytes is not None:
            return self._form.num_bytes * sum(map(len, coded_grids(grids)))
        return 4 * self._store.num_dims * sum(map(len, grids))

    @property
    def statistics(self) -> CacheStatistics:
        return self._store.statistics


def measure(config: Config, root: Path, work: Path, forms: Sequence[tuple[str, Form]]) -> dict:
    """Of every form bytes a picture, and for each query the rank of its first true match (0: none)."""
    model, checkpoint = load_model(config)
    stored = replace(config, feature_extract=replace(config.feature_extract, feature_dtype="float16"))
    lists = [read_image_list(root / f"{root.name}_imageNames_{side}.txt", root) for side in SIDES]
    for side, pictures in zip(SIDES, lists, strict=True):
        describe_list(model, checkpoint, stored, pictures, work / side, progress=True)
    truth = read_ground_truth(root / f"{root.name}.npz", len(lists[0]), len(lists[1])).positives()
    measured = {}
    queries, database = (FeatureStore.open(work / side, pictures) for side, pictures in zip(SIDES, lists, strict=True))
    with queries, database:
        for name, form in forms:
            source = StoredDatabase(database, form)
            ranker = Ranker(config.feature_match, DescribedPictures(database.global_, source), torch.device("cpu"))
            rankings = ranker.rank(DescribedPictures(queries.global_, queries), progress=True)
            ranks = [first_match(row, set(true)) for row, true in zip(rankings.indices, truth, strict=True)]
            measured[name] = {"bytes": source.picture_bytes(0), "ranks": ranks}
            print(root.name, name, measured[name]["bytes"], [recalled(ranks, n) for n in N_VALUES], flush=True)
    return measured


def first_match(ranking: NDArray[np.int64], true: set[int]) -> int:
    """Rank of the first true match from 1 on, 0 for none."""
    return next((rank for rank, index in enumerate(ranking.tolist(), start=1) if index in true), 0)


def recalled(ranks: Sequence[int], n: int) -> int:
    """Queries with a true match among the first n."""
    return sum(0 < rank <= n for rank in ranks)


def table(results: dict[str, dict]) -> str:
    """Recalls as Markdown, and how many queries each form has lost and won against the first."""
    lines = []
    for name, forms in results.items():
        whole = next(iter(forms.values()))["ranks"]
        lines += [f"{name}, {len(whole)} queries:", ""]
        lines += ["| stored | kB a picture | Recall@1 | @5 | @10 | queries lost / won @1, @5, @10 |", "|---" * 6 + "|"]
        for form, values in forms.items():
            ranks = values["ranks"]
            shares = " | ".join(f"{100 * recalled(ranks, n) / len(ranks):.1f}" for n in N_VALUES)
            changes = []
            for n in N_VALUES:
                before, after = (np.array([0 < rank <= n for rank in form_ranks]) for form_ranks in (whole, ranks))
                changes.append(f"{(before & ~after).sum()} / {(after & ~before).sum()}")
            lines.append(f"| {form} | {values['bytes'] / 1000:.1f} | {shares} | {', '.join(changes)} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    """Recall@1, 5 and 10 over kB a picture, one panel for each data set; hollow marks for thinned databases."""
    figure = Figure(figsize=(4.5 * len(results), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, forms) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for n, colour in zip(N_VALUES, ("#3b6ea8", "#e0a030", "#5aa469"), strict=True):
            for thinned in (False, True):
                points = [
                    (values["bytes"] / 1000, 100 * recalled(values["ranks"], n) / len(values["ranks"]))
                    for form, values in forms.items()
                    if ("@" in form) == thinned
                ]
                style = {"markerfacecolor": "none", "linestyle": "none"} if thinned else {"label": f"Recall@{n}"}
                axes.plot(*zip(*sorted(points), strict=True) if points else ([], []), "o-", color=colour, **style)
        axes.set(xscale="log", xlabel="kB a picture", ylabel="%", title=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_root_dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=["corridor", "ietower_small"])
    parser.add_argument("--config_path", default="builtin.ini")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--stored", nargs="+", default=["float32", "pq192", "pq128", "pq64", "pq32", "float32@2"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    args = parser.parse_args(arguments)
    config = load_config(require_file(args.config_path, "configs"), args.overrides)
    forms = [(text, Form.of(text)) for text in args.stored]
    results = {}
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.datasets:
        results[name] = measure(config, args.dataset_root_dir / name, args.work / name, forms)
        (args.output / "codes.json").write_text(json.dumps(results) + "\n")
    (args.output / "codes.md").write_text(table(results))
    plot(results, args.output / "codes.png")
    print(table(results))


if __name__ == "__main__":
    main()
