"""Runs that are interrupted and finished give what a run in peace gives; benchmarks/soak.py does it at length."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import EXAMPLES, example_names, tiny_model

from patchnetvlad.commands.features import feature_extract

SOAK = Path(__file__).parent.parent / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["extract", "match", "train", "fit"])
def test_a_run_killed_at_random_moments_ends_as_one_in_peace(stage: str) -> None:
    # In a process of its own: it forks, and torch's threads here would not survive that
    command = [sys.executable, str(SOAK), "--moments", "3", "--stages", stage, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["different"] == []
    assert sum(told["counts"].values()) == 3


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_cut_off_global_descriptors_are_made_again(share: float, tmp_path: Path) -> None:
    options = tiny_model(tmp_path)
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in example_names("database")[:3]))
    places = ["--dataset_root_dir", str(EXAMPLES), "--dataset_file_path", str(tmp_path / "list.txt")]
    command = [*options, *places, "--output_features_dir", str(tmp_path / "out"), "-q", "--nocuda"]
    assert feature_extract(command) == 0
    path = tmp_path / "out" / "globalfeats.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert feature_extract(command) == 0
    assert path.read_bytes() == whole
