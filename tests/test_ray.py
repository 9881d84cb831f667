"""Ray hands out the work: one process's bytes whatever is lost meanwhile, and one line for what cannot be."""

import json
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT
from test_feature_store import LIST, make_features, make_header, make_list
from tiny_run import EXAMPLES, example_names, run, tiny_model, write_ground_truth

from patchnetvlad.commands import features
from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.errors import UserError
from patchnetvlad.extraction import expected_header
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.ini import load_config
from patchnetvlad.model import PlaceModel
from patchnetvlad.store.arrays import blocks as feature_blocks
from patchnetvlad.store.writing import layouts
from patchnetvlad.store.writing.feature_writer import FeatureWriter
from patchnetvlad.store.writing.picture_writer import PictureWriter, Written

ray = pytest.importorskip("ray", reason="ray is not installed")
yaml = pytest.importorskip("yaml")  # which Ray brings with it

from patchnetvlad.engines import ray_cluster, shared_extraction  # noqa: E402
from patchnetvlad.engines.ray_cluster import Cluster, RayOptions, connected  # noqa: E402
from patchnetvlad.engines.ray_worker import Answer, answer  # noqa: E402
from patchnetvlad.engines.shared_extraction import SparseSequence  # noqa: E402
from patchnetvlad.engines.shared_matching import MatchingJob  # noqa: E402

