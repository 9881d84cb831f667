"""What depends on an accelerator, as far as a processor can stand in for one: TF32, want of memory, several GPUs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from patchnetvlad import extraction, training_run
from patchnetvlad import model as model_module
from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.commands.pairs import match_two
from patchnetvlad.commands.places import locate
from patchnetvlad.commands.recognize import recognize
from patchnetvlad.config import Config
from patchnetvlad.devices import float32_products, memory_errors
from patchnetvlad.distributed import Processes
from patchnetvlad.errors import UserError
from patchnetvlad.ini import load_config
from patchnetvlad.model import PlaceModel, Precision
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.ranking import Ranker
from patchnetvlad.store.manifest import StoreHeader

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.ini"))


def uses_tf32() -> tuple[bool, bool]:
    """Whether convolutions and matrix products use it."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("wanted", [False, True])
def test_tf32_is_set_and_put_back(wanted: bool) -> None:
    before = uses_tf32()
    with pytest.raises(KeyError), float32_products(CUDA, wanted):
        assert uses_tf32() == (wanted, wanted)
        with float32_products(CUDA, not wanted):
            assert uses_tf32() == (not wanted, not wanted)
        assert uses_tf32() == (wanted, wanted)
        with float32_products(CPU, not wanted):
            assert uses_tf32() == (wanted, wanted)
        raise KeyError
    assert uses_tf32() == before


@pytest.mark.parametrize(("precision", "inside"), [("float32", False), ("tf32", True), ("bfloat16", False)])
def test_encoder_and_projection_alone_compute_in_tf32(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, inside: bool
) -> None:
    model = PlaceModel("vgg16", "patchnetvlad", 2, 4, (1,), (1,)).eval()
    model.precision = precision
    seen: dict[str, tuple[bool, bool]] = {}
    monkeypatch.setattr(
        model_module, "float32_products", lambda device, tf32=False: float32_products(CUDA, tf32)
    )  # as if the pictures were there
    for name in ("encoder", "WPCA"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: seen.update({name: uses_tf32()}))
    assert isinstance(model.pool, NetVLAD)
    assign = model.pool.assign

    def assigned(features: Tensor) -> Any:
        seen["pool"] = uses_tf32()
        return assign(features)

    monkeypatch.setattr(model.pool, "assign", assigned)
    before = uses_tf32()
    model.describe(torch.rand(1, 3, 48, 48))
    assert seen == {"encoder": (inside, inside), "WPCA": (inside, inside), "pool": (False, False)}
    assert uses_tf32() == before


def test_tf32_is_float32_on_a_processor() -> None:
    model = PlaceModel("rootsift", "netvlad", 2, 8).eval()
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = model.describe(pictures).global_
    model.precision = "tf32"
    assert torch.equal(model.describe(pictures).global_, exact)


def test_tf32_is_recorded_and_what_it_is_here_is_said(
    small_model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option for option in small_model if option != "-q"]
    options += ["--set", "feature_extract.precision=tf32"]
    assert feature_extract([*options, *listed(tmp_path), "--output_features_dir", str(tmp_path / "tf32")]) == 0
    assert "precision = tf32: on cpu it is float32" in capsys.readouterr().err
    assert '"precision": "tf32"' in (tmp_path / "tf32/manifest.jsonl").read_text(encoding="utf-8")


