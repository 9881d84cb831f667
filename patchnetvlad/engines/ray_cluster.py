"""A Ray cluster as a run sees it: connected, its parts of the work handed out, answers taken back as they come.

A part that a lost worker held goes to another one. Nothing runs on a machine whose copy of the package is another.
"""

import io
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
import ray.cloudpickle
import torch
from ray.exceptions import RayError, RayTaskError

from patchnetvlad.engines.ray_worker import Answer, Job
from patchnetvlad.errors import UserError

logger = logging.getLogger(__name__)

_LOSSES = 5  # of workers or machines that held one part, after which the part is to blame
_SECONDS = 2.0  # between looks at the head of the cluster
_PATIENCE = 5.0  # seconds for a head to answer
_PARTS_AHEAD = 4  # parts handed out for each worker, so that none waits for the next
_LEAST_AHEAD = 64  # parts handed out whatever the workers are: what waits makes a cluster grow that can

_GO_ON = "what is finished is kept; run the same command again to continue"


@dataclass(frozen=True)
class RayOptions:
    """How a run uses Ray.

    address: HOST:PORT of a cluster's head, "auto" for the cluster of this machine, None for one of its own that ends
    with the run; device: auto, cpu or cuda; gpus: so many at a time, None for all there are; cpus: of each worker,
    None for an equal share for each GPU, or without GPUs for one core, and with whole_machines for all cores.
    """

    address: str | None = None
    device: str = "auto"
    gpus: int | None = None
    cpus: int | None = None
    whole_machines: bool = False

    def worker_cpus(self, machines: Sequence[tuple[int, int]], with_gpu: bool) -> int:
        """Cores of a worker on machines with these numbers of cores and GPUs, the smallest of which decides."""
        if self.cpus is not None:
            return self.cpus
        if with_gpu:
            return max(1, min((cores // gpus for cores, gpus in machines if cores and gpus), default=1))
        return min((cores for cores, _ in machines if cores), default=1) if self.whole_machines else 1


class Cluster:
    """A cluster that is connected. device: of its workers, "cpu" or "cuda"; cpus: of each; workers: at a time;
    most: workers on one machine."""

    def __init__(self, options: RayOptions) -> None:
        """Raises UserError where the cluster has not got what is asked for."""
        self._where = f"--address {options.address}" if options.address else "this machine"
        self._head: str = ray.get_runtime_context().gcs_address
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        machines = [(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in resources]
        gpus = sum(count for _, count in machines)
        check_gpus(options, gpus, self._where)
        self.device = "cuda" if gpus and options.device != "cpu" else "cpu"
        self.cpus = options.worker_cpus(machines, self.device == "cuda")
        counts = [cores // self.cpus if self.device == "cpu" else min(cores // self.cpus, on) for cores, on in machines]
        self.workers = min(sum(counts), options.gpus or sum(counts))
        self.most = max(counts, default=0)
        self._limit = options.gpus or max(_LEAST_AHEAD, _PARTS_AHEAD * self.workers)
        if not self.workers:
            raise UserError(
                f"{self._where}: none of Ray's {len(machines)} machines offers a worker {self.cpus} CPUs"
                f"{' and a GPU' if self.device == 'cuda' else ''} (lower --worker_cpus, or start machines first)"
            )
        logger.info(
            "Ray: %d workers of %d CPUs%s on %d machines",
            self.workers,
            self.cpus,
            " and a GPU" if self.device == "cuda" else "",
            sum(count > 0 for count in counts),
        )

    def parts(self, items: Sequence[int], most: int, multiple: int = 1) -> list[list[int]]:
        """Items cut into parts of at most `most`, enough that all workers end at about the same time; every part but
        the last is a multiple."""
        even = -(-len(items) // (4 * self.workers))
        size = max(multiple, min(most // multiple, -(-even // multiple)) * multiple)
        return [list(items[first : first + size]) for first in range(0, len(items), size)]

    def answers(self, job: Job, parts: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """What the job makes of each part, with the part's place, in the order in which they are done.

        Raises UserError for what a worker refuses, workers with another package, a part that no worker survives,
        and a cluster that is lost.
        """
        gpus = 1 if self.device == "cuda" else 0
        installed, work = _checked_work()
        options = {"num_cpus": self.cpus, "num_gpus": gpus, "max_retries": _LOSSES, "name": "patchnetvlad"}
        options["retry_exceptions"] = [OSError]  # of a worker that outlives its machine's store by a moment
        remote = ray.remote(work).options(**options)
        waiting = enumerate(parts)
        running: dict[ray.ObjectRef, int] = {}
        told: set[str] = set()
        try:
            with self._errors():
                shared, expected = [ray.put(job)], installed()
                while True:
                    for place, part in islice(waiting, self._limit - len(running)):
                        running[remote.remote(expected, shared, ray.cloudpickle.dumps(part))] = place
                    if not running:
                        return
                    done, _ = ray.wait(list(running), timeout=_SECONDS)
                    if not done:
                        self._require_head()
                    for ref in done:
                        answer = _accepted(ray.get(ref), expected)
                        for line in answer.told:
                            if line not in told:
                                logger.warning("%s", line)
                        told.update(answer.told)
                        yield running.pop(ref), answer.result
        except BaseException:
            ray.shutdown()  # ends the workers, which otherwise would go on writing
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Ray's errors in one line; those of the package in a worker keep their traceback."""
        try:
            yield
        except RayTaskError:
            raise
        except RayError as error:
            self._require_head()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{self._where}: Ray lost the work: {reason} ({_GO_ON})") from error

    def _require_head(self) -> None:
        host, _, port = self._head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        except OSError as error:
            raise UserError(f"{self._where}: Ray's head at {self._head} is lost ({_GO_ON})") from error


def check_gpus(options: RayOptions, there: int, where: str) -> None:
    """Raises UserError for more GPUs than there are."""
    if (options.gpus or int(options.device == "cuda")) > there:
        asked = f"[global_params] ngpu = {options.gpus}" if options.gpus else "--device cuda"
        raise UserError(f"{asked}: {where} has {there} GPUs (ngpu = 1 takes as many as there are)")


@contextmanager
def connected(options: RayOptions) -> Iterator[Cluster]:
    """A cluster for as long as the context lasts.

    Raises UserError when it cannot be reached, is of another version of Ray or Python, or has not got what is asked.
    """
    if options.address is None:
        check_gpus(options, torch.cuda.device_count(), "this machine")
    elif options.address != "auto":
        _require_answer(options.address)
    ray_log = logging.getLogger("ray")
    level = ray_log.level
    ray_log.setLevel(logging.CRITICAL)
    # Ray prints what it has to say of lost machines among the results
    with redirect_stdout(_Heard()):
        try:
            _start(options)
            yield Cluster(options)
        finally:
            ray.shutdown()
            ray_log.setLevel(level)


def _start(options: RayOptions) -> None:
    # Without the first, Ray warns of what a later version will do about GPUs of workers that ask for none
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=options.address or "local",
            num_gpus=0 if options.address is None and options.device == "cpu" else None,
            include_dashboard=None if options.address else False,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.CRITICAL,
        )
    except (ConnectionError, OSError, RuntimeError, ValueError, RayError) as error:
        where = f"--address {options.address}" if options.address else "--engine ray"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: Ray cannot be used there: {reason}") from error


def _require_answer(address: str) -> None:
    """Raises UserError at once where nothing listens; Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UserError(
            f"--address {address}: expected HOST:PORT of the cluster's head, such as 10.0.0.1:6379, or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({error}; start it with ray start --head --port {port})"
        ) from error


class _Heard(io.TextIOBase):
    """Where Ray prints to: the log's details."""

    def write(self, text: str) -> int:
        """Log the lines."""
        for line in text.splitlines():
            if line.strip():
                logger.debug("Ray: %s", line)
        return len(text)


def _accepted(reply: tuple[str, Any], expected: str) -> Answer:
    """A worker's answer; raises UserError for what it refuses, and for a worker whose package is another."""
    installed, given = reply
    if installed == expected:
        answer: Answer = given
        if answer.refused is not None:
            raise UserError(answer.refused)
        return answer
    here = expected.split()[0]
    if not installed:
        said = "has no patchnetvlad"
    elif installed.split()[0] == here:
        said = f"has other code of patchnetvlad {here} than this machine"
    else:
        said = f"has patchnetvlad {installed.split()[0]}"
    raise UserError(
        f"Ray's worker on {given} {said}, and {here} is wanted (install the same one on every machine; {_GO_ON})"
    )


def _checked_work() -> tuple[Callable[[], str], Callable[[str, list[Any], bytes], tuple[str, Any]]]:
    """Which package is installed, and work that is only done where that is the expected one.

    Functions within a function travel as they are and not by name, so a machine with another package, or none, can
    still say so.
    """

    def installed() -> str:
        import hashlib
        from importlib.util import find_spec
        from pathlib import Path

        spec = find_spec("patchnetvlad")
        if spec is None or spec.origin is None:
            return ""
        digest = hashlib.sha256()
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        from patchnetvlad import __version__

        return f"{__version__} {digest.hexdigest()[:12]}"

    def work(expected: str, shared: list[Any], part: bytes) -> tuple[str, Any]:
        import platform

        there = installed()
        if there != expected:
            return there, platform.node()
        from patchnetvlad.engines.ray_worker import answer

        return there, answer(shared[0], part)

    return installed, work