LISTED = ["--dataset_root_dir", str(EXAMPLES), "--dataset_file_path", "example_imageNames_query.txt"]
MATCHED = ["--dataset_root_dir", str(EXAMPLES), "--query_file_path", "example_imageNames_query.txt"]
MATCHED += ["--index_file_path", "example_imageNames_index.txt"]
MATCHED += ["--query_input_features_dir", str(EXAMPLES), "--index_input_features_dir", str(EXAMPLES)]
BOTH = [(feature_extract, LISTED), (feature_match, MATCHED)]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must refuse in one line and leave nothing; returns the line."""
    monkeypatch.chdir(tmp_path)

    def refuse(command: Any, arguments: list[str]) -> str:
        assert command(["--config_path", str(ROOT / "configs/rootsift.ini"), *arguments]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1, line
        assert not list(tmp_path.iterdir())
        return line

    return refuse


# --- what cannot be, in one line, before Ray is started ----------------------------------------------------------


@pytest.mark.parametrize(("command", "arguments"), BOTH)
def test_without_ray_the_line_says_how_to_install_it(command, arguments, refused, monkeypatch):
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    line = refused(command, [*arguments, "--engine", "ray"])
    assert "--engine ray: Ray is not installed (pip install 'patchnetvlad[ray]')" in line
    line = refused(command, [*arguments, "--set", "global_params.ngpu=2"])
    assert "ngpu = 2: Ray is not installed (pip install 'patchnetvlad[ray]', or set ngpu = 1)" in line


@pytest.mark.parametrize(("command", "arguments"), BOTH)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "process", "--address", "auto"], "--address auto: needs --engine ray"),
        (["--worker_cpus", "2"], "--worker_cpus 2: needs --engine ray"),
        (["--engine", "ray", "--worker_cpus", "0"], "expected 1 or more"),
        (["--engine", "ray", "--device", "cuda:1"], "--device cuda:1: with --engine ray the devices are Ray's"),
        (["--engine", "ray", "--device", "mps"], "--device mps: with --engine ray the devices are Ray's"),
        (["--engine", "ray", "--address", "nowhere"], "--address nowhere: expected HOST:PORT"),
        (["--engine", "ray", "--address", "ray://head:10001"], "expected HOST:PORT"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "127.0.0.1:1: no Ray cluster answers there"),
        (["--engine", "ray", "--address", "127.0.0.1:99999"], "no Ray cluster answers there"),
        (["--set", "global_params.ngpu=99"], "ngpu = 99: this machine has"),
        (["--set", "global_params.ngpu=2", "--nocuda"], "ngpu = 2: --device cpu uses no GPU"),
    ],
)
def test_what_cannot_be_is_one_line(command, arguments, options, said, refused):
    assert said in refused(command, [*arguments, *options])


@pytest.mark.parametrize(("command", "arguments"), BOTH)
def test_torchrun_is_refused(command, arguments, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE = 2" in refused(command, [*arguments, "--engine", "ray"])


def test_ray_that_cannot_be_joined_is_one_line(monkeypatch):
    def init(**options: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 1.0\n    Python: 3.6")

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    with (
        pytest.raises(
            UserError, match=r"--address auto: Ray cannot be used there: Version mismatch.*Ray: 1\.0"
        ) as told,
        connected(RayOptions("auto")),
    ):
        raise AssertionError("connected")
    assert "\n" not in str(told.value)
    assert logging.getLogger("ray").level != logging.CRITICAL


# --- workers of another version ----------------------------------------------------------------------------------


def ask_another_python(folder: Path, before: str = "") -> tuple[str, str]:
    """What a worker answers whose packages begin with those in a folder."""
    work = ray_cluster._checked_work()[1]
    (folder / "work.pickle").write_bytes(ray.cloudpickle.dumps(work))
    code = f"import pickle, importlib.util as util\n{before}\n"
    code += "print(*pickle.load(open('work.pickle', 'rb'))('other', [], b''), sep=';')"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    installed, _, node = done.stdout.strip().rpartition(";")
    return installed, node


def test_a_worker_without_the_package_says_so(tmp_path):
    found = ask_another_python(tmp_path, "util.find_spec = lambda name: None")
    assert found == ("", platform.node())
    with pytest.raises(UserError, match=rf"worker on {found[1]} has no patchnetvlad, and \d\S+ is wanted"):
        ray_cluster._accepted(found, ray_cluster._checked_work()[0]())


def test_a_worker_with_another_package_says_so(tmp_path):
    expected = ray_cluster._checked_work()[0]()
    (tmp_path / "patchnetvlad").mkdir()
    (tmp_path / "patchnetvlad" / "__init__.py").write_text('__version__ = "0.0.9"\n')
    installed, node = ask_another_python(tmp_path)
    assert installed.startswith("0.0.9 ")
    with pytest.raises(UserError, match=r"has patchnetvlad 0\.0\.9"):
        ray_cluster._accepted((installed, node), expected)
    with pytest.raises(UserError, match="has other code of patchnetvlad"):
        ray_cluster._accepted((expected + "0", node), expected)
    right = Answer(3, None, ())
    assert ray_cluster._accepted((expected, right), expected) is right


# --- parts, without Ray ------------------------------------------------------------------------------------------


class Job:
    """Doubles numbers; refuses negative ones."""

    def prepare(self):
        def double(number: int) -> int:
            if number < 0:
                raise UserError("negative")
            logging.getLogger("patchnetvlad.x").warning("%d will be doubled", number)
            return 2 * number

        return double


def test_a_worker_answers_with_its_result_or_refusal_and_its_warnings(monkeypatch):
    monkeypatch.setattr("patchnetvlad.engines.ray_worker.ray.get", lambda ref: Job())
    told = answer("first", ray.cloudpickle.dumps(4))
    assert (told.result, told.refused, told.told) == (8, None, ("4 will be doubled",))
    told = answer("first", ray.cloudpickle.dumps(-4))
    assert (told.result, told.refused, told.told) == (None, "negative", ())


def test_places_keep_their_places():
    places = SparseSequence.of("abcdef", [1, 4])
    assert len(places) == 6 and places[1] == "b" and places[4:5] == ["e"]
    with pytest.raises(KeyError):
        places[0]


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (30, 2), (1000, 3), (257, 16)])
def test_parts_are_whole_batches_and_enough_for_all_workers(count, workers):
    cluster = object.__new__(Cluster)
    cluster.workers = workers
    parts = cluster.parts(range(count), 64, 5)
    assert [index for part in parts for index in part] == list(range(count))
    assert {len(part) for part in parts[:-1]} <= {len(parts[0])}
    assert len(parts[0]) <= 64 and (len(parts) == 1 or len(parts[0]) % 5 == 0)
    assert len(parts) >= min(workers, count // 5)


PARTS = make_list([f"{number:02}.jpg" for number in range(11)])


@pytest.mark.parametrize("layout", ["files", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_parts_in_any_order_make_the_same_folder(layout, dtype, tmp_path, monkeypatch):
    for module in (feature_blocks, layouts, shared_extraction):
        monkeypatch.setattr(module, "PICTURES_IN_BLOCK", 4)
    header = make_header(layout=layout, dtype=dtype)
    with FeatureWriter(tmp_path / "one", PARTS, header) as writer:
        for index in writer.missing:
            writer.write(index, *make_features(header, index))
        writer.finish()
    blocks = [[8, 9, 10], [0, 1, 2, 3], [4, 5, 6, 7]]
    for some in (blocks[:1], blocks[1:]):  # the second run goes on where the first was lost
        with FeatureWriter(tmp_path / "parts", PARTS, header) as writer:
            for indices in some:
                written: list[Written] = []
                part = shared_extraction._part(writer.pictures, indices)
                files = (writer.folder, part.pictures, header, None, indices)
                with PictureWriter(*files, written.extend, lambda: "") as pictures:
                    for index in indices:
                        pictures.write(index, *make_features(header, index))
                writer.record(written)
            if not writer.missing:
                writer.finish()
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


def test_a_disk_that_is_full_is_one_line_of_the_worker(tmp_path, monkeypatch):
    def full(path: Path, array: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layouts, "write_patch_array", full)
    files = (tmp_path, LIST, make_header(), None, [0])
    with (
        pytest.raises(UserError, match=r"No space left on device.*finished blocks are kept.*again to continue"),
        PictureWriter(*files, lambda written: None, lambda: "finished blocks are kept") as writer,
    ):
        writer.write(0, *make_features(make_header(), 0))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but logs, and the manifest without the time at which it was begun."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".log"}
    if "manifest.jsonl" in files:
        header, _, lines = files["manifest.jsonl"].partition(b"\n")
        record = json.loads(header)
        del record["created"]
        files["manifest.jsonl"] = json.dumps(record).encode() + b"\n" + lines
    return files


@pytest.mark.parametrize("ways", [("float32", "int8"), ("int8", "auto")])
def test_workers_that_match_in_different_ways_rank_alike(ways, tmp_path):
    options = tiny_model(tmp_path)
    queries, database = example_names("queries")[:4], example_names("database")[:12]
    run(options, EXAMPLES, tmp_path, queries, database)
    config = load_config(ROOT / "configs" / "rootsift.ini", options[3::2])
    lists = [read_image_list(tmp_path / f"{kind}.txt", EXAMPLES) for kind in ("queries", "database")]
    heads = [list(range(first, first + 6)) for first in range(4)]

    def reranked(similarity: str, rows: list[int]) -> list[Any]:
        way = replace(config, feature_match=replace(config.feature_match, similarity=similarity))
        sides = tmp_path / "queries", tmp_path / "database"
        job = MatchingJob(way, expected_header(way), *lists, *sides, None, "cpu", torch.get_num_threads(), 2)
        return job.prepare()((rows, [heads[row] for row in rows]))[0]

    whole = reranked("float32", [0, 1, 2, 3])
    halves = [*reranked(ways[0], [0, 1]), *reranked(ways[1], [2, 3])]
    for one, other in zip(whole, halves, strict=True):
        assert one.order.tobytes() == other.order.tobytes()
        assert one.fused.tobytes() == other.fused.tobytes()
        assert one.per_scale.tobytes() == other.per_scale.tobytes()


@pytest.mark.parametrize("backbone", ["rootsift", "vgg16"])
def test_models_travel(backbone):
    model = PlaceModel(backbone, "patchnetvlad", 4, 0, (2,), (1,)).eval()
    model.precision = "bfloat16"
    travelled = ray.cloudpickle.loads(ray.cloudpickle.dumps(model))
    assert travelled.precision == "bfloat16" and travelled.patch_sizes == model.patch_sizes
    ours, theirs = model.state_dict(), travelled.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_lost_head_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = object.__new__(Cluster)
    cluster._head, cluster._where = f"127.0.0.1:{port}", "--address auto"
    with pytest.raises(UserError, match=rf"--address auto: Ray's head at 127\.0\.0\.1:{port} is lost .*again"):
        cluster._require_head()
    with pytest.raises(UserError, match=r"is lost"), cluster._errors():
        raise ray.exceptions.LocalRayletDiedError()


# --- a cluster of two machines, of which one is lost -------------------------------------------------------------


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A head and a second machine, one core each."""
    from ray.cluster_utils import Cluster as Machines

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        one = {"num_cpus": 1, "object_store_memory": 100_000_000}
        health = {"health_check_period_ms": 500, "health_check_failure_threshold": 6}
        head = {**one, "include_dashboard": False, "_system_config": health}
        cluster = Machines(initialize_head=True, head_node_args=head)
        try:
            cluster.second = cluster.add_node(**one)
            yield cluster
        finally:
            cluster.shutdown()