def listed(folder: Path) -> list[str]:
    """Options for a list of three small pictures."""
    rng = np.random.default_rng(0)
    names = ("a.png", "b.png", "c.png")
    for name in names:
        Image.fromarray(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(folder / name)
    (folder / "list.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return ["--dataset_root_dir", str(folder), "--dataset_file_path", str(folder / "list.txt")]


def exhausted(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has…\nsecond line")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_want_of_memory_is_one_line(error: RuntimeError) -> None:
    with (
        pytest.raises(UserError, match=r"memory is not enough: .*\(lower \[a\] b\)$") as caught,
        memory_errors("[a] b"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("[a] b"):
        raise RuntimeError("shapes do not fit")


def test_extraction_names_its_keys_when_memory_is_short(
    small_model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlaceModel, "describe", exhausted)
    assert feature_extract([*small_model, *listed(tmp_path), "--output_features_dir", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "cachebatchsize" in line and "imageresizew" in line and "CUDA out of memory" in line


def test_matching_names_its_keys_when_memory_is_short(
    small_model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*small_model, *listed(tmp_path)]
    assert feature_extract([*options, "--output_features_dir", str(tmp_path / "out")]) == 0
    monkeypatch.setattr(Ranker, "_rerank_all", exhausted)
    capsys.readouterr()
    assert feature_match(matching(small_model, tmp_path)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "cache_gb" in line and "rerank_top" in line


def matching(model: list[str], folder: Path) -> list[str]:
    """Options to match the pictures of `listed` with themselves."""
    sides = [option for side in ("query", "index") for option in (f"--{side}_file_path", str(folder / "list.txt"))]
    sides += [option for side in ("query", "index") for option in (f"--{side}_input_features_dir", str(folder / "out"))]
    return [*model, "--dataset_root_dir", str(folder), *sides, "--result_save_folder", str(folder / "results")]


def located(folder: Path) -> list[str]:
    """Options to locate one of the pictures of `listed` by its own features."""
    np.savez(folder / "truth.npz", utmQ=np.zeros((3, 2)), utmDb=np.zeros((3, 2)), posDistThr=1.0)
    truth = ["--ground_truth_path", str(folder / "truth.npz"), "--picture", str(folder / "a.png")]
    database = ["--index_file_path", str(folder / "list.txt"), "--index_input_features_dir", str(folder / "out")]
    return [*truth, *database, "--dataset_root_dir", str(folder)]


@pytest.mark.parametrize("several", ["ngpu", "torchrun"])
def test_several_gpus_are_refused_where_one_is_used(
    several: str,
    small_model: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [*small_model, *listed(tmp_path)]
    assert feature_extract([*options, "--output_features_dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    more: list[str] = []
    if several == "ngpu":
        more = ["--set", "global_params.ngpu=2"]
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
    for call, arguments in (
        (feature_extract, [*options, "--output_features_dir", str(tmp_path / "other")]),
        (feature_match, matching(small_model, tmp_path)),
        (match_two, small_model),
        (locate, [*small_model, *located(tmp_path)]),
        (recognize, ["--database", str(tmp_path), "--queries", str(tmp_path), *small_model]),
    ):
        assert call([*arguments, *more]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert "ngpu = 2" in line or "WORLD_SIZE = 2" in line
        way_out = ("ngpu = 1", "uses one GPU") if several == "ngpu" else ("torchrun is for train.py",)
        assert any(said in line for said in way_out)
    assert not (tmp_path / "other").exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_bundled_configurations_use_one_gpu(path: Path) -> None:
    load_config(path).check_one_process("extraction")


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_the_estimate_waits_for_the_device_and_leaves_its_first_batch_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    header = StoreHeader(None, {}, 8, (), (), PlaceModel("rootsift", "netvlad", 2).geometry)
    clock = iter([100.0, 200.0, 202.0])  # start of the first batch, start and end of the second
    waited: list[torch.device] = []
    monkeypatch.setattr(extraction, "synchronize", waited.append)
    monkeypatch.setattr(extraction.time, "perf_counter", lambda: next(clock))
    caplog.set_level("INFO", "patchnetvlad")
    estimate = extraction._Estimate(tmp_path, header, 40, 5, device)
    for _ in range(3):
        estimate.start()
        estimate.take((), 5)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("and 16.0 s")  # 40 pictures, five of which took two seconds
    assert waited == [device] * 3


@pytest.mark.parametrize(("device", "count"), [(CUDA, 5), (CPU, 1)])
def test_the_estimate_takes_the_first_batch_where_it_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, device: torch.device, count: int
) -> None:
    header = StoreHeader(None, {}, 8, (), (), PlaceModel("rootsift", "netvlad", 2).geometry)
    clock = iter([100.0, 101.0])
    monkeypatch.setattr(extraction, "synchronize", lambda device: None)
    monkeypatch.setattr(extraction.time, "perf_counter", lambda: next(clock))
    caplog.set_level("INFO", "patchnetvlad")
    estimate = extraction._Estimate(tmp_path, header, count, 5, device)
    estimate.start()
    estimate.take((), 5)
    assert caplog.records[0].getMessage().endswith(f"and {count / 5:.1f} s")


def test_training_names_its_keys_when_memory_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training_run, "_check_run", exhausted)
    options = training_run.RunOptions(tmp_path, None, None, "x", None, None, None, 1, None, False, True, False)
    with pytest.raises(UserError, match=r"\[train\] batchsize, cachebatchsize"):
        training_run.train_model(Config(), options, Processes(0, 1, CPU))
