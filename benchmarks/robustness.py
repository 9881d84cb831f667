#!/usr/bin/env python3
"""How much may change before a place is no longer found? Recall@1 of models against changes of known amount.

    python benchmarks/robustness.py

The database is one picture by day of every place of a rendered city, in which every place has a twin of the same style,
so that only the arrangement tells them apart. A query shows its place from a few metres aside, and is further aside, at
dusk or otherwise changed by an amount from 0 to 1; the changes are those of training, 1.5 or 2 times as strong. Writes
benchmarks/robustness.md and docs/robustness.png: recall of retrieval, and after the first candidates are re-ranked.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

from patchnetvlad.config import CHANGES
from patchnetvlad.examples.rendered_city import City, View, make_city
from patchnetvlad.picture_changes import Picture
from patchnetvlad.recognizer import PlaceRecognizer

matplotlib.use("Agg")
from matplotlib import pyplot

BASE = 3.0  # metres along the street from where the database picture was taken, at amount 0
ASIDE = 12.0  # metres at amount 1
STAGES = ("retrieval", "re-ranked")
COLOURS = ("#1b6ca8", "#d1495b", "#2a9d8f", "#8d99ae")
LINES = (":", "-")

Make = Callable[[City, View, Picture, float, int], Picture]
"""A city, a database view, the query as it is at amount 0, an amount 0 to 1 and the view's number → a query."""


def aside(city: City, view: View, before: Picture, amount: float, number: int) -> Picture:
    """From 3 to 12 m aside, the camera turned back towards the place."""
    return seen(city, view, _size(before), number, metres=BASE + amount * (ASIDE - BASE))


def dusk(city: City, view: View, before: Picture, amount: float, number: int) -> Picture:
    """From 3 m aside, later in the day: up to dusk with lit windows."""
    return seen(city, view, _size(before), number, dusk=amount)


def seen(city: City, view: View, size: tuple[int, int], number: int, metres: float = BASE, dusk: float = 0) -> Picture:
    """A database view's place from some metres further along the street, to the one or the other side."""
    x = view.camera.x + metres * (1 if number % 2 else -1)
    yaw = -0.85 * float(np.degrees(np.arctan2(x, view.camera.distance)))
    condition = replace(view.condition, dusk=dusk)
    return np.asarray(city.render(replace(view, camera=replace(view.camera, x=x, yaw=yaw), condition=condition), size))


def _size(picture: Picture) -> tuple[int, int]:
    return picture.shape[1], picture.shape[0]


def _changing(name: str, strength: float) -> Make:
    def make(city: City, view: View, before: Picture, amount: float, number: int) -> Picture:
        return CHANGES[name](before, strength * amount, np.random.default_rng(number))

    return make


KINDS: dict[str, tuple[str, Make]] = {  # name: what amount 1 is, how a query is made
    "aside": (f"{ASIDE:g} m along the street", aside),
    "dusk": ("dusk, rendered", dusk),
    "turn": ("45° to a side", _changing("turn", 1.5)),
    "roll": ("45° askew", _changing("roll", 1.5)),
    "zoom": ("2.8 times", _changing("zoom", 1.5)),
    "darkness": ("a hundredth of the light", _changing("darkness", 2)),
    "blur": ("σ = 8 pixels of 640", _changing("blur", 2)),
    "noise": ("σ = 80 grey levels", _changing("noise", 2)),
    "occlusion": ("three quarters of the picture", _changing("occlusion", 1.5)),
    "jpeg": ("quality 3", _changing("jpeg", 1)),
}


