"""Downloads from a hub on this machine: what arrives, what is kept, and servers that say nothing."""

import hashlib
import io
import logging
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from patchnetvlad import downloads, files
from patchnetvlad.checkpoints import read_checkpoint
from patchnetvlad.config import Config, GlobalParams, TrainConfig
from patchnetvlad.downloads import HUB_REPOSITORY, fetch_from_hub, fetch_published, hash_file, require_answer
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
    published = timm.create_model("mobilenetv3_small_050.lamb_in1k").state_dict()
    hub.files["/timm/mobilenetv3_small_050.lamb_in1k/model.safetensors"] = safetensors.save(dict(published))
    backbone = "timm:mobilenetv3_small_050.lamb_in1k"
    model = PlaceModel(backbone, "netvlad", 4)
    initialise_encoder(model, Config(global_params=GlobalParams(backbone=backbone, pooling="netvlad", num_pcs=0)))
    for key, value in model.encoder.state_dict().items():
        torch.testing.assert_close(value, published[key.removeprefix("model.")], atol=0, rtol=0)


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
    monkeypatch.setattr("patchnetvlad.encoders.vgg16._IMAGENET", silent)
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
