"""A bounded cache of pictures' feature arrays which reads ahead in the background.

One evaluation asks for the same database pictures again and again, tens of MB each: what fits stays in memory, and
while one picture is matched the next ones are read.
"""

import heapq
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeAlias

import numpy as np
import psutil

Arrays: TypeAlias = tuple[np.ndarray, ...]

_AHEAD = 4  # pictures read ahead at most: more would take room from those that are used again
_NEVER = 1 << 62  # place of a use that does not come

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
    """Pictures in memory up to a number of bytes; safe to use from several threads.

    load: reads the arrays of a picture; size: how many bytes these will take, told before reading (an upper bound
    will do); max_bytes: what the cache may hold, 0 for nothing; workers: threads that read ahead, 0 for none.
    Beyond max_bytes the picture goes whose next use, as `prefetch` announced it, is the furthest away; of those that
    are not announced, the least recently used. A picture that is being read is never read twice at the same time.
    Memory holds besides the pictures in use and at most one read for each thread.
    """

    def __init__(
        self, load: Callable[[int], Arrays], size: Callable[[int], int], max_bytes: int, workers: int = 2
    ) -> None:
        self.max_bytes = max_bytes
        self._load = load
        self._size = size
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="features") if workers else None
        self._lock = Lock()
        self._held = _Held()
        self._loading: dict[int, Future[Arrays]] = {}
        self._plan = _Plan(())
        self._scheduled = 0  # places of the plan that reading ahead has passed
        self._ahead: dict[int, int] = {}  # scheduled and not yet asked for: bytes
        self._hits = self._reads = self._bytes_read = 0

    @property
    def statistics(self) -> CacheStatistics:
        """Counts since the cache was made."""
        with self._lock:
            return CacheStatistics(self._hits, self._reads, self._bytes_read, len(self._held), self._held.bytes)

    def get(self, index: int) -> Arrays:
        """Arrays of a picture, from memory or from disk. They are shared: do not change them."""
        with self._lock:
            self._plan.use(index)
            held = self._held.get(index)
            if held is not None:
                self._held.put(index, held, self._plan.next_use(index))
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
        """Announce in which order pictures will be asked for, repetitions included, and read ahead in it.

        Takes the place of an earlier call. Ahead are at most half the cache and a few pictures, which each `get` moves
        on. Errors of reading are raised by `get`.
        """
        with self._lock:
            self._plan = _Plan(indices)
            self._scheduled = 0
            self._ahead.clear()
            for index, arrays in self._held.items():
                self._held.put(index, arrays, self._plan.next_use(index))
            self._schedule()

    def pass_over(self, index: int) -> None:
        """What `get` does, without the arrays: somebody has the picture already whose turn it is."""
        with self._lock:
            self._plan.use(index)
            held = self._held.get(index)
            if held is not None:
                self._held.put(index, held, self._plan.next_use(index))
            self._asked_for(index)

    def forget(self) -> None:
        """Drop what is held: pictures are to be read anew."""
        with self._lock:
            self._held = _Held()

    def close(self) -> None:
        """Stop reading ahead and forget everything."""
        with self._lock:
            self._plan = _Plan(())
            self._scheduled = 0
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for future in self._loading.values():
                future.cancel()
            self._loading.clear()
            self._held = _Held()
            self._ahead.clear()

    def _asked_for(self, index: int) -> None:
        if self._ahead.pop(index, None) is not None:
            self._schedule()

    def _schedule(self) -> None:
        """Start background reads until enough is spoken for; the lock is held."""
        if self._pool is None:
            return
        while self._scheduled < len(self._plan):
            index = self._plan.order[self._scheduled]
            size = self._size(index)
            if index not in self._ahead and size <= self.max_bytes:
                # A single picture may fill more than half of a small cache.
                full = sum(self._ahead.values()) + size > self.max_bytes // 2 or len(self._ahead) >= _AHEAD
                if self._ahead and full:
                    return
                self._ahead[index] = size
                if index not in self._held and index not in self._loading:
                    future: Future[Arrays] = Future()
                    self._loading[index] = future
                    self._pool.submit(self._read, index, future)
            self._scheduled += 1

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
            if size <= self.max_bytes:
                self._held.put(index, arrays, self._plan.next_use(index))
                while self._held.bytes > self.max_bytes:
                    self._held.drop_furthest()
        future.set_result(arrays)


class _Plan:
    """Which picture will be asked for when: places in an announced order."""

    def __init__(self, indices: Iterable[int]) -> None:
        order = np.fromiter(indices, dtype=np.int64)
        self.order: list[int] = order.tolist()
        self._after = np.full(len(order), _NEVER)  # place of the same picture's next use after each place
        self._next: dict[int, int] = {}
        if len(order) == 0:
            return
        places = np.argsort(order, kind="stable")  # by picture, then by place
        same = order[places[1:]] == order[places[:-1]]
        self._after[places[:-1][same]] = places[1:][same]
        first = places[np.concatenate([[True], ~same])]
        self._next = dict(zip(order[first].tolist(), first.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.order)

    def use(self, index: int) -> None:
        """A picture has been asked for."""
        place = self._next.get(index, _NEVER)
        if place < _NEVER:
            self._next[index] = int(self._after[place])

    def next_use(self, index: int) -> int:
        """Place of the next use of a picture, _NEVER for none."""
        return self._next.get(index, _NEVER)


class _Held:
    """Pictures in memory, and which of them to drop first."""

    def __init__(self) -> None:
        self.bytes = 0
        self._arrays: dict[int, tuple[Arrays, int]] = {}  # with the number of the entry that counts
        self._entries: list[tuple[int, int, int]] = []  # heap of (−next use, number, picture); some are outdated
        self._number = 0

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, index: int) -> bool:
        return index in self._arrays

    def get(self, index: int) -> Arrays | None:
        """Arrays of a picture that is held."""
        return self._arrays[index][0] if index in self._arrays else None

    def items(self) -> list[tuple[int, Arrays]]:
        """All pictures, in no order."""
        return [(index, arrays) for index, (arrays, _) in self._arrays.items()]

    def put(self, index: int, arrays: Arrays, next_use: int) -> None:
        """Hold a picture, or change when its next use is."""
        if index not in self._arrays:
            self.bytes += sum(array.nbytes for array in arrays)
        self._number += 1
        self._arrays[index] = arrays, self._number
        heapq.heappush(self._entries, (-next_use, self._number, index))
        if len(self._entries) > 4 * len(self._arrays) + 64:
            self._entries = [entry for entry in self._entries if self._counts(entry)]
            heapq.heapify(self._entries)

    def drop_furthest(self) -> None:
        """Drop the picture whose next use is the furthest away, of equal ones the least recently used."""
        while True:
            entry = heapq.heappop(self._entries)
            if self._counts(entry):
                arrays, _ = self._arrays.pop(entry[2])
                self.bytes -= sum(array.nbytes for array in arrays)
                return

    def _counts(self, entry: tuple[int, int, int]) -> bool:
        return entry[2] in self._arrays and self._arrays[entry[2]][1] == entry[1]
