"""Two processes do what one does: the same mining, the same steps, the same validation, within rounding."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import command_line, scalars

from patchnetvlad.checkpoints import read_checkpoint
from patchnetvlad.commands.training import train
from patchnetvlad.distributed import Processes
from patchnetvlad.training_data import read_cities

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def test_two_processes_equal_one(msls: Path, tmp_path: Path) -> None:
    # Steps of 3 sets: one process has two of them and the other one, and in a last step of one set none
    more = ["--nEpochs", "2", "--set", "train.batchsize=3", "--set", "train.lrstep=5", "--save_every_epoch"]
    done = finished([*LAUNCH, str(ROOT / "train.py"), *command_line(msls, tmp_path / "two", *more)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoints in") == 1
    assert train(command_line(msls, tmp_path / "one", *more)) == 0
    folders = one, two = [next((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert scalars(two, "Train/nNeg") == scalars(one, "Train/nNeg")
    losses = [np.array(list(scalars(folder, "Train/Loss").values())) for folder in folders]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for epoch in (1, 2):
        states = [read_checkpoint(f / f"checkpoints/checkpoint_epoch{epoch}.pth.tar").state for f in folders]
        moved = 0.0
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)
            start = read_checkpoint(one / "checkpoints/checkpoint_epoch1.pth.tar").state[key]
            moved = max(moved, float((value - start).abs().max()))
        assert epoch == 1 or moved > 1e-5  # the steps are larger than the tolerance
    for n in (1, 5, 10):
        assert scalars(two, f"Val/Recall@{n}") == pytest.approx(scalars(one, f"Val/Recall@{n}"))


DISTURBED = """
import sys
from patchnetvlad import training
from patchnetvlad.commands.training import train

describe = training.Describer.__call__

def disturbed(self, *args, **options):
    rows = describe(self, *args, **options)
    return rows[::-1].copy() if self._processes.rank else rows

training.Describer.__call__ = disturbed
raise SystemExit(train(sys.argv[1:]))
"""


def test_the_first_process_decides(msls: Path, tmp_path: Path) -> None:
    """The second one sees other descriptors, as another card might give: it learns from the first one's triplets, and
    ends with it. Each of them finds one of the two pictures that cannot be read."""
    shutil.copytree(msls / "train_val", tmp_path / "msls/train_val")
    (tmp_path / "disturbed.py").write_text(DISTURBED)
    for picture in read_cities(msls, ["trondheim"])[0].queries.paths[:2]:
        copy = tmp_path / "msls" / picture.relative_to(msls)
        copy.write_bytes(copy.read_bytes()[:900])
    more = ["--nEpochs", "9", "--skip_unreadable", "--set", "train.patience=1", "--set", "train.lr=1e-12"]
    folders = [tmp_path / "two", tmp_path / "one"]
    two, one = (command_line(tmp_path / "msls", folder, *more) for folder in folders)
    done = finished([*LAUNCH, str(tmp_path / "disturbed.py"), *two])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out: 2 of 90 pictures") == 1
    assert train(one) == 0
    two_run, one_run = (next(folder.iterdir()) for folder in folders)
    assert scalars(two_run, "Train/nNeg") == scalars(one_run, "Train/nNeg")
    losses = [np.array(list(scalars(folder, "Train/Loss").values())) for folder in (two_run, one_run)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert scalars(two_run, "Val/Recall@5") == pytest.approx(scalars(one_run, "Val/Recall@5"))


def test_a_mistake_ends_all_processes(msls: Path, tmp_path: Path) -> None:
    arguments = command_line(msls, tmp_path, "--set", "train.cities=boston")
    done = finished([*LAUNCH, str(ROOT / "train.py"), *arguments])
    assert done.returncode != 0
    assert "no such folder, for city boston" in done.stderr


@pytest.mark.parametrize(
    ("told", "missing"), [({"WORLD_SIZE": "2"}, "RANK is not set"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two")]
)
def test_several_processes_that_torchrun_did_not_start_are_refused(
    told: dict[str, str],
    missing: str,
    msls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as a job of a cluster that sets a part of the variables for another program."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert train(command_line(msls, tmp_path / "runs")) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and missing in line and "torchrun" in line
    assert not (tmp_path / "runs").exists()


LATE = """
import os, sys, time
from datetime import timedelta

from torch.distributed import distributed_c10d

distributed_c10d.default_pg_timeout = timedelta(seconds=1)

import torch

from patchnetvlad.distributed import processes

with processes(torch.device("cpu")) as place:
    place.from_first("both are there")
    if place.is_first:
        time.sleep(4)
    print(place.rank, place.from_first(os.environ["RANK"] + " decides"), flush=True)
"""


def test_the_others_wait_for_a_first_process_that_is_late(tmp_path: Path) -> None:
    """Longer than torch would have them wait by itself, which here is a second."""
    (tmp_path / "late.py").write_text(LATE)
    done = finished([*LAUNCH, str(tmp_path / "late.py")])
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["0 0 decides", "1 0 decides"]


def test_shares_cover_everything_once() -> None:
    ranks = [Processes(rank, 3, torch.device("cpu")) for rank in range(3)]
    items = list(range(10))
    assert sorted(item for rank in ranks for item in rank.share(items)) == items
    assert [rank.is_first for rank in ranks] == [True, False, False]
    assert Processes(0, 1, torch.device("cpu")).gathered({"a": 1}) == [{"a": 1}]
