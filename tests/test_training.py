"""Training: what a run writes, that it resumes exactly, and how it stops when something is wrong."""

import csv
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import published_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from patchnetvlad import training
from patchnetvlad.checkpoints import read_checkpoint
from patchnetvlad.commands.training import train
from patchnetvlad.config import LOSSES, Config, FeatureExtractConfig, FeatureMatchConfig, GlobalParams, TrainConfig
from patchnetvlad.distributed import Processes
from patchnetvlad.errors import UserError
from patchnetvlad.ini import load_config
from patchnetvlad.model import PlaceModel
from patchnetvlad.training_run import RunOptions, Source, TrainedRun, read_training_data, train_model

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 96, 72
ONE_PROCESS = Processes(0, 1, torch.device("cpu"))


def small(backbone: str = "rootsift", **train: Any) -> Config:
    """A configuration that trains on the small tree in seconds."""
    size = {"imageresizew": WIDTH, "imageresizeh": HEIGHT}
    settings: dict[str, Any] = {
        "cities": ("trondheim", "london"),
        "num_clusters": 4,
        "lr": 0.01,
        "lrstep": 1,
        "batchsize": 2,
        "subset_queries": 7,
        "subset_negatives": 12,
        "pretrained": "none",
        **size,
        **train,
    }
    return Config(
        FeatureExtractConfig(**size),
        FeatureMatchConfig(**size, n_values_all=(1, 5, 10)),
        GlobalParams(pooling="netvlad", backbone=backbone, threads=2),
        TrainConfig(**settings),
    )


def run(msls: Path, folder: Path, config: Config | None = None, epochs: int = 3, **options: Any) -> TrainedRun:
    chosen = RunOptions(msls, save_path=folder, num_epochs=epochs, **options)
    return train_model(config or small(), chosen, ONE_PROCESS)


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """Step to value of a tag, by TensorBoard's own reader."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.fixture(scope="module")
def trained(msls: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """An uninterrupted run of three epochs with everything kept."""
    folder = tmp_path_factory.mktemp("runs")
    return run(msls, folder, save_every_epoch=True, cache_path=folder / "cache")


def test_a_run_writes_everything(trained: TrainedRun) -> None:
    assert trained.folder.name.endswith("_mapillary_nopanos")
    time.strptime(trained.folder.name.removesuffix("_mapillary_nopanos"), "%b%d_%H-%M-%S")
    names = {path.name for path in (trained.folder / "checkpoints").iterdir()}
    epochs = {f"checkpoint_epoch{epoch}.pth.tar" for epoch in (1, 2, 3)}
    assert names == {"checkpoint.pth.tar", "model_best.pth.tar"} | epochs
    copied = load_config(trained.folder / "config.ini")
    assert copied.train == small().train and copied.global_params.backbone == "rootsift"
    clusters = trained.folder.parent / "cache/centroids/rootsift_mapillary_4_desc_cen.hdf5"
    with h5py.File(clusters) as file:
        assert file["centroids"].shape == (4, 128)
        np.testing.assert_allclose(np.linalg.norm(file["descriptors"][:], axis=1), 1, atol=1e-5)


def test_tensorboard_holds_the_course(trained: TrainedRun) -> None:
    losses = scalars(trained.folder, "Train/Loss")
    assert list(losses) == list(range(1, len(losses) + 1))
    negatives = scalars(trained.folder, "Train/nNeg")
    assert set(negatives) == set(losses) and all(1 <= value <= 2 * 5 for value in negatives.values())
    averages = scalars(trained.folder, "Train/AvgLoss")
    assert list(averages) == [1, 2, 3]
    per_epoch = len(losses) // 3
    if len(losses) % 3 == 0:
        assert averages[1] == pytest.approx(np.mean([losses[step] for step in range(1, per_epoch + 1)]), rel=0.2)
    rates = scalars(trained.folder, "Train/LearningRate")
    assert list(rates.values()) == pytest.approx([0.01, 0.005, 0.0025])
    assert all(value > 0 for value in scalars(trained.folder, "Train/PicturesPerSecond").values())
    for n in (1, 5, 10):
        recalls = scalars(trained.folder, f"Val/Recall@{n}")
        assert list(recalls) == [0, 1, 2, 3]
        assert recalls[3] == pytest.approx(trained.recalls[n])
        cities = [scalars(trained.folder, f"Val_{city}/Recall@{n}")[3] for city in ("cph", "sf")]
        assert min(cities) - 1e-6 <= recalls[3] <= max(cities) + 1e-6


def test_the_best_checkpoint_is_the_best(trained: TrainedRun) -> None:
    recalls = scalars(trained.folder, "Val/Recall@5")
    best = read_checkpoint(trained.folder / "checkpoints/model_best.pth.tar")
    assert best.extras["best_score"] == pytest.approx(max(recalls.values()))
    assert best.extras["epoch"] == max(recalls, key=lambda epoch: (recalls[epoch], -epoch))
    assert trained.best_score == best.extras["best_score"]


class Killed(BaseException):
    """What stands for the end of the process."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end in the middle of that step, the weights just changed, nothing written."""
    whole_step = training.Trainer._step

    def interrupted(self: training.Trainer, *args: Any) -> float:
        loss = whole_step(self, *args)
        if self._learning.progress.step == step:
            raise Killed
        return loss

    monkeypatch.setattr(training.Trainer, "_step", interrupted)


