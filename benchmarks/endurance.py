#!/usr/bin/env python3
"""Do memory and open files stay flat over a long run? Extraction of many small pictures, matching of many queries.

    python benchmarks/endurance.py --output docs

Pictures are drawn at 128×96 with some thirty rectangles each and described by a small RootSIFT model; every query's 20
candidates are matched with RANSAC, through a cache of 50 MB that holds a fraction of the database. Ten times a second
the memory in use, the open files of the process and what its progress bar says are noted. Writes endurance.png; exit
status 1 where the last tenth of a run has over 5 % more memory, or more open files, than its second tenth. Linux only.
"""

import argparse
import io
import os
import re
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from patchnetvlad.checkpoints import write_checkpoint
from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD

matplotlib.use("Agg")
from matplotlib import pyplot

SIZE = (128, 96)  # width, height
EVERY = 0.1  # seconds between two looks
GROWTH = 1.05  # of memory from the second tenth of a run to the last, for one that counts as flat


class Bar(io.StringIO):
    """Takes the place of stderr; keeps how far a command's progress bar of one name is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._line = re.compile(rf"{name}: .*?(\d+)/\d+")
        self.done = 0

    def write(self, text: str) -> int:
        for progress in self._line.finditer(text):
            self.done = int(progress[1])
        return len(text)


@dataclass
class Watch:
    """Memory and open files of this process while a block runs that does `total` things, under a progress bar."""

    name: str
    total: int
    bar: Bar
    seconds: list[float] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        began = time.perf_counter()
        while not self._ended.wait(EVERY):
            self.seconds.append(time.perf_counter() - began)
            self.done.append(self.bar.done)
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
            self.files.append(len(list(Path("/proc/self/fd").iterdir())))

    def early_and_late(self, values: list[float] | list[int]) -> tuple[float, float]:
        """The mean over the second tenth of what was to be done, after everything has been set up, and over the last.

        Before and after it the command does other things: it checks pictures, it writes files.
        """
        share = np.array(self.done) / self.total
        early, late = (share > 0.1) & (share <= 0.2), (share > 0.9) & (share < 1)
        if not early.any() or not late.any():
            sys.exit(f"{self.name}: over before memory could be looked at (more pictures or queries)")
        return float(np.array(values)[early].mean()), float(np.array(values)[late].mean())

    @property
    def flat(self) -> bool:
        """Whether neither grows."""
        (memory, later), (files, files_later) = self.early_and_late(self.megabytes), self.early_and_late(self.files)
        return later <= GROWTH * memory and files_later <= files + 1

    def __str__(self) -> str:
        memory, files = self.early_and_late(self.megabytes), self.early_and_late(self.files)
        return (
            f"{self.name}: {self.seconds[-1]:.0f} s; between 10 and 20 % memory {memory[0]:.0f} MB, open files "
            f"{files[0]:.1f}; in the last tenth {memory[1]:.0f} MB, {files[1]:.1f}: {'flat' if self.flat else 'GROWS'}"
        )


def main() -> int:
    """Draw, describe, match, plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=10_000, metavar="N", help="of the database (default 10000)")
    parser.add_argument("--queries", type=int, default=2_000, metavar="N", help="default 2000")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for endurance.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endurance-") as name:
        watches = endure(Path(name), args.pictures, args.queries)
    plot(watches, args.output / "endurance.png")
    print("\n".join(map(str, watches)))
    return 0 if all(watch.flat for watch in watches) else 1