def process_of(machine: Any, kind: str) -> psutil.Process:
    return psutil.Process(machine.all_processes[kind][0].process.pid)


def busy_worker(machine: Any) -> psutil.Process | None:
    """A worker of a machine that holds a part of the work, if there is one."""
    for worker in process_of(machine, "raylet").children(recursive=True):
        try:
            if worker.cmdline()[:1] == ["ray::patchnetvlad"]:
                return worker
        except psutil.NoSuchProcess:
            continue
    return None


class KilledOnce(threading.Thread):
    """Kills a process by its id once a worker of a machine holds a part; `held` says that it came to that.

    Where Ray's head is killed the worker is stopped before, since workers that have all parts can do without a head.
    """

    def __init__(self, machine: Any, kind: str | None = None, waiting: Any = None) -> None:
        """kind: of Ray's own processes, None for the worker itself; waiting: a machine that leaves it work."""
        super().__init__(daemon=True)
        self.machine, self.kind, self.waiting, self.held = machine, kind, waiting, False
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 60
        stopped: dict[int, psutil.Process] = {}
        try:
            while time.monotonic() < deadline and not self.held:
                worker = busy_worker(self.machine)
                if worker is not None:
                    victim = worker if self.kind is None else process_of(self.machine, self.kind)
                    if self.kind == "gcs_server":
                        os.kill(worker.pid, signal.SIGSTOP)
                    os.kill(victim.pid, signal.SIGKILL)
                    self.held = True
                elif self.waiting and (other := busy_worker(self.waiting)) is not None and other.pid not in stopped:
                    stopped[other.pid] = other
                    other.suspend()
                time.sleep(0.01)
        except KeyError:  # the machines were ended
            return
        finally:
            for other in stopped.values():
                with suppress(psutil.NoSuchProcess):
                    other.resume()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_part_whose_worker_outlives_its_store_is_worked_on_again(machines, tmp_path):
    marker = tmp_path / "failed"

    class Job:  # here, so that it travels whole
        def prepare(self):
            if not marker.exists():
                marker.touch()
                raise BrokenPipeError(32, "Broken pipe")
            return lambda number: 2 * number

    with connected(RayOptions(machines.address, device="cpu", cpus=1)) as cluster:
        assert dict(cluster.answers(Job(), [3, 4])) == {0: 6, 1: 8}
    assert marker.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_lost_machine_a_killed_worker_and_a_lost_head(machines, tmp_path, capfd):
    options = tiny_model(tmp_path)
    queries, database = example_names("queries"), example_names("database")
    write_ground_truth(tmp_path / "truth.npz", queries, database)
    expected = run(options, EXAMPLES, tmp_path, queries, database)
    shared = ["--engine", "ray", "--address", machines.address, "--worker_cpus", "1"]
    shared = [*options, "--dataset_root_dir", str(EXAMPLES), "-q", "--nocuda", *shared]
    listed = ["--dataset_file_path", str(tmp_path / "database.txt"), "--output_features_dir"]
    capfd.readouterr()

    killed = KilledOnce(machines.head_node)  # a worker; then the second machine, while matching
    assert feature_extract([*shared, *listed, str(tmp_path / "shared")]) == 0
    assert killed.held
    assert contents(tmp_path / "shared") == contents(tmp_path / "database")

    match = ["--query_file_path", str(tmp_path / "queries.txt"), "--index_file_path", str(tmp_path / "database.txt")]
    match += [
        "--query_input_features_dir",
        str(tmp_path / "queries"),
        "--ground_truth_path",
        str(tmp_path / "truth.npz"),
    ]
    match += ["--index_input_features_dir", str(tmp_path / "shared"), "--result_save_folder", str(tmp_path / "ranked")]
    killed = KilledOnce(machines.second, "raylet", waiting=machines.head_node)
    assert feature_match([*shared, *match]) == 0
    assert killed.held and not process_is_there(machines.second)
    assert contents(tmp_path / "ranked") == contents(expected)
    out, errors = capfd.readouterr()
    assert errors == ""
    assert "Raylet" not in out

    killed = KilledOnce(machines.head_node, "gcs_server")
    assert feature_extract([*shared, *listed, str(tmp_path / "lost")]) == 2
    assert killed.held
    (line,) = capfd.readouterr().err.splitlines()
    assert f"Ray's head at {machines.address} is lost" in line
    assert "run the same command again to continue" in line


