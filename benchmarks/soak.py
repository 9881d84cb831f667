#!/usr/bin/env python3
"""Interrupt extraction, matching, training and fitting at random moments, finish them, and compare with a run in peace.

    python benchmarks/soak.py --moments 50

Faults: SIGKILL, SIGTERM, SIGINT, files cut short as a lost machine leaves them, a disk that fills up (a small tmpfs,
where this process may mount one). After each fault the same command runs again until it succeeds; then every byte of
features, predictions, scores and recalls, every weight and every loss must be that of the run in peace. Only logs, the
manifest's date and the order of its lines may differ. Exit status 1 when something differs; docs/reliability.md has the
figures.
"""

import argparse
import hashlib
import json
import mmap
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: children are forked, which threads would not survive

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
STAGES = ("extract", "match", "train", "fit")
MOST_TRIES = 20  # of one command, before it counts as one that never finishes
LOGS = (".log", ".lock")


@dataclass
class Stage:
    """One command whose outcome is compared.

    arguments: of the script, for results in a folder; outcome: what must be equal afterwards, by name; seconds,
    num_bytes and expected: time, bytes on disk without logs, and outcome of the run in peace.
    """

    script: str
    arguments: Callable[[Path], list[str]]
    outcome: Callable[[Path], dict[str, str]]
    seconds: float = 0.0
    num_bytes: int = 0
    expected: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Parse, run in peace, run under faults, tell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=50, metavar="N", help="faults in all (default 50)")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, help="which commands")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and faults")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        told = soak(Path(folder), args.moments, args.stages, random.Random(args.seed))
    print(json.dumps(told) if args.json else "\n".join(lines(told)))
    return 1 if told["different"] else 0


def lines(told: dict[str, object]) -> list[str]:
    """The outcome for people."""
    counts = told["counts"]
    assert isinstance(counts, dict)
    rows = [f"{stage:<8} {fault:<10} {number:3}" for (stage, _, fault), number in _split(counts)]
    different = told["different"]
    assert isinstance(different, list)
    return [*rows, f"{sum(counts.values())} faults, {len(different)} outcomes differ", *map(str, different)]


def _split(counts: dict[str, int]) -> list[tuple[tuple[str, str, str], int]]:
    return [(key.partition(" "), number) for key, number in sorted(counts.items())]


def soak(folder: Path, moments: int, names: Sequence[str], chance: random.Random) -> dict[str, object]:
    """Counts of faults, and what differed."""
    _import_what_commands_use()
    stages = _stages(folder)
    _prepare(folder, stages, set(names))
    counts: Counter[str] = Counter()
    faults = _faults()
    different: list[str] = []
    for moment in range(moments):
        name = names[moment % len(names)]
        fault = chance.choice(faults)
        work = folder / f"moment{moment}"
        try:
            FAULTS[fault](stages[name], work, chance)
            finish(stages[name], work)
            outcome = stages[name].outcome(work)
            wrong = [
                key
                for key in outcome.keys() | stages[name].expected.keys()
                if outcome.get(key) != stages[name].expected.get(key)
            ]
            different += [f"moment {moment}, {name} after {fault}: {key}" for key in sorted(wrong)]
        except SoakError as error:
            different.append(f"moment {moment}, {name} after {fault}: {error}")
        finally:
            _unmount(work)
            shutil.rmtree(work, ignore_errors=True)
        counts[f"{name} {fault}"] += 1
    return {"counts": dict(counts), "different": different}


class SoakError(Exception):
    """What must not happen: a traceback, a command that never finishes."""


