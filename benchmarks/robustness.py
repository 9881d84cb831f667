#!/usr/bin/env python3
"""How much may change before a place is no longer found? Recall@1 of models against changes of known amount.

    python benchmarks/robustness.py

The database is one picture by day of every place of a rendered city, some of whose places look alike; a query is the
same place seen from aside or at dusk, as rendered, or the same picture changed as training changes pictures. Writes
benchmarks/robustness.md and docs/robustness.png.
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

ASIDE = 8.0  # metres along the street at amount 1
COLOURS = ("#1b6ca8", "#d1495b", "#2a9d8f", "#8d99ae")

Make = Callable[[City, View, Picture, float, int], Picture]
"""A city, a database view and its picture, an amount 0 to 1 and the view's number → a query."""


def aside(city: City, view: View, picture: Picture, amount: float, number: int) -> Picture:
    """From up to 8 m aside, the camera turned back towards the place."""
    x = view.camera.x + amount * ASIDE * (1 if number % 2 else -1)
    yaw = -0.85 * float(np.degrees(np.arctan2(x, view.camera.distance)))
    return np.asarray(city.render(replace(view, camera=replace(view.camera, x=x, yaw=yaw)), _size(picture)))


def dusk(city: City, view: View, picture: Picture, amount: float, number: int) -> Picture:
    """From the same spot, later in the day: up to dusk with lit windows."""
    return np.asarray(city.render(replace(view, condition=replace(view.condition, dusk=amount)), _size(picture)))


def _size(picture: Picture) -> tuple[int, int]:
    return picture.shape[1], picture.shape[0]


def _changing(name: str) -> Make:
    def make(city: City, view: View, picture: Picture, amount: float, number: int) -> Picture:
        return CHANGES[name](picture, amount, np.random.default_rng(number))

    return make


KINDS: dict[str, tuple[str, Make]] = {  # name: what amount 1 is, how a query is made
    "aside": (f"{ASIDE:g} m along the street, rendered", aside),
    "dusk": ("dusk, rendered", dusk),
    "turn": ("30° to a side", _changing("turn")),
    "roll": ("30° askew", _changing("roll")),
    "zoom": ("2 times", _changing("zoom")),
    "darkness": ("a tenth of the light", _changing("darkness")),
    "blur": ("σ = 4 pixels of 640", _changing("blur")),
    "noise": ("σ = 40 grey levels", _changing("noise")),
    "occlusion": ("half of the picture", _changing("occlusion")),
    "jpeg": ("quality 3", _changing("jpeg")),
}


def measure(
    models: Sequence[PlaceRecognizer],
    city: City,
    views: Sequence[View],
    size: tuple[int, int],
    amounts: Sequence[float],
) -> np.ndarray:
    """Recall@1 in %, models × kinds × amounts."""
    pictures = [np.asarray(city.render(view, size)) for view in views]
    databases = [model.database(pictures) for model in models]
    right = np.zeros((len(models), len(KINDS), len(amounts)))
    for column, (_, make) in enumerate(tqdm(KINDS.values(), "Changes")):
        for place, amount in enumerate(amounts):
            for number, (view, picture) in enumerate(zip(views, pictures, strict=True)):
                query = make(city, view, picture, amount, number)
                for row, database in enumerate(databases):
                    right[row, column, place] += database.query(query, top=1)[0].index == number
    return 100 * right / len(views)


def table(names: Sequence[str], recalls: np.ndarray, amounts: Sequence[float]) -> str:
    """Markdown: a row for each change and model."""
    lines = ["| change, at amount 1 | model | " + " | ".join(f"{amount:g}" for amount in amounts) + " |"]
    lines.append("|---|---|" + "---|" * len(amounts))
    for column, (kind, (unit, _)) in enumerate(KINDS.items()):
        for row, name in enumerate(names):
            values = " | ".join(f"{value:.0f}" for value in recalls[row, column])
            lines.append(f"| {kind}: {unit} | {name} | {values} |")
    lines.append("| mean | | " + " | ".join([""] * len(amounts)) + " |")
    for row, name in enumerate(names):
        lines.append(f"| | {name} | " + " | ".join(f"{value:.0f}" for value in recalls[row].mean(0)) + " |")
    return "\n".join(lines) + "\n"


def figure(names: Sequence[str], recalls: np.ndarray, amounts: Sequence[float], path: Path) -> None:
    """A small panel for each change."""
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    drawing, panels = pyplot.subplots(2, 5, figsize=(11, 4.4), sharey=True, layout="constrained")
    for axes, (kind, (unit, _)), column in zip(panels.flat, KINDS.items(), range(len(KINDS)), strict=True):
        for row, name in enumerate(names):
            axes.plot(amounts, recalls[row, column], color=COLOURS[row % len(COLOURS)], marker="o", ms=3, label=name)
        axes.set(title=kind, xlabel=f"1: {unit}", ylim=(0, 103))
        axes.grid(axis="y", color="0.9")
    panels[0, 0].set_ylabel("Recall@1 (%)")
    panels[1, 0].set_ylabel("Recall@1 (%)")
    panels[0, 0].legend(frameon=False, loc="lower left")
    drawing.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", nargs="+", default=["builtin.ini", "rootsift.ini"])
    parser.add_argument("--places", type=int, default=40, help="a quarter of them look like others")
    parser.add_argument("--width", type=int, default=640, help="of the pictures as rendered; height is three quarters")
    parser.add_argument("--amounts", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--seed", type=int, default=777, help="of the city")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="changes every configuration")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/robustness.md"))
    parser.add_argument("--figure", type=Path, default=Path("docs/robustness.png"))
    args = parser.parse_args(arguments)
    size = (args.width, args.width * 3 // 4)
    city = make_city(args.places, (1,), (1,), args.seed, args.places // 4, scale=args.width / 10)
    models = [PlaceRecognizer.load(config, overrides=args.set) for config in args.config_path]
    names = [Path(config).stem for config in args.config_path]
    recalls = measure(models, city, city.database, size, args.amounts)
    for path in (args.output, args.figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(table(names, recalls, args.amounts), encoding="utf-8")
    figure(names, recalls, args.amounts, args.figure)
    print(table(names, recalls, args.amounts))


if __name__ == "__main__":
    main()
