"""Downloads from a hub on this machine: what arrives, what is kept, and servers that say nothing."""

import hashlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import ROOT

from patchnetvlad import downloads, files
from patchnetvlad.checkpoints import read_checkpoint
from patchnetvlad.config import Config, GlobalParams, TrainConfig
from patchnetvlad.downloads import HUB_REPOSITORY, fetch_from_hub, fetch_published, hash_file, require_answer
from patchnetvlad.encoders import published
from patchnetvlad.encoders.published import check_encoder_names, check_starting_weights
from patchnetvlad.errors import UserError
from patchnetvlad.model import PlaceModel
from patchnetvlad.paths import PUBLISHED_CHECKPOINTS
from patchnetvlad.weights import initialise_encoder


class Hub(ThreadingHTTPServer):
    """Serves files under /REPOSITORY/resolve/main/NAME, and counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path.replace("/resolve/main", ""))
        self.send_response(200 if content is not None else 404)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body and content is not None:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub in place of the real one, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server
        server.shutdown()


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/file"


def test_a_file_is_fetched_once(hub: Hub) -> None:
    hub.files["/someone/model/pytorch_model.bin"] = b"numbers"
    for _ in range(2):
        path = fetch_from_hub("someone/model", ["model.safetensors", "pytorch_model.bin"])
        assert path.read_bytes() == b"numbers"
        asked = len(hub.asked)
    hub.asked.clear()
    fetch_from_hub("someone/model", ["model.safetensors", "pytorch_model.bin"])
    assert asked and not hub.asked  # the cache has it


def test_a_checkpoint_that_was_fetched_is_hashed_once(hub: Hub, tmp_path: Path) -> None:
    """What is fetched takes its name after it was hashed, and is read under that name."""
    content = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.ones(3)}}, content)
    name = next(iter(PUBLISHED_CHECKPOINTS))
    hub.files[f"/{HUB_REPOSITORY}/{PUBLISHED_CHECKPOINTS[name]}"] = content.getvalue()
    before = files._sha256.cache_info().misses
    path = fetch_published(name, tmp_path / "models")
    expected = hashlib.sha256(content.getvalue()).hexdigest()
    assert path == tmp_path / "models" / name and hash_file(path).read_text() == f"{expected}  {name}\n"
    assert read_checkpoint(path).sha256 == expected and files.file_sha256(path) == expected
    assert files._sha256.cache_info().misses == before + 1
    path.write_bytes(content.getvalue() + b"more")
    assert files.file_sha256(path) == hashlib.sha256(content.getvalue() + b"more").hexdigest()


def test_what_the_hub_has_not_is_one_error(hub: Hub) -> None:
    with pytest.raises(OSError, match=r"someone/model has no a\.bin or b\.bin"):
        fetch_from_hub("someone/model", ["a.bin", "b.bin"])


def test_weights_of_timm_come_from_its_hub(hub: Hub, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(3)
    offered = timm.create_model("mobilenetv3_small_050.lamb_in1k").state_dict()
    hub.files["/timm/mobilenetv3_small_050.lamb_in1k/model.safetensors"] = safetensors.save(dict(offered))
    backbone = "timm:mobilenetv3_small_050.lamb_in1k"
    model = PlaceModel(backbone, "netvlad", 4)
    initialise_encoder(model, Config(global_params=GlobalParams(backbone=backbone, pooling="netvlad", num_pcs=0)))
    for key, value in model.encoder.state_dict().items():
        torch.testing.assert_close(value, offered[key.removeprefix("model.")], atol=0, rtol=0)


def test_silence_is_waited_for_once(
    silent: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 0.3)
    caplog.set_level(logging.DEBUG)
    started = time.perf_counter()
    with pytest.raises(OSError, match=r"127\.0\.0\.1.*(does not answer|timed out)"):
        require_answer(silent)
    assert time.perf_counter() - started < 5
    with pytest.raises(OSError, match="refused"):
        require_answer("http://127.0.0.1:9/closed")
    assert not caplog.records


@pytest.mark.parametrize("backbone", ["vgg16", "dinov2"])
def test_weights_that_cannot_be_fetched_are_one_line(
    backbone: str,
    silent: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if backbone == "dinov2":
        pytest.importorskip("timm", reason="timm is not installed")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", silent + "/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("patchnetvlad.encoders.vgg16.VGG16_IMAGENET", silent)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 0.3)
    model = PlaceModel(backbone, "netvlad", 4)
    config = Config(
        global_params=GlobalParams(backbone=backbone, pooling="netvlad", num_pcs=0), train=TrainConfig(patience=1)
    )
    with pytest.raises(UserError, match=f"weights of {backbone} cannot be fetched") as refused:
        initialise_encoder(model, config)
    assert "\n" not in str(refused.value)
    printed = capfd.readouterr()
    assert not printed.out and not printed.err and not caplog.records


OFFLINE = """
import json, sys
from huggingface_hub import constants
from patchnetvlad import downloads
from patchnetvlad.encoders import published
server, cache, script, *arguments = sys.argv[1:]
constants.HUGGINGFACE_CO_URL_TEMPLATE = server + "/{repo_id}/{revision}/{filename}"
constants.HF_HUB_CACHE, published.VGG16_IMAGENET, downloads.ANSWER_SECONDS = cache, server, 0.3
from importlib import import_module
module, name = script.split(":")
status = getattr(import_module(f"patchnetvlad.commands.{module}"), name)(arguments)
print(json.dumps([status, sorted(sys.modules)]))
"""
FIT = ["models:fit_model", "--output_path", "made/new.pth.tar", "--config_path", "rootsift.ini"]
FIT += ["--set", "train.pretrained=imagenet", "--dataset_root_dir", str(ROOT / "example_images")]
TRAIN = ["training:train", "--dataset_root_dir", str(ROOT / "example_images")]


def run_offline(silent: str, folder: Path, command: list[str], backbone: str) -> tuple[int, set[str], str]:
    """Exit status, imported modules and what a command says in a process of its own whose servers are silent."""
    arguments = [silent, str(folder / "hub"), *command, "--set", f"global_params.backbone={backbone}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *arguments], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    status, modules = json.loads(done.stdout)
    return status, set(modules), done.stderr


@pytest.mark.parametrize("command", [FIT, TRAIN], ids=["fit_model", "train"])
@pytest.mark.parametrize("backbone", ["vgg16", "dinov2", "half:timm:resnet18", "timm:resnet50.tv2_in1k:layer3"])
def test_without_internet_a_command_ends_before_anything_heavy_is_imported(
    command: list[str], backbone: str, silent: str, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    if backbone != "vgg16" and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    status, modules, errors = run_offline(silent, tmp_path, command, backbone)
    assert status == 2 and not modules & {"torch", "timm", "PIL", "numpy"}
    assert len(errors.splitlines()) == 1 and f"the weights of {backbone} cannot be fetched" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kept", "backbone", "reachable"),
    [
        ("models--timm--resnet18.a1_in1k", "timm:resnet18", True),
        ("models--timm--resnet18.a1_in1k", "timm:resnet18.a1_in1k", True),
        ("models--timm--resnet18.a1_in1k", "timm:resnet18.tv_in1k", False),
        ("models--timm--resnet18d.ra2_in1k", "timm:resnet18", False),
        ("models--BAAI--EVA", "timm:eva_giant_patch14_224.clip_ft_in1k", True),
        ("models--somebody--else", "timm:eva_giant_patch14_224.clip_ft_in1k", False),
    ],
)
def test_weights_in_the_hubs_cache_need_no_answer(
    kept: str, backbone: str, reachable: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm")  # as in a command that has not imported it
    (tmp_path / kept / "snapshots/0").mkdir(parents=True)
    (tmp_path / kept / "snapshots/0/weights").touch()

    def unreachable(url: str) -> None:
        raise OSError("no route")

    monkeypatch.setattr("patchnetvlad.encoders.published.require_answer", unreachable)
    config = Config(global_params=GlobalParams(backbone=backbone))
    if reachable:
        check_starting_weights(config)
    else:
        with pytest.raises(UserError, match=r"cannot be fetched \(no route\)"):
            check_starting_weights(config)


@pytest.mark.parametrize("name", ["timm:resnet5", "half:timm:resnet5", "timm:tv_resnet50", "timm:resnet50.none_such"])
def test_names_of_timm_are_judged_as_timm_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it where it can be, and never otherwise; old names and weights are timm's to judge."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    config = Config(global_params=GlobalParams(backbone=name))
    monkeypatch.delitem(sys.modules, "timm")
    if timm.is_model(name.rpartition("timm:")[2].partition(".")[0]):
        check_encoder_names(config)
        check_starting_weights(config)
    else:
        with pytest.raises(UserError, match=r"timm has no model of that name \(did you mean resnet50 or"):
            check_encoder_names(config)


def test_every_model_of_timm_is_found_without_it() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sources = [path.read_text(encoding="utf-8") for path in Path(timm.__file__).parent.glob("models/*.py")]
    assert len(sources) > 50
    defined = {name for source in sources for name in published.MODEL.findall(source)}
    assert set(timm.list_models()) <= defined


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "half:efficientnet_lite0"])
def test_an_encoder_that_nobody_offers_is_not_started_at_random(backbone: str) -> None:
    config = Config(global_params=GlobalParams(backbone=backbone, pooling="netvlad", num_pcs=0))
    with pytest.raises(UserError, match="expected builtin_WPCA768, the bundled model's"):
        check_starting_weights(config)
    with pytest.raises(UserError, match="expected builtin_WPCA768, the bundled model's"):
        initialise_encoder(PlaceModel(backbone, "netvlad", 4), config)
    config = replace(config, train=TrainConfig(pretrained="builtin_WPCA768"))
    check_starting_weights(config)
    model, bundled = (
        PlaceModel(backbone, "netvlad", 4),
        read_checkpoint(ROOT / "pretrained_models/builtin_WPCA768.pth.tar"),
    )
    initialise_encoder(model, config)
    key, value = next(iter(model.encoder.state_dict().items()))
    torch.testing.assert_close(value, bundled.state[f"encoder.{key.removeprefix('encoder.')}"].float())