@pytest.mark.parametrize("step", [1, 9, 17, 23])
def test_a_killed_run_resumes_exactly(
    step: int, trained: TrainedRun, msls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_at(step, patch)
        with pytest.raises(Killed):
            run(msls, tmp_path)
    (folder,) = tmp_path.iterdir()
    torch.manual_seed(step)  # the random state must come from the checkpoint
    resumed = run(msls, tmp_path, resume_path=folder / "checkpoints/checkpoint.pth.tar")
    assert resumed.folder == folder
    for tag in ("Train/Loss", "Train/nNeg", "Train/AvgLoss", "Train/LearningRate", "Val/Recall@1", "Val/Recall@5"):
        assert scalars(folder, tag) == scalars(trained.folder, tag), tag
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        ours, theirs = (read_checkpoint(place / "checkpoints" / name) for place in (folder, trained.folder))
        assert all(torch.equal(ours.state[key], theirs.state[key]) for key in theirs.state)
        assert torch.equal(ours.extras["random_state"]["cpu"], theirs.extras["random_state"]["cpu"])
        for key in ("epoch", "subset", "step", "best_score", "not_improved", "recalls"):
            assert ours.extras[key] == theirs.extras[key], key
        momenta = [extras["optimizer"]["state"] for extras in (ours.extras, theirs.extras)]
        for number, state in momenta[1].items():
            assert torch.equal(momenta[0][number]["momentum_buffer"], state["momentum_buffer"])


def test_a_resumed_run_goes_where_save_path_says(trained: TrainedRun, msls: Path, tmp_path: Path) -> None:
    """Elsewhere when --save_path says so, with the best model so far; in its own folder without it."""
    shutil.copytree(trained.folder, tmp_path / "first/Nov25_run")
    checkpoints = tmp_path / "first/Nov25_run/checkpoints"
    shutil.copy(checkpoints / "checkpoint_epoch2.pth.tar", checkpoints / "checkpoint.pth.tar")
    before = {path: path.read_bytes() for path in checkpoints.iterdir()}
    moved = run(msls, tmp_path / "second", resume_path=checkpoints / "checkpoint.pth.tar", identifier="on")
    assert moved.folder.parent == tmp_path / "second" and moved.folder.name.endswith("_on")
    assert {path: path.read_bytes() for path in checkpoints.iterdir()} == before
    last = read_checkpoint(moved.folder / "checkpoints/checkpoint.pth.tar")
    expected = read_checkpoint(trained.folder / "checkpoints/checkpoint.pth.tar")
    assert all(torch.equal(last.state[key], value) for key, value in expected.state.items())
    best = read_checkpoint(moved.folder / "checkpoints/model_best.pth.tar")
    assert best.extras["best_score"] == trained.best_score
    options = RunOptions(msls, num_epochs=3, resume_path=checkpoints / "checkpoint.pth.tar")
    assert train_model(small(), options, ONE_PROCESS).folder == checkpoints.parent
    assert (checkpoints / "checkpoint.pth.tar").read_bytes() != before[checkpoints / "checkpoint.pth.tar"]


def test_adam_resumes_exactly(msls: Path, tmp_path: Path) -> None:
    config = small(optim="ADAM", lr=0.001)
    whole = run(msls, tmp_path / "whole", config, epochs=2)
    half = run(msls, tmp_path / "half", config, epochs=1)
    resumed = run(msls, tmp_path / "half", config, 2, resume_path=half.folder / "checkpoints/checkpoint.pth.tar")
    assert scalars(resumed.folder, "Train/Loss") == scalars(whole.folder, "Train/Loss")
    assert list(scalars(whole.folder, "Train/LearningRate").values()) == pytest.approx([0.001, 0.001])


def test_augmentation_and_loss_by_name_resume_exactly(trained: TrainedRun, msls: Path, tmp_path: Path) -> None:
    config = small(augmentation=("darkness", "turn"), loss="multi_similarity", nneg=3)
    whole = run(msls, tmp_path / "whole", config, epochs=2)
    half = run(msls, tmp_path / "half", config, epochs=1)
    resumed = run(msls, tmp_path / "half", config, 2, resume_path=half.folder / "checkpoints/checkpoint.pth.tar")
    assert scalars(resumed.folder, "Train/Loss") == scalars(whole.folder, "Train/Loss")
    plain = run(msls, tmp_path / "plain", small(loss="multi_similarity", nneg=3), epochs=1)
    changed, unchanged = (scalars(one.folder, "Train/Loss") for one in (whole, plain))
    assert changed[1] != unchanged[1]
    assert scalars(plain.folder, "Val/Recall@1")[0] == scalars(whole.folder, "Val/Recall@1")[0]


def test_local_features_learn_and_resume_exactly(msls: Path, tmp_path: Path) -> None:
    """The loss of local features comes on top, follows from the seed, and needs an encoder's feature maps alone."""
    timm = "timm:test_efficientnet"
    size = {"imageresizew": 128, "imageresizeh": 96}
    config = small(timm, augmentation=("darkness", "turn", "zoom"), loss="multi_similarity", local_weight=0.5, **size)
    config = replace(config, feature_extract=FeatureExtractConfig(**size), feature_match=FeatureMatchConfig(**size))
    whole = run(msls, tmp_path / "whole", config, epochs=2)
    half = run(msls, tmp_path / "half", config, epochs=1)
    resumed = run(msls, tmp_path / "half", config, 2, resume_path=half.folder / "checkpoints/checkpoint.pth.tar")
    assert scalars(resumed.folder, "Train/Loss") == scalars(whole.folder, "Train/Loss")
    without = replace(config, train=replace(config.train, local_weight=0.0))
    plain = run(msls, tmp_path / "plain", without, epochs=1)
    assert scalars(whole.folder, "Train/Loss")[1] > scalars(plain.folder, "Train/Loss")[1] + 0.5


def test_local_features_need_changed_views(msls: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\[train\] local_weight = 0.5: .* augmentation = None"):
        run(msls, tmp_path, small(local_weight=0.5))


def test_negatives_of_a_whole_step(trained: TrainedRun, msls: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """multi_similarity pushes every query from all database pictures of its step that lie elsewhere."""
    seen: list[tuple[int, int]] = []  # negatives of each query, and all that its step has

    def total(descriptors: torch.Tensor, triplets: Any, margin: float) -> torch.Tensor:
        others = {row for _, positive, negatives in triplets for row in (positive, *negatives)}
        for query, positive, negatives in triplets:
            assert positive not in negatives and query not in negatives
            seen.append((len(negatives), len(others)))
        return descriptors.sum()

    monkeypatch.setitem(LOSSES, "multi_similarity", replace(LOSSES["multi_similarity"], total=total))
    run(msls, tmp_path, small(loss="multi_similarity", nneg=2, batchsize=3), epochs=1)
    assert max(count for count, _ in seen) > 2
    assert all(count < every for count, every in seen)


def test_adamw_follows_the_schedule(msls: Path, tmp_path: Path) -> None:
    found = run(msls, tmp_path, small(optim="ADAMW", lr=0.001, lrgamma=0.1), epochs=2)
    assert list(scalars(found.folder, "Train/LearningRate").values()) == pytest.approx([0.001, 0.0001])


def test_without_a_cache_augmented_pictures_are_the_same(msls: Path, tmp_path: Path) -> None:
    """What a step reads again is changed as mining saw it."""
    losses = []
    for number, gigabytes in enumerate((8.0, 0.0)):
        config = small(augmentation=("noise", "occlusion"), frozen_cache_gb=gigabytes)
        losses.append(scalars(run(msls, tmp_path / str(number), config, epochs=1).folder, "Train/Loss"))
    assert losses[0].keys() == losses[1].keys()
    assert list(losses[0].values()) == pytest.approx(list(losses[1].values()), rel=1e-4)


@pytest.mark.parametrize(("key", "value"), [("loss", "hinge"), ("augmentation", ("fog",))])
def test_unknown_names_stop_before_training(key: str, value: Any, msls: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"\[train\] {key} = (hinge|fog): expected"):
        run(msls, tmp_path, small(**{key: value}))
    assert list(tmp_path.iterdir()) == []


def own_rows(folder: Path) -> list[tuple[str, str]]:
    """Each picture of one side of a city with its easting and northing."""
    with (folder / "postprocessed.csv").open(newline="") as file:
        return [(f"{row['key']}.jpg", f"{row['easting']},{row['northing']}") for row in csv.DictReader(file)]


def test_several_sources_in_one_run(msls: Path, tmp_path: Path) -> None:
    """An MSLS tree beside tables of its own pictures as other cities, one to learn from and one to be judged by."""
    for part, name in (("train", "london"), ("val", "sf")):
        rows = ["image,easting,northing,role,city"]
        for side in ("query", "database"):
            folder = Path("train_val") / name / side
            for picture, place in own_rows(msls / folder):
                rows.append(f"{folder / 'images' / picture},{place},{part}_{side},{name}-again")
        (tmp_path / f"{part}.csv").write_text("\n".join([*rows, ""]))
    sources = [Source(msls), Source(msls, tmp_path / "train.csv"), Source(msls, tmp_path / "val.csv")]
    data = read_training_data(small(), sources)
    assert [city.name for city in data.train] == ["trondheim", "london", "london-again"]
    assert [city.name for city in data.validation] == ["cph", "sf", "sf-again"]
    assert len(data.train[2].queries) == len(data.train[1].queries)
    with pytest.raises(UserError, match=r"val\.csv: no picture has the roles train_query"):
        read_training_data(small(), sources[2:] * 2)
    with pytest.raises(UserError, match="city london-again is in more than one"):
        read_training_data(small(), [*sources, sources[1]])
    options = ["--dataset_root_dir", str(msls), str(msls), "--save_path", str(tmp_path), "-q"]
    assert train([*options, "--dataset_csv", "-"]) == 2


def command_line(msls: Path, folder: Path, *more: str) -> list[str]:
    settings = {
        "global_params.backbone": "rootsift",
        "train.cities": "trondheim,london",
        "train.num_clusters": "4",
        "train.lr": "0.01",
        "train.lrstep": "1",
        "train.batchsize": "2",
        "train.subset_queries": "7",
        "train.subset_negatives": "12",
        "train.imageresizew": str(WIDTH),
        "train.imageresizeh": str(HEIGHT),
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    paths = ["--dataset_root_dir", str(msls), "--save_path", str(folder)]
    return [*paths, "--threads", "2", "--nocuda", "-q", *overrides, *more]


def test_a_process_that_is_killed_resumes_exactly(
    trained: TrainedRun, msls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = command_line(msls, tmp_path, "--nEpochs", "1000000")
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], env=environment)
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("*/checkpoints/checkpoint.pth.tar")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)  # into some step
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1.1)  # TensorBoard orders event files by the second in their names, then by process number
    (last,) = tmp_path.glob("*/checkpoints/checkpoint.pth.tar")
    epochs = max(3, read_checkpoint(last).extras["epoch"] + 1)
    assert train(command_line(msls, tmp_path, "--nEpochs", str(epochs), "--resume_path", str(last))) == 0
    ini, options = capsys.readouterr().out.splitlines()[-2:]
    best = last.with_name("model_best.pth.tar")
    assert ini.endswith(f"resumepath = {best}; num_pcs = 0") and f"resumepath={best}" in shlex.split(options)[-3]
    losses, expected = scalars(last.parent.parent, "Train/Loss"), scalars(trained.folder, "Train/Loss")
    assert list(losses) == list(range(1, len(losses) + 1)) and len(losses) >= len(expected)
    assert {step: losses[step] for step in expected} == expected


def test_a_resumed_run_says_what_is_different(
    trained: TrainedRun, msls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "moved.pth.tar"
    shutil.copy(trained.folder / "checkpoints/checkpoint_epoch2.pth.tar", copy)
    resumed = run(msls, tmp_path, small(margin=0.2), resume_path=copy)
    assert "differs from the one that is resumed: margin was 0.1, is 0.2" in caplog.text
    assert resumed.folder != trained.folder and resumed.epoch == 3
    with pytest.raises(UserError, match=r"made with optim = SGD, \[train\] optim says ADAM"):
        run(msls, tmp_path, small(optim="ADAM"), resume_path=copy)


@pytest.mark.parametrize("num_pcs", [0, 8])
def test_vgg16_trains_from_published_checkpoints(
    num_pcs: int, msls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights of a published file, the projection dropped; what is written loads there again, key by key."""
    caplog.set_level("INFO")
    path = tmp_path / "published.pth.tar"
    state = {key.replace("pool.", "pool.module."): value for key, value in published_state(num_pcs).items()}
    extras = {"epoch": 28, "recalls": {5: np.float64(0.8)}, "best_score": np.float64(0.8), "parallel": True}
    torch.save({"state_dict": state, "optimizer": {"state": {}, "param_groups": []}, **extras}, path)
    cities = {"cities": ("london",), "val_cities": ("sf",), "subset_queries": 3}
    size = {"imageresizew": 64, "imageresizeh": 48}
    config = small("vgg16", **cities, num_clusters=16, lr=1e-4, **size)
    config = replace(config, feature_extract=FeatureExtractConfig(**size))
    trained = run(msls, tmp_path, config, epochs=1, resume_path=path)
    dropped = f"{path}: its WPCA of 8 dimensions is dropped"
    assert (dropped in caplog.text) == (num_pcs == 8)
    assert "its weights are the start, from epoch 1" in caplog.text
    written = torch.load(trained.folder / "checkpoints/checkpoint.pth.tar", weights_only=True)
    before = published_state(0)
    assert written["state_dict"].keys() == before.keys()
    changed = {key for key, value in written["state_dict"].items() if not torch.equal(value, before[key])}
    learning = {f"encoder.{layer}.weight" for layer in (24, 26, 28)}
    assert learning <= changed
    assert changed <= learning | {key.replace("weight", "bias") for key in learning} | {
        "pool.conv.weight",
        "pool.centroids",
    }
    assert written["epoch"] == 1 and written["step"] == len(scalars(trained.folder, "Train/Loss"))


def test_start_epoch_takes_the_weights_alone(trained: TrainedRun, msls: Path, tmp_path: Path) -> None:
    last = trained.folder / "checkpoints/checkpoint.pth.tar"
    again = run(msls, tmp_path, epochs=4, resume_path=last, start_epoch=2)
    assert again.folder != trained.folder
    assert list(scalars(again.folder, "Train/AvgLoss")) == [3, 4]
    assert list(scalars(again.folder, "Train/LearningRate").values()) == pytest.approx([0.0025, 0.00125])
    assert min(scalars(again.folder, "Train/Loss")) == 1


def test_clusters_are_made_where_asked_and_used_again(
    msls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "new/folder/clusters.hdf5"
    first = run(msls, tmp_path / "a", epochs=1, cluster_path=path)
    assert path.exists() and "clustering" in caplog.text
    caplog.clear()
    second = run(msls, tmp_path / "b", epochs=1, cluster_path=path)
    assert "clustering" not in caplog.text
    assert scalars(first.folder, "Train/Loss") == scalars(second.folder, "Train/Loss")
    with pytest.raises(UserError, match=r"clusters\.hdf5: centroids are 4×128, the model needs 8×128"):
        run(msls, tmp_path / "c", small(num_clusters=8), cluster_path=path)
    path.write_bytes(b"no clusters")
    with pytest.raises(UserError, match=r"clusters\.hdf5: cannot be read as a cluster file"):
        run(msls, tmp_path / "c", cluster_path=path)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("vladv2", [False, True])
def test_vladv2_trains(vladv2: bool, msls: Path, tmp_path: Path) -> None:
    config = small()
    config = replace(config, global_params=replace(config.global_params, vladv2=vladv2))
    trained = run(msls, tmp_path, config, epochs=1)
    state = read_checkpoint(trained.folder / "checkpoints/checkpoint.pth.tar").state
    assert ("pool.conv.bias" in state) == vladv2


def test_patience_ends_a_run(msls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stopped = run(msls, tmp_path, small(patience=2, lr=1e-12), epochs=50)
    assert "Recall@5 has not risen for 2 validations: done" in caplog.text
    assert stopped.epoch == 2
    assert list(scalars(stopped.folder, "Val/Recall@5")) == [0, 1, 2]


def test_validation_every_other_epoch(msls: Path, tmp_path: Path) -> None:
    trained = run(msls, tmp_path, small(evalevery=2), epochs=3)
    assert list(scalars(trained.folder, "Val/Recall@5")) == [0, 2]


def test_a_loss_that_is_no_number_stops_the_run(msls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_loss = LOSSES["triplet"]
    calls = []

    def total(*args: Any) -> torch.Tensor:
        calls.append(1)
        return whole_loss.total(*args) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setitem(LOSSES, "triplet", replace(whole_loss, total=total))
    message = r"epoch 1, subset 2 of 4, step 7: the loss is nan, training stops; queries .*\.jpg.*checkpoint\.pth\.tar"
    with pytest.raises(UserError, match=message):
        run(msls, tmp_path)
    (last,) = tmp_path.glob("*/checkpoints/checkpoint.pth.tar")
    kept = read_checkpoint(last)
    assert kept.extras["subset"] == 1
    assert all(torch.isfinite(value).all() for value in kept.state.values())


def test_weights_that_leave_the_numbers_stop_the_run(msls: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training stops.*the last good checkpoint is .*lower \[train\] lr"):
        run(msls, tmp_path, small(lr=1e38, weightdecay=1e10))
    (last,) = tmp_path.glob("*/checkpoints/checkpoint.pth.tar")
    assert read_checkpoint(last).extras["step"] == 0


def test_subsets_without_negatives_are_skipped(msls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped = run(msls, tmp_path, small(cities=("london",), negative_radius=1e7), epochs=2)
    assert "epoch 1, subset 1 of 2: no query has a negative within the margin, the subset is skipped" in caplog.text
    assert "epoch 2: no query has a negative within the margin, nothing was learned" in caplog.text
    assert skipped.epoch == 2
    assert list(scalars(skipped.folder, "Val/Recall@5")) == [0, 1, 2]


def test_own_pictures_train(msls: Path, tmp_path: Path) -> None:
    """The tree's pictures, described by one CSV file, give the same run as the tree itself."""
    roles = {"trondheim": "train", "london": "train", "cph": "val", "sf": "val"}
    with (tmp_path / "own.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "easting", "northing", "role", "city", "night", "sideways", "panorama"])
        for city, role in roles.items():
            for side in ("query", "database"):
                folder = Path("train_val") / city / side
                tables = [
                    csv.DictReader((msls / folder / f"{name}.csv").read_text().splitlines())
                    for name in ("postprocessed", "raw")
                ]
                for details, raw in zip(*tables, strict=True):
                    image = folder / "images" / f"{details['key']}.jpg"
                    sideways = details["view_direction"] == "Sideways"
                    place = (details["easting"], details["northing"], f"{role}_{side}", city)
                    writer.writerow([image, *place, details["night"], sideways, raw["pano"]])
    own = run(msls, tmp_path / "own", epochs=1, training_csv=tmp_path / "own.csv")
    tree = run(msls, tmp_path / "tree", epochs=1)
    assert scalars(own.folder, "Train/Loss") == scalars(tree.folder, "Train/Loss")
    assert own.recalls == tree.recalls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.cities=trondheim,boston"], "train_val/boston: no such folder, for city boston"),
        (["--set", "train.val_cities=miami"], "miami/query: has no easting and northing"),
        (["--set", "feature_extract.imageresizew=640"], "[train] imageresizew = 96: expected 640"),
        (["--set", "train.negative_radius=5"], "positive_radius = 10: expected at most negative_radius = 5"),
        (["--set", "train.match_radius=1e-3"], "no query of cph (8 in all) has a database picture within 0.001 m"),
        (["--set", "global_params.pooling=max"], "no parameters that learn"),
        (["--resume_path", "nowhere.pth.tar"], "nowhere.pth.tar: no such file"),
        (["--set", "train.loss=hinge"], "--set train.loss=hinge: expected one of triplet"),
        (["--nEpochs", "0"], "--nEpochs must be 1 or more"),
        (["--dataset_csv", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, msls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([*command_line(msls, tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_architecture(
    published_checkpoint: Path, msls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([*command_line(msls, tmp_path), "--resume_path", str(published_checkpoint)]) == 2
    assert "made for backbone = vgg16, the configuration says backbone = rootsift" in capsys.readouterr().err


def test_unreadable_pictures_stop_before_the_start(
    msls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(msls / "train_val", tmp_path / "msls/train_val")
    picture = next((tmp_path / "msls/train_val/sf/query/images").iterdir())
    picture.write_bytes(picture.read_bytes()[:900])
    arguments = command_line(tmp_path / "msls", tmp_path / "runs", "--nEpochs", "1")
    assert train(arguments) == 2
    assert f"1 of 90 pictures cannot be used: {picture}: cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert train([*arguments, "--skip_unreadable"]) == 0
    captured = capsys.readouterr()
    assert "left out: 1 of 90 pictures" in captured.err and "checkpoints in" in captured.out


def test_mixed_precision_trains(msls: Path, tmp_path: Path) -> None:
    size = {"imageresizew": 64, "imageresizeh": 48}
    cities = {"cities": ("london",), "val_cities": ("sf",)}
    config = small("vgg16", **cities, **size, subset_queries=3, mixed_precision=True, lr=1e-3)
    config = replace(config, feature_extract=FeatureExtractConfig(**size))
    trained = run(msls, tmp_path, config, epochs=1)
    losses = list(scalars(trained.folder, "Train/Loss").values())
    assert losses and np.isfinite(losses).all()
    written = torch.load(trained.folder / "checkpoints/checkpoint.pth.tar", weights_only=True)
    assert all(value.dtype == torch.float32 for value in written["state_dict"].values())


@pytest.mark.parametrize(
    ("learns", "learning"), [("last", ("model.blocks.2.", "model.blocks.3.")), ("all", ("model.",)), ("none", ())]
)
def test_an_encoder_of_timm_learns_what_is_said(
    msls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, learns: str, learning: tuple[str, ...]
) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    caplog.set_level(logging.INFO)
    backbone = "timm:mobilenetv3_small_050"
    config = small(backbone, encoder_learns=learns, cities=("london",))
    finished = run(msls, tmp_path, config, epochs=1, save_every_epoch=True, cache_path=tmp_path / "cache")
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("learning: ")]
    expected = {"last": "model.blocks.2, model.blocks.3 (", "all": "all layers (", "none": "nothing of the encoder"}
    assert expected[learns] in said
    torch.manual_seed(config.train.seed)
    before = PlaceModel(backbone, "netvlad", 4).encoder.state_dict()
    after = read_checkpoint(finished.folder / "checkpoints/checkpoint_epoch1.pth.tar")
    assert after.backbone == backbone
    weights = {key for key, _ in PlaceModel(backbone, "netvlad", 4).encoder.named_parameters()}
    changed = {key for key in weights if not torch.equal(before[key], after.state[f"encoder.{key}"])}
    assert changed <= {key for key in weights if key.startswith(learning)}
    assert len(changed) > 0.9 * len([key for key in weights if key.startswith(learning)]) or not learning
    assert (tmp_path / "cache/centroids/timm_mobilenetv3_small_050_mapillary_4_desc_cen.hdf5").is_file()
