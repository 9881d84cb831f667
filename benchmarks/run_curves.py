#!/usr/bin/env python3
"""Recall over epochs of training runs that are there: mean and range of several seeds.

    python benchmarks/run_curves.py work/*_seed* --output docs/bundled_curve.png

Reads the runs' TensorBoard events, and prints the figures as a Markdown table.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot

N_VALUES = (1, 5)
COLOURS = ("#1b6ca8", "#d1495b")


def read_curves(runs: Sequence[Path], n_values: Sequence[int]) -> dict[str, tuple[list[int], np.ndarray]]:
    """For all validation cities together ("all") and each: the epochs, and recalls in %, runs × epochs × n_values."""
    curves_of: dict[str, list[np.ndarray]] = {}
    epochs: list[int] = []
    for run in runs:
        events = EventAccumulator(str(run)).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("Val") and tag.endswith("/Recall@1")]
        for tag in tags:
            group = tag.partition("/")[0]
            values = [events.Scalars(f"{group}/Recall@{n}") for n in n_values]
            epochs = [value.step for value in values[0]]
            recalls = 100 * np.array([[value.value for value in column] for column in values]).T
            curves_of.setdefault(group.removeprefix("Val_").replace("Val", "all"), []).append(recalls)
    return {name: (epochs, np.array(curves)) for name, curves in curves_of.items()}


def table(curves: dict[str, tuple[list[int], np.ndarray]]) -> str:
    """Recall@1, mean and range over the runs."""
    epochs = next(iter(curves.values()))[0]
    lines = ["| Recall@1 (%) | " + " | ".join(f"epoch {epoch}" for epoch in epochs) + " |"]
    lines.append("|---|" + "---|" * len(epochs))
    for name, (_, values) in curves.items():
        cells = [f"{column.mean():.1f} ({column.min():.1f} to {column.max():.1f})" for column in values[:, :, 0].T]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(curves: dict[str, tuple[list[int], np.ndarray]], path: Path) -> None:
    """A panel for each group of queries."""
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    size = (2.9 * len(curves), 2.9)
    drawing, panels = pyplot.subplots(1, len(curves), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, (name, (epochs, values)) in zip(panels[0], curves.items(), strict=True):
        for column, (n, color) in enumerate(zip(N_VALUES, COLOURS, strict=True)):
            runs = values[:, :, column]
            axes.plot(epochs, runs.mean(axis=0), color=color, marker="o", markersize=4, label=f"Recall@{n}")
            axes.fill_between(epochs, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.15, linewidth=0)
        axes.set(title=name, xlabel="epoch", xticks=epochs)
        axes.grid(axis="y", color="0.9")
    panels[0, 0].set_ylabel(f"recall (%), {next(iter(curves.values()))[1].shape[0]} runs")
    panels[0, 0].legend(frameon=False, loc="lower right")
    drawing.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the runs' curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs with the same validation")
    parser.add_argument("--output", type=Path, default=Path("docs/bundled_curve.png"))
    args = parser.parse_args(arguments)
    curves = read_curves(args.runs, N_VALUES)
    print(table(curves))
    figure(curves, args.output)
    print(f"figure in {args.output}")


if __name__ == "__main__":
    main()