def endure(folder: Path, num_pictures: int, num_queries: int) -> list[Watch]:
    """One watch over extraction, one over matching."""
    draw_pictures(folder / "pictures", num_pictures)
    options = [*small_model(folder), "--device", "cpu"]
    lists = {"index": range(num_pictures), "query": range(0, num_pictures, max(1, num_pictures // num_queries))}
    for side, numbers in lists.items():
        names = [f"{number:06}.png\n" for number in numbers][: num_queries if side == "query" else None]
        (folder / f"{side}.txt").write_text("".join(names), encoding="utf-8")
    root = ["--dataset_root_dir", str(folder / "pictures")]
    extracting, matching = Bar("Describing"), Bar("Re-ranking")
    with (
        redirect_stderr(extracting),
        Watch(f"extraction of {num_pictures:,} pictures", num_pictures, extracting) as one,
    ):
        _succeed(feature_extract([*options, *root, *_extraction(folder, "index")]), folder / "index" / "extract.log")
    _succeed(feature_extract([*options, *root, *_extraction(folder, "query"), "-q"]), folder / "query" / "extract.log")
    places = ["--result_save_folder", str(folder / "results")]
    for side in lists:
        places += [f"--{side}_file_path", str(folder / f"{side}.txt"), f"--{side}_input_features_dir"]
        places += [str(folder / side)]
    with redirect_stderr(matching), Watch(f"matching of {num_queries:,} queries", num_queries, matching) as two:
        _succeed(feature_match([*options, *root, *places]), folder / "results" / "match.log")
    return [one, two]


def draw_pictures(folder: Path, count: int) -> None:
    """Rectangles of chance colours, so that RootSIFT finds corners."""
    folder.mkdir(parents=True)
    for number in range(count):
        chance = np.random.default_rng(number)
        picture = np.full((SIZE[1], SIZE[0], 3), chance.integers(256, size=3), np.uint8)
        for _ in range(30):
            left, top = chance.integers(SIZE[0]), chance.integers(SIZE[1])
            picture[top : top + chance.integers(4, 20), left : left + chance.integers(4, 20)] = chance.integers(
                256, size=3
            )
        Image.fromarray(picture).save(folder / f"{number:06}.png", compress_level=1)


def small_model(folder: Path) -> list[str]:
    """Write a checkpoint; the options that make a command use it."""
    torch.manual_seed(0)
    model = PlaceModel("rootsift", "patchnetvlad", 4, 0, (2,), (1,))
    samples = torch.nn.functional.normalize(torch.rand(400, 128) ** 4, dim=1)
    assert isinstance(model.pool, NetVLAD)
    model.pool.initialise(samples[:4], samples)
    write_checkpoint(folder / "small.pth.tar", model)
    changes = {
        "global_params.resumepath": str(folder / "small"),
        "global_params.num_pcs": "0",
        "global_params.patch_sizes": "2",
        "global_params.strides": "1",
        "feature_match.patchweights2use": "1",
        "feature_match.rerank_top": "20",
        "feature_match.matcher": "RANSAC",
        "feature_match.cache_gb": "0.05",
    }
    for section in ("feature_extract", "feature_match"):
        changes |= {f"{section}.imageresizew": str(SIZE[0]), f"{section}.imageresizeh": str(SIZE[1])}
    overrides = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["--config_path", "rootsift.ini", *overrides]


def _extraction(folder: Path, side: str) -> list[str]:
    return ["--dataset_file_path", str(folder / f"{side}.txt"), "--output_features_dir", str(folder / side)]


def _succeed(status: int, log: Path) -> None:
    if status:
        sys.exit(log.read_text(encoding="utf-8") if log.exists() else f"exit status {status}")


def plot(watches: list[Watch], path: Path) -> None:
    """Memory and open files over time, a column for each watch."""
    figure, axes = pyplot.subplots(2, len(watches), figsize=(9, 4.5), sharex="col", squeeze=False)
    for column, watch in enumerate(watches):
        memory, files = axes[:, column]
        memory.plot(watch.done, watch.megabytes, color="#1b6ca8")
        memory.set_title(watch.name)
        files.plot(watch.done, watch.files, color="#d1495b")
        files.set_xlabel("done")
        for axis, values in ((memory, watch.megabytes), (files, watch.files)):
            axis.set_ylim(0, 1.15 * max(values))
    axes[0, 0].set_ylabel("memory, MB")
    axes[1, 0].set_ylabel("open files")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
