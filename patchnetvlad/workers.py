"""Pairs of pictures shared out among threads, each of which computes alone.

Products of a millisecond gain little from threads inside them, and lose most of their speed where another process takes
a core: torch's threads then wait for one another at every step.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads for as many pairs at a time as torch has threads where they are made; they end with this object."""

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._pool = _single_threads(self.count) if self.count > 1 else None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items, which are taken here, one more than are worked on."""
        if self._pool is None:
            yield from map(work, items)
            return
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                running.append(self._pool.submit(work, item))
                if len(running) > self.count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _single_threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads have one torch thread each, while all others keep theirs."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="matching", initializer=_compute_alone)
    started = Barrier(count)
    for future in [pool.submit(started.wait) for _ in range(count)]:
        future.result()
    # torch's setting is each thread's own, but the last one is the default of threads that start later
    torch.set_num_threads(count)
    return pool


def _compute_alone() -> None:
    torch.get_num_threads()  # a new thread takes over the default when first asked, and would do so after the next line
    torch.set_num_threads(1)
