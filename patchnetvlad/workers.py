"""How this machine matches fastest: pairs shared out among threads, and the way of matching that it is quickest in.

Each thread computes alone. Products of a millisecond gain little from threads inside them, and lose most of their speed
where another process takes a core: torch's threads then wait for one another at every step.
"""

import ctypes
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import TypeVar

import torch

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.images import in_order_by
from patchnetvlad.matching import WAYS, Way
from patchnetvlad.reranking import match_pair

logger = logging.getLogger(__name__)

COMPANY_SECONDS, COMPANY_SHARE = 5.0, 0.8  # watched at a time; a thread has less of them where others are busy
TRIALS = 3  # of each way; the least time counts
PAIR_MEMORY = (32 << 20, 256 << 20)  # for `keep_freed_memory`: the similarities of pairs, but not candidates' patches
PICTURE_MEMORY = (1 << 30, 1 << 30)  # the encoder's maps and the patches of a picture
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's numbers for the two

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads for as many pairs at a time as torch has threads where they are made; they end with this object."""

    def __init__(self) -> None:
        keep_freed_memory(*PAIR_MEMORY)
        self.count = torch.get_num_threads()
        self._pool = _single_threads(self.count) if self.count > 1 else None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items, which are taken here, one more than are worked on."""
        if self._pool is None:
            yield from map(work, items)
            return
        yield from in_order_by(self._pool, work, items, self.count)


def keep_freed_memory(largest: int, most: int) -> None:
    """Let a process on Linux keep the memory of freed arrays of at most ``largest`` bytes for the next ones, up to
    ``most`` bytes in a row.

    Otherwise it is given back after each operation and handed out again page by page, which takes longer than the
    matching of small descriptors, and a tenth of the time of describing a picture.
    """
    if sys.platform == "linux":
        adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, other C libraries need not
        if adjust is not None:
            adjust(_MMAP_THRESHOLD, largest)
            adjust(_TRIM_THRESHOLD, most)


def _single_threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads have one torch thread each, while all others keep theirs."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="matching", initializer=_compute_alone)
    started = Barrier(count)
    for future in [pool.submit(started.wait) for _ in range(count)]:
        future.result()
    # torch's setting is each thread's own, but the last one is the default of threads that start later
    torch.set_num_threads(count)
    return pool


class Company:
    """Notices that other processes take the cores that torch's threads want, and says once what helps.

    A thread that computes has the processor all the time; what it has less than that, others had.
    """

    def __init__(self) -> None:
        self._seconds = self._processor_seconds = 0.0
        self._told = torch.get_num_threads() < 2  # nothing helps then

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around work of this thread on the processor that neither sleeps nor reads files."""
        began, processor = time.perf_counter(), time.thread_time()
        yield
        self._seconds += time.perf_counter() - began
        self._processor_seconds += time.thread_time() - processor
        if not self._told and self._seconds > COMPANY_SECONDS:
            self._tell(self._processor_seconds / self._seconds)
            self._seconds = self._processor_seconds = 0.0

    def _tell(self, share: float) -> None:
        if share < COMPANY_SHARE:
            self._told = True
            logger.info(
                "other processes are busy on this machine (%.0f %% of the time left for this one): with the "
                "environment variable OMP_NUM_THREADS=%d it loses less of its speed beside them",
                100 * share,
                torch.get_num_threads() // 2,
            )


def _compute_alone() -> None:
    torch.get_num_threads()  # a new thread takes over the default when first asked, and would do so after the next line
    torch.set_num_threads(1)


def choose_way(similarity: str, query: PatchFeatures, reference: PatchFeatures) -> str:
    """The name in WAYS to match with, and the log says why: the one that [feature_match] similarity asks for, or for
    "auto" the fastest on these two pictures, which are on one device. All ways give the same matches.

    Raises UserError for a way that this device cannot go.
    """
    on_processor = query.descriptors[0].device.type == "cpu"
    possible = [name for name, way in WAYS.items() if not way.rounds or (on_processor and way.works())]
    if similarity != "auto":
        if similarity not in possible:
            raise UserError(
                f"[feature_match] similarity = {similarity}: this device does not multiply 8-bit numbers exactly (auto "
                "takes what suits it)"
            )
        chosen, reason = similarity, "as configured"
    elif len(possible) == 1:
        chosen, reason = possible[0], "the only way on this device"
    else:
        seconds = _measure(possible, query, reference)
        chosen = min(seconds, key=seconds.__getitem__)
        times = ", ".join(f"{name} {1000 * seconds[name]:.1f} ms" for name in seconds)
        reason = f"the fastest here, a pair of the first pictures: {times}"
    logger.info("similarities %s (%s)", WAYS[chosen].text, reason)
    return chosen


def _measure(names: list[str], query: PatchFeatures, reference: PatchFeatures) -> dict[str, float]:
    """Least seconds to match two pictures in each way, tried in turn."""
    prepared = {name: _prepare(WAYS[name], query, reference) for name in names}
    seconds = dict.fromkeys(names, math.inf)
    for _ in range(TRIALS):
        for name in names:
            started = time.perf_counter()
            match_pair(*prepared[name])
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def _prepare(way: Way, query: PatchFeatures, reference: PatchFeatures) -> tuple[PatchFeatures, PatchFeatures]:
    return (query.round_as("query"), reference.round_as("reference")) if way.rounds else (query, reference)