def start(stage: Stage, work: Path) -> int:
    """Fork a child that runs the stage's command; its process id. Output goes to a file beside the folder."""
    work.mkdir(parents=True, exist_ok=True)
    arguments = stage.arguments(work)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        out = os.open(f"{work}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = [stage.script, *arguments]
        runpy.run_path(str(ROOT / stage.script), run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Exit status of a child, negative for a signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(stage: Stage, work: Path) -> None:
    """Run the command until it succeeds; one that refuses must say why in one line."""
    for _ in range(MOST_TRIES):
        status = wait(start(stage, work))
        if status == 0:
            return
        text = Path(f"{work}.out").read_text(encoding="utf-8", errors="replace")
        if "Traceback" in text:
            raise SoakError(f"traceback: {text.strip().splitlines()[-1]}")
    raise SoakError(f"does not finish: {text.strip().splitlines()[-1]}")


def killed(which: str) -> Callable[[Stage, Path, random.Random], None]:
    """A fault: the command is sent a signal at a random moment."""

    def fault(stage: Stage, work: Path, chance: random.Random) -> None:
        child = start(stage, work)
        time.sleep(chance.uniform(0, stage.seconds))
        os.kill(child, SIGNALS[which])
        status = wait(child)
        if status not in (0, 130, -SIGNALS[which]):
            raise SoakError(f"status {status}: {Path(f'{work}.out').read_text(encoding='utf-8').strip()[-300:]}")

    return fault


def cut_short(stage: Stage, work: Path, chance: random.Random) -> None:
    """A fault: killed, and some of the files written last are cut, as a lost machine leaves them.

    Files that are flushed to the disk before they get their names are left whole, and so is the first line of a
    manifest: only extraction fills rows in place and adds lines.
    """
    killed("SIGKILL")(stage, work, chance)
    files = [path for path in work.rglob("*") if path.is_file() and path.stat().st_size]
    if stage.script != "feature_extract.py":
        files = [path for path in files if path.name.startswith(".") or path.suffix in LOGS]
    files.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in chance.sample(files[-6:], min(2, len(files[-6:]))):
        flushed = path.read_bytes().find(b"\n") + 1 if path.name == "manifest.jsonl" else 0
        os.truncate(path, chance.randrange(flushed, path.stat().st_size + 1))


def disk_full(stage: Stage, work: Path, chance: random.Random) -> None:
    """A fault: the folder lies on a disk too small for what is written, which then becomes large enough.

    What must be there at the end does not fit, logs apart, whose loss ends no command; a tmpfs rounds up to pages.
    """
    work.mkdir(parents=True)
    pages = int(stage.num_bytes * chance.uniform(0.1, 0.9)) // mmap.PAGESIZE
    _mount(work, f"size={max(1, pages) * mmap.PAGESIZE}")  # 0 would be no limit
    status = wait(start(stage, work))
    text = Path(f"{work}.out").read_text(encoding="utf-8")
    if status != 2 or "Traceback" in text:
        raise SoakError(f"disk full ended with status {status}: {text.strip()[-300:]}")
    _mount(work, "remount,size=2g")


FAULTS: dict[str, Callable[[Stage, Path, random.Random], None]] = {
    **{name: killed(name) for name in SIGNALS},
    "cut short": cut_short,
    "disk full": disk_full,
}


def _faults() -> list[str]:
    return [*SIGNALS, "cut short", *(["disk full"] if _may_mount() else [])]


def _may_mount() -> bool:
    if os.name != "posix" or os.geteuid() or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", folder], capture_output=True).returncode == 0


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def _unmount(folder: Path) -> None:
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def _prepare(folder: Path, stages: dict[str, Stage], names: set[str]) -> None:
    """Pictures, and the run in peace of every stage that is needed."""
    if "train" in names:
        render = ["--output_dir", str(folder / "msls"), "--width", "96", "--height", "72", "--places", "0.3"]
        rendering = Stage("tools/render_msls.py", lambda _: render, lambda _: {})
        finish(rendering, folder / "rendering")
    needed = [name for name in STAGES if name in names or (name == "extract" and "match" in names)]
    for name in needed:
        began = time.perf_counter()
        finish(stages[name], folder / name)
        stages[name].seconds = time.perf_counter() - began
        files = [path for path in (folder / name).rglob("*") if path.is_file() and path.suffix not in LOGS]
        stages[name].num_bytes = sum(path.stat().st_size for path in files)
        stages[name].expected = stages[name].outcome(folder / name)


def _stages(folder: Path) -> dict[str, Stage]:
    examples = ROOT / "example_images"
    small = ["--config_path", "rootsift.ini", "--device", "cpu"]
    for section in ("feature_extract", "feature_match", "train"):
        for key, value in (("imageresizew", 192), ("imageresizeh", 144)):
            small += ["--set", f"{section}.{key}={value}"]
    lists = {side: f"example_imageNames_{side}.txt" for side in ("index", "query")}

    def extract(work: Path) -> list[str]:
        options = ["--dataset_root_dir", str(examples), "--dataset_file_path", lists["index"]]
        return [*small, *options, "--output_features_dir", str(work)]

    def match(work: Path) -> list[str]:
        options = ["--dataset_root_dir", str(examples), "--ground_truth_path", str(_own_truth(folder))]
        for side in lists:  # the database is its own set of queries: 30 pictures, each found
            options += [f"--{side}_file_path", lists["index"], f"--{side}_input_features_dir", str(folder / "extract")]
        return [*small, *options, "--result_save_folder", str(work), "--formats", "kapture", "hloc"]

    def train(work: Path) -> list[str]:
        options = ["--config_path", "train.ini", "--device", "cpu", "--dataset_root_dir", str(folder / "msls")]
        options += [
            "--save_path",
            str(work),
            "--cache_path",
            str(folder / "cache"),
            "--identifier",
            "soak",
            "--nEpochs",
            "2",
        ]
        changes = {"cities": "trondheim,london", "imageresizew": 96, "imageresizeh": 72, "num_clusters": 4, "lr": 0.01}
        changes |= {"subset_queries": 20, "subset_negatives": 20}
        options += [word for key, value in changes.items() for word in ("--set", f"train.{key}={value}")]
        options += ["--set", "global_params.backbone=rootsift"]
        checkpoint = _newest(work, "checkpoint.pth.tar")
        return [*options, "--resume_path", str(checkpoint)] if checkpoint else options

    def fit(work: Path) -> list[str]:
        options = ["--dataset_root_dir", str(examples / "database"), "--output_path", str(work / "own_WPCA16.pth.tar")]
        options += ["--overwrite"] if (work / "own_WPCA16.pth.tar").exists() else []
        return [*small, *options, "--set", "global_params.num_pcs=16", "--set", "train.num_clusters=4"]

    return {
        "extract": Stage("feature_extract.py", extract, _files),
        "match": Stage("feature_match.py", match, _files),
        "train": Stage("train.py", train, _learned),
        "fit": Stage("tools/fit_model.py", fit, _files),
    }


def _own_truth(folder: Path) -> Path:
    """Ground truth of the database pictures as their own queries."""
    import numpy as np

    path = folder / "own.npz"
    if not path.exists():
        with np.load(ROOT / "dataset_gt_files" / "example.npz") as arrays:
            np.savez(path, utmQ=arrays["utmDb"], utmDb=arrays["utmDb"], posDistThr=arrays["posDistThr"])
    return path


def _files(work: Path) -> dict[str, str]:
    """Hash of every file; a manifest's pictures in their order, without its date."""
    hashes: dict[str, str] = {}
    for path in sorted(work.rglob("*")):
        if not path.is_file() or path.suffix in LOGS:
            continue
        content = path.read_bytes()
        if path.name == "manifest.jsonl":
            records = [json.loads(line) for line in content.splitlines()]
            records[0].pop("created")
            last = {record["index"]: record for record in records[1:]}
            content = json.dumps([records[0], *(last[index] for index in sorted(last))]).encode()
        hashes[str(path.relative_to(work))] = hashlib.sha256(content).hexdigest()
    return hashes


def _learned(work: Path) -> dict[str, str]:
    """Hash of every weight of the last and the best checkpoint of the newest run, and every loss."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hashes: dict[str, str] = {}
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        path = _newest(work, name)
        state = torch.load(path, weights_only=True)["state_dict"] if path else {}
        hashes |= {f"{name} {key}": hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in state.items()}
    losses: dict[int, float] = {}
    run = _newest(work, "checkpoint.pth.tar")
    for events in sorted(run.parent.parent.rglob("events.*") if run else []):
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        if "Train/Loss" in accumulator.Tags()["scalars"]:
            losses |= {event.step: event.value for event in accumulator.Scalars("Train/Loss")}
    return hashes | {f"loss of step {step}": repr(value) for step, value in losses.items()}


def _newest(work: Path, name: str) -> Path | None:
    paths = sorted(work.glob(f"*/checkpoints/{name}"), key=lambda path: path.stat().st_mtime_ns)
    return paths[-1] if paths else None


def _import_what_commands_use() -> None:
    """Once, so that a forked child starts at once and moments fall into its work."""
    import patchnetvlad.commands.features
    import patchnetvlad.commands.training  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
