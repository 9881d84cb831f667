#!/usr/bin/env python3
"""Recall by bytes a picture, where the database's patches are stored as codes (feature_dtype = pqN or mapN).

    python benchmarks/codes.py --dataset_root_dir ROOT --datasets corridor ietower_small --work WORK --output benchmarks

ROOT holds a folder for each data set as benchmarks/recalls.py takes it. Pictures are described once, in the type of
--kept, and queries stay so; --stored lists ways of storing the database: pqN or mapN, described once more, or kept, or
kept@S for every S-th patch along both axes of its grids only. WORK keeps features, codes and the ranks of finished
queries, so that a run that was ended goes on. Writes codes.json, codes.md and codes.png.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from recalls import N_VALUES, SIDES, described_as

from patchnetvlad.config import Config
from patchnetvlad.config_values import CodeForm, code_form
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.extraction import describe_list
from patchnetvlad.ground_truth import read_ground_truth
from patchnetvlad.image_lists import ImageList, read_image_list
from patchnetvlad.ini import load_config
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.paths import require_file
from patchnetvlad.ranking import Ranker
from patchnetvlad.store.arrays.codecs import CPU
from patchnetvlad.store.cache.memory_cache import CacheStatistics
from patchnetvlad.store.reading.feature_store import FeatureStore
from patchnetvlad.store.reading.patch_sources import DescribedPictures, PatchesInMemory, PatchSource
from patchnetvlad.weights import load_model

TOGETHER = 10  # queries that are ranked before their ranks are kept


@dataclass(frozen=True)
class Form:
    """A way of storing a database: the form of its codes, None for descriptors as they are kept; step from one patch to
    the next, for these."""

    codes: CodeForm | None
    step: int = 1

    @classmethod
    def of(cls, text: str) -> "Form":
        if thinned := re.fullmatch(r"kept(?:@([1-9]\d*))?", text):
            return cls(None, int(thinned[1] or 1))
        if code_form(text) is None:
            raise argparse.ArgumentTypeError(f"{text}: expected pqN, mapN, kept or kept@S")
        return cls(code_form(text))


class ThinnedDatabase:
    """A store of which only every step-th patch along both axes is used, at the places where they are; a
    PatchSource."""

    cache_bytes = None

    def __init__(self, store: FeatureStore, step: int) -> None:
        self._store, self._step = store, step
        self._rounded = False

    def patches(self, index: int, device: torch.device = CPU) -> PatchFeatures:
        features = self._store.patches(index)
        rows = []
        for descriptors, grid in zip(features.descriptors, features.grids, strict=True):
            places = torch.arange(len(grid)).reshape(grid.rows, grid.columns)[:: self._step, :: self._step]
            rows.append(descriptors[places.reshape(-1)])
        grids = tuple(replace(grid, stride=grid.stride * self._step) for grid in features.grids)
        thinned = PatchFeatures(tuple(rows), grids)
        return (thinned.round_as("reference") if self._rounded else thinned).to(device)

    def round_references(self) -> None:
        self._rounded = True

    def prefetch(self, indices: Iterable[int]) -> None:
        self._store.prefetch(indices)

    def pass_over(self, index: int) -> None:
        self._store.pass_over(index)

    def picture_bytes(self, index: int) -> int:
        """In memory while it is matched."""
        return self.patches(index).nbytes

    @property
    def statistics(self) -> CacheStatistics:
        return self._store.statistics


def kept_bytes(grids: Sequence[PatchGrid], dims: int, form: Form, number: int) -> int:
    """A picture's patch descriptors on disk where they are kept; number: bytes of one."""
    return number * dims * sum(len(replace(grid, stride=grid.stride * form.step)) for grid in grids)


def measure(config: Config, root: Path, work: Path, forms: Sequence[tuple[str, Form]], kept: str) -> dict:
    """Of every form bytes a picture, and for each query the rank of its first true match (0: none)."""
    model, checkpoint = load_model(config)
    lists = [read_image_list(root / f"{root.name}_imageNames_{side}.txt", root) for side in SIDES]
    for side, pictures in zip(SIDES, lists, strict=True):
        describe_list(model, checkpoint, described_as(config, kept), pictures, work / side, progress=True)
    truth = read_ground_truth(root / f"{root.name}.npz", len(lists[0]), len(lists[1])).positives()
    memory = config.feature_match.cache_gb or 4.0
    measured = {}
    with ExitStack() as stores:

        def opened(folder: Path, pictures: ImageList) -> FeatureStore:
            return stores.enter_context(FeatureStore.open(folder, pictures, cache_gb=memory))

        queries, database = (opened(work / side, pictures) for side, pictures in zip(SIDES, lists, strict=True))
        described = DescribedPictures(queries.global_, queries)
        for name, form in forms:
            if form.codes is None:
                source: PatchSource = ThinnedDatabase(database, form.step) if form.step > 1 else database
                kind = f"{kept}{name.removeprefix('kept')}"
                size = kept_bytes(database.patches(0).grids, database.num_dims, form, np.dtype(kept).itemsize)
            else:
                folder = work / name
                describe_list(model, checkpoint, described_as(config, name), lists[1], folder, progress=True)
                source, kind = opened(folder, lists[1]), name
                size = source.picture_bytes(0)
            ranker = Ranker(config.feature_match, DescribedPictures(database.global_, source), CPU)
            ranks = rank_in_parts(ranker, described, truth, work / "ranks.json", f"{kind} {config.feature_match}")
            measured[kind] = {"bytes": size, "ranks": ranks}
            print(root.name, kind, size, [recalled(ranks, n) for n in N_VALUES], flush=True)
    return measured


def rank_in_parts(
    ranker: Ranker, queries: DescribedPictures, truth: Sequence[NDArray[np.int64]], path: Path, key: str
) -> list[int]:
    """Ranks of all queries' first true matches; those that the file has under a key are not sought again."""
    known = json.loads(path.read_text()) if path.exists() else {}
    ranks: list[int] = known.setdefault(key, [])
    assert queries.patches is not None
    while len(ranks) < len(queries):
        rows = range(len(ranks), min(len(ranks) + TOGETHER, len(queries)))
        features = PatchesInMemory([queries.patches.patches(row) for row in rows])
        rankings = ranker.rank(DescribedPictures(queries.global_[rows.start : rows.stop], features))
        ranks += [
            first_match(ranking, set(truth[row].tolist())) for ranking, row in zip(rankings.indices, rows, strict=True)
        ]
        path.write_text(json.dumps(known) + "\n")
        print(f"{key.split()[0]}: {len(ranks)} of {len(queries)} queries", flush=True)
    return ranks


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
    parser.add_argument("--stored", nargs="+", default=["kept", "map40", "map12", "pq192", "pq64"])
    parser.add_argument("--kept", choices=["float32", "float16", "int8"], default="float16")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    args = parser.parse_args(arguments)
    config = load_config(require_file(args.config_path, "configs"), args.overrides)
    forms = [(text, Form.of(text)) for text in args.stored]
    results = {}
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.datasets:
        results[name] = measure(config, args.dataset_root_dir / name, args.work / name, forms, args.kept)
        (args.output / "codes.json").write_text(json.dumps(results) + "\n")
    (args.output / "codes.md").write_text(table(results))
    plot(results, args.output / "codes.png")
    print(table(results))


if __name__ == "__main__":
    main()