def measure(
    models: Sequence[PlaceRecognizer], city: City, size: tuple[int, int], amounts: Sequence[float]
) -> np.ndarray:
    """Recall@1 in %, stages × models × kinds × amounts; what all kinds have in common at amount 0 is measured once."""
    views = city.database
    databases = [model.database([np.asarray(city.render(view, size)) for view in views]) for model in models]
    before = [seen(city, view, size, number) for number, view in enumerate(views)]
    vectors = [np.stack([picture.global_.numpy() for picture in database.pictures]) for database in databases]
    right = np.zeros((len(STAGES), len(models), len(KINDS), len(amounts)))
    for column, (_, make) in enumerate(tqdm(KINDS.values(), "Changes")):
        for place, amount in enumerate(amounts):
            if column and amount == 0:
                right[:, :, column, place] = right[:, :, 0, place]
                continue
            for number, view in enumerate(views):
                query = make(city, view, before[number], amount, number)
                for row, (model, database) in enumerate(zip(models, databases, strict=True)):
                    (described,) = model.describe(query)
                    nearest = int(np.argmax(vectors[row] @ described.global_.numpy()))
                    best = database.query(described, top=1)[0].index
                    right[:, row, column, place] += [nearest == number, best == number]
    return 100 * right / len(views)


def table(names: Sequence[str], recalls: np.ndarray, amounts: Sequence[float]) -> str:
    """Markdown: a row for each change, model and stage, the means last."""
    lines = ["| change, at amount 1 | model | " + " | ".join(f"{amount:.2g}" for amount in amounts) + " |"]
    lines.append("|---|---|" + "---|" * len(amounts))
    kinds = [f"{kind}: {unit}" for kind, (unit, _) in KINDS.items()]
    every = np.concatenate([recalls, recalls.mean(axis=2, keepdims=True)], axis=2)
    for column, kind in enumerate([*kinds, "mean"]):
        for row, name in enumerate(names):
            pairs = [f"{before:.0f} → {after:.0f}" for before, after in every[:, row, column].T]
            lines.append(f"| {kind} | {name} | " + " | ".join(pairs) + " |")
    return "\n".join(lines) + "\n"


def figure(names: Sequence[str], recalls: np.ndarray, amounts: Sequence[float], path: Path) -> None:
    """A small panel for each change."""
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    drawing, panels = pyplot.subplots(2, 5, figsize=(11, 4.6), sharey=True, layout="constrained")
    for column, (axes, (kind, (unit, _))) in enumerate(zip(panels.flat, KINDS.items(), strict=True)):
        for row, name in enumerate(names):
            for stage, curves in enumerate(recalls):
                label = f"{name}, {STAGES[stage]}"
                style = {"color": COLOURS[row % len(COLOURS)], "linestyle": LINES[stage], "marker": "o", "ms": 3}
                axes.plot(amounts, curves[row, column], label=label, **style)
        axes.set(title=kind, xlabel=f"1: {unit}", ylim=(0, 103))
        axes.grid(axis="y", color="0.9")
    for row in panels:
        row[0].set_ylabel("Recall@1 (%)")
    drawing.legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    drawing.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", nargs="+", default=["builtin.ini", "rootsift.ini"])
    parser.add_argument("--places", type=int, default=64, help="half of them are twins of the others")
    width = "of the pictures as rendered and as models see them; height is three quarters; 640 takes ten times as long"
    parser.add_argument("--width", type=int, default=320, help=width)
    parser.add_argument("--amounts", type=float, nargs="+", default=[0, 1 / 3, 2 / 3, 1])
    parser.add_argument("--rerank_top", type=int, default=10, help="candidates that are re-ranked")
    parser.add_argument("--seed", type=int, default=777, help="of the city")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="changes every configuration")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/robustness.md"))
    parser.add_argument("--figure", type=Path, default=Path("docs/robustness.png"))
    args = parser.parse_args(arguments)
    size = (args.width, args.width * 3 // 4)
    city = make_city(args.places, (1,), (1,), args.seed, args.places // 2, scale=args.width / 10)
    sides = zip(("imageresizew", "imageresizeh"), size, strict=True)
    changes = [f"feature_{step}.{key}={side}" for key, side in sides for step in ("extract", "match")]
    changes += [f"feature_match.rerank_top={args.rerank_top}", *args.set]
    models = [PlaceRecognizer.load(config, overrides=changes) for config in args.config_path]
    names = [Path(config).stem for config in args.config_path]
    recalls = measure(models, city, size, args.amounts)
    for path in (args.output, args.figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(table(names, recalls, args.amounts), encoding="utf-8")
    figure(names, recalls, args.amounts, args.figure)
    print(table(names, recalls, args.amounts))


if __name__ == "__main__":
    main()
