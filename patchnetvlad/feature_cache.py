"""A bounded cache of pictures' feature arrays which reads ahead in the background.

One evaluation asks for the same database pictures again and again, tens of MB each: what fits stays in memory, and
while one picture is matched the next ones are read.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeAlias

import numpy as np
import psutil

Arrays: TypeAlias = tuple[np.ndarray, ...]

_CONTAINER = Path("/sys/fs/cgroup")
_CONTAINER_FILES = (  # limit, use, and what of it the system can take back, in both versions of Linux's control groups
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def cache_bytes(cache_gb: float | None) -> int:
    """What a cache may hold: [feature_match] cache_gb in bytes, or half of the memory available."""
    return available_memory() // 2 if cache_gb is None else int(cache_gb * 1e9)


def available_memory(container: Path = _CONTAINER) -> int:
    """Bytes that this process can still take without making others swap, within the limit of its container."""
    available = int(psutil.virtual_memory().available)
    for limit_name, used_name, details_name, spare_key in _CONTAINER_FILES:
        try:
            limit, used, details = ((container / name).read_text() for name in (limit_name, used_name, details_name))
        except OSError:
            continue  # no container, or another kind of system
        if limit.strip().isdecimal():  # and not "max"
            spare = dict(line.split() for line in details.splitlines()).get(spare_key, "0")
            available = min(available, max(0, int(limit) - int(used) + int(spare)))
    return available


@dataclass(frozen=True)
class CacheStatistics:
    """What a cache has done so far.

    hits: pictures answered from memory or by a read already under way; reads: pictures read from disk; bytes_read:
    their size in memory; held_pictures and held_bytes: what the cache holds now.
    """

    hits: int
    reads: int
    bytes_read: int
    held_pictures: int
    held_bytes: int


class PictureCache:
    """The most recently used pictures, up to a number of bytes; safe to use from several threads.

    load: reads the arrays of a picture; size: how many bytes these will take, told before reading (an upper bound
    will do); max_bytes: what the cache may hold, 0 for nothing. A picture that is being read is never read twice at
    the same time. Beyond max_bytes, memory holds the pictures in use and at most one read for each thread.
    """

    def __init__(
        self, load: Callable[[int], Arrays], size: Callable[[int], int], max_bytes: int, workers: int = 2
    ) -> None:
        self._load = load
        self._size = size
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="features")
        self._lock = Lock()
        self._held: OrderedDict[int, Arrays] = OrderedDict()  # least recently used first
        self._held_bytes = 0
        self._loading: dict[int, Future[Arrays]] = {}
        self._coming: Iterator[int] = iter(())
        self._next: int | None = None  # taken from _coming, not yet scheduled
        self._ahead: dict[int, int] = {}  # scheduled and not yet asked for: bytes
        self._ahead_bytes = 0
        self._hits = self._reads = self._bytes_read = 0

    @property
    def max_bytes(self) -> int:
        """What the cache may hold."""
        return self._max_bytes

    @property
    def statistics(self) -> CacheStatistics:
        """Counts since the cache was made."""
        with self._lock:
            return CacheStatistics(self._hits, self._reads, self._bytes_read, len(self._held), self._held_bytes)

    def get(self, index: int) -> Arrays:
        """Arrays of a picture, from memory or from disk. They are shared: do not change them."""
        with self._lock:
            held = self._held.get(index)
            if held is not None:
                self._held.move_to_end(index)
                self._hits += 1
                self._asked_for(index)
                return held
            loading = self._loading.get(index)
            here = loading is None
            if loading is None:
                loading = self._loading[index] = Future()
            else:
                self._hits += 1
        if here:
            self._read(index, loading)
        try:
            return loading.result()
        finally:
            with self._lock:
                self._asked_for(index)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Read pictures in the background, in the order in which they will be asked for.

        Takes the place of an earlier call. At most half the cache is read ahead, so that no picture is dropped
        before its use; each `get` moves the window on. The order may be that of a whole run, repetitions included:
        it is consumed as the window moves. Errors of reading are raised by `get`.
        """
        with self._lock:
            self._ahead.clear()
            self._ahead_bytes = 0
            self._coming = iter(indices)
            self._next = None
            self._schedule()

    def forget(self) -> None:
        """Drop what is held: pictures are to be read anew."""
        with self._lock:
            self._held.clear()
            self._held_bytes = 0

    def close(self) -> None:
        """Stop reading ahead and forget everything."""
        with self._lock:
            self._coming, self._next = iter(()), None
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for future in self._loading.values():
                future.cancel()
            self._loading.clear()
            self._held.clear()
            self._ahead.clear()
            self._held_bytes = self._ahead_bytes = 0

    def _asked_for(self, index: int) -> None:
        size = self._ahead.pop(index, None)
        if size is not None:
            self._ahead_bytes -= size
            self._schedule()

    def _schedule(self) -> None:
        """Start background reads until half the cache is spoken for; the lock is held."""
        budget = self._max_bytes // 2
        while True:
            if self._next is None:
                self._next = next(self._coming, None)
            if self._next is None:
                return
            index, size = self._next, self._size(self._next)
            if index not in self._ahead and size <= self._max_bytes:
                # A single picture may fill more than half of a small cache.
                if self._ahead and self._ahead_bytes + size > budget:
                    return
                self._ahead[index] = size
                self._ahead_bytes += size
                if index in self._held:
                    self._held.move_to_end(index)
                elif index not in self._loading:
                    future: Future[Arrays] = Future()
                    self._loading[index] = future
                    self._pool.submit(self._read, index, future)
            self._next = None

    def _read(self, index: int, future: "Future[Arrays]") -> None:
        """Read a picture and keep it; the outcome, an error too, goes into `future`."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            arrays = self._load(index)
        except BaseException as error:
            with self._lock:
                self._loading.pop(index, None)
            future.set_exception(error)
            return
        with self._lock:
            self._loading.pop(index, None)
            self._reads += 1
            size = sum(array.nbytes for array in arrays)
            self._bytes_read += size
            if size <= self._max_bytes:
                self._held[index] = arrays
                self._held_bytes += size
                while self._held_bytes > self._max_bytes:
                    _, dropped = self._held.popitem(last=False)
                    self._held_bytes -= sum(array.nbytes for array in dropped)
        future.set_result(arrays)