def process_is_there(machine: Any) -> bool:
    pid = machine.all_processes["raylet"][0].process.pid
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- recipes that cannot be run here ------------------------------------------------------------------------------

RECIPES = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_slurm_script_is_one(tmp_path):
    (script,) = re.findall(r"^```text\n(#!/bin/bash\n#SBATCH.*?)^```", RECIPES, re.MULTILINE | re.DOTALL)
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True, capture_output=True)
    (options,) = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
    asked = dict(option.removeprefix("--").split("=") for option in options.split())
    assert asked.keys() == {"nodes", "ntasks-per-node", "cpus-per-task", "time"}
    others = int(asked["nodes"]) - 1
    assert f"--nodes={others} --ntasks={others} --exclude" in script
    assert script.count(f"--num-cpus {asked['cpus-per-task']} ") == 2


def test_the_kubernetes_cluster_has_kuberays_fields():
    """Names as in the sample clusters of KubeRay 1.1 (ray.io/v1)."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```", RECIPES, re.MULTILINE | re.DOTALL)
    cluster = yaml.safe_load(text)
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert spec.keys() == {"headGroupSpec", "workerGroupSpecs"}
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head.keys() == {"rayStartParams", "template"} and head["rayStartParams"] == {"num-cpus": "0"}
    sizes = {"replicas", "minReplicas", "maxReplicas"}
    assert workers.keys() == sizes | {"groupName", "rayStartParams", "template"}
    assert 1 <= workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert volumes == {mount["name"] for mount in container["volumeMounts"]}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
    assert f"service/{cluster['metadata']['name']}-head-svc" in RECIPES  # what KubeRay calls the head's service
