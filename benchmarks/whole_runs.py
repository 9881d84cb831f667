#!/usr/bin/env python3
"""Whole runs of feature_match.py from cold files: 100 queries with 100 candidates each, for every preset.

    python benchmarks/whole_runs.py --work WORK --output benchmarks

renders a city, describes it with a model fitted on pictures (see matching.py; builtin.ini has its own), lets the
system forget the files and times the run. Writes whole_runs.json, whole_runs.md and whole_runs.png. WORK takes 10 GB
for performance.ini, less with fewer --queries; a preset's features are removed after it, and before that a run that was
ended goes on. --describe_only ends before the timed runs, so that these can wait for a quiet machine. A checkpoint
WORK/PRESET.pth.tar that is there is taken as it is.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from matching import fit_on_examples, project
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from patchnetvlad.checkpoints import write_checkpoint
from patchnetvlad.config import Config
from patchnetvlad.encoders.table import encoder_geometry
from patchnetvlad.examples.rendered_city import make_city, write_city
from patchnetvlad.ini import load_config
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.paths import require_file

QUERIES = CANDIDATES = 100  # the database has as many pictures as a query has candidates
ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: object) -> tuple[float, float, str]:
    """Seconds of a command, its largest memory in GB, and what it says."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        started = time.perf_counter()
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{text}")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6, text


def forget(folder: Path) -> None:
    """Let the system drop what it keeps of a folder's files, so that they are read from the disk again."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_rate(folder: Path) -> float:
    """Bytes a second of reading a folder's files from the disk, one after the other."""
    forget(folder)
    started = time.perf_counter()
    size = sum(len(path.read_bytes()) for path in folder.rglob("*.npy"))
    return size / (time.perf_counter() - started)


def product_seconds(config: Config) -> float:
    """Seconds a query of the float32 products of its patches with those of its candidates, with all cores."""
    params = config.global_params
    grids = PatchGrid.of_map((30, 40), params.patch_sizes, params.strides, encoder_geometry(params.backbone))
    rows = [torch.randn(len(grid), params.num_pcs) for grid in grids]
    least = min(_timed(rows) for _ in range(5))
    return CANDIDATES * least


def _timed(rows: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    for patches in rows:
        patches @ patches.T
    return time.perf_counter() - started


def checkpoint(preset: str, config: Config, work: Path) -> Path:
    """That of a preset, made unless it is there."""
    path = work / f"{preset}.pth.tar"
    if not path.exists():
        write_checkpoint(path, project(*fit_on_examples(), config))
    return path


def describe(preset: str, config: Config, work: Path, queries: int) -> list[object]:
    """Describe the database and so many queries; the options of a run with them."""
    options: list[object] = ["--config_path", require_file(f"{preset}.ini", "configs")]
    if preset != "builtin":
        options += ["--set", f"global_params.resumepath={checkpoint(preset, config, work)}"]
    options += ["--dataset_root_dir", work / "city_images"]
    lists = {kind: work / "dataset_imagenames" / f"city_imageNames_{kind}.txt" for kind in ("index", "query")}
    first = work / f"first_{queries}_queries.txt"
    first.write_text("".join(lists["query"].read_text().splitlines(keepends=True)[:queries]))
    lists["query"] = first
    folders = {kind: work / preset / kind for kind in lists}
    for kind, listed in lists.items():
        run("feature_extract.py", *options, "--dataset_file_path", listed, "--output_features_dir", folders[kind])
    for kind, listed in lists.items():
        options += [f"--{kind}_file_path", listed, f"--{kind}_input_features_dir", folders[kind]]
    return options


def measure(preset: str, work: Path, queries: int) -> dict[str, float]:
    """Seconds a query of a preset's whole run and of its stages, memory, bytes, and the least that they could take."""
    config = load_config(require_file(f"{preset}.ini", "configs"))
    options = describe(preset, config, work, queries)
    folders = {kind: work / preset / kind for kind in ("index", "query")}
    sizes = {kind: sum(path.stat().st_size for path in folder.rglob("*.npy")) for kind, folder in folders.items()}
    rate = read_rate(folders["index"])
    for folder in folders.values():
        forget(folder)
    set_top = ["--set", f"feature_match.n_values_all={CANDIDATES}"]
    seconds, memory, text = run("feature_match.py", *options, *set_top, "--result_save_folder", work / "results")
    retrieval = _logged(r"retrieval: .* in ([0-9.]+) s", text)
    reranking = _logged(r"re-ranking: [0-9]+ pairs in ([0-9.]+) s", text)
    shutil.rmtree(work / preset)
    return {
        "queries": queries,
        "s a query": seconds / queries,
        "retrieval": retrieval / queries,
        "re-ranking": reranking / queries,
        "rest": (seconds - retrieval - reranking) / queries,
        "one float32 product": 0.0 if preset == "builtin" else product_seconds(config),
        "reading": sum(sizes.values()) / rate / queries,
        "memory, GB": memory,
        "MB a picture": sizes["index"] / CANDIDATES / 1e6,
        "disk, GB/s": rate / 1e9,
    }


def _logged(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    if match is None:
        sys.exit(f"the log says nothing of {pattern}:\n{text}")
    return float(match.group(1))


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as Markdown."""
    columns = list(next(iter(results.values())))
    lines = ["| preset | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for preset, values in results.items():
        lines.append(f"| {preset} | " + " | ".join(f"{value:.3g}" for value in values.values()) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    """Where a query's seconds go, beside what the products and the disk alone would take."""
    figure = Figure(figsize=(8, 0.9 * len(results) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    marks = {  # side by side on the logarithmic axis, where lengths of parts would not add up
        "s a query": ("o", "#222222", "a query"),
        "re-ranking": ("s", "#3b6ea8", "re-ranking"),
        "rest": ("D", "#9aa0a6", "start, files, results"),
        "retrieval": ("^", "#e0a030", "retrieval"),
        "one float32 product": ("|", "#d02020", "its float32 products alone"),
        "reading": ("|", "#208020", "reading both folders alone"),
    }
    for column, (mark, colour, label) in marks.items():
        shown = [(results[preset][column], place) for place, preset in enumerate(results) if results[preset][column]]
        size = 22 if mark == "|" else 7
        axes.plot(*zip(*shown, strict=True), mark, color=colour, markersize=size, markeredgewidth=2, label=label)
    axes.set(xscale="log", xlabel="seconds a query", yticks=range(len(results)), yticklabels=list(results))
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.savefig(path, dpi=110)


@torch.inference_mode()
def main() -> None:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["builtin", "storage", "speed", "performance"])
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--describe_only", action="store_true", help="make the features and leave them there")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    if not (args.work / "city_images").exists():
        write_city(make_city(50, (2, 2), (2, 2), seed=3), args.work, "city")
    if args.describe_only:
        for preset in args.presets:
            describe(preset, load_config(require_file(f"{preset}.ini", "configs")), args.work, args.queries)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    stored = args.output / "whole_runs.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}
    for preset in args.presets:
        results[preset] = measure(preset, args.work, args.queries)
        print(preset, json.dumps(results[preset], indent=1), flush=True)
        stored.write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "whole_runs.md").write_text(table(results))
    plot(results, args.output / "whole_runs.png")
    print(table(results))


if __name__ == "__main__":
    main()
