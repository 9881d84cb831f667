"""Threads that share pairs keep order, memory and everybody else's settings."""

import mmap
import platform
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchnetvlad import workers
from patchnetvlad.config import FeatureMatchConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.ranking import Ranker
from patchnetvlad.store.reading.patch_sources import DescribedPictures, PatchesInMemory
from patchnetvlad.workers import Workers


@pytest.fixture(params=[1, 3])
def threads(request):
    """torch's threads, as on a machine with as many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_items(threads):
    def work(item):
        time.sleep(0.002 * (7 - item % 8))
        return item, threading.current_thread().name

    results = list(Workers().map(work, range(24)))
    assert [item for item, _ in results] == list(range(24))
    assert len({name for _, name in results}) == threads


def test_few_items_are_taken_ahead(threads):
    taken = []
    workers = Workers()
    results = workers.map(lambda item: item, (taken.append(item) or item for item in range(100)))
    for done in range(1, 5):
        next(results)
        assert len(taken) <= done + threads
    results.close()
    assert len(taken) <= 4 + threads
    assert list(workers.map(lambda item: -item, [1, 2])) == [-1, -2]


def test_errors_arrive_where_the_results_are_asked_for(threads):
    with pytest.raises(ZeroDivisionError):
        list(Workers().map(lambda item: 1 // item, [2, 1, 0, 3]))


def test_each_worker_has_one_torch_thread_and_others_keep_theirs(threads):
    workers = Workers()
    barrier = threading.Barrier(threads)

    def count(_):
        barrier.wait(timeout=30)
        return torch.get_num_threads()

    assert list(workers.map(count, range(threads))) == [1] * threads
    found = [torch.get_num_threads()]
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [threads, threads]


def picture(seed):
    grids = (PatchGrid(12, 12, 1), PatchGrid(12, 12, 2))
    generator = torch.Generator().manual_seed(seed)
    return PatchFeatures(
        tuple(F.normalize(torch.randn(len(grid), 300, generator=generator), dim=1) for grid in grids), grids
    )


def test_candidates_are_decoded_by_the_threads_that_match_them(threads):
    """With one torch thread: several of one thread's would wait for one another, and for the others' products."""

    class Watched(PatchesInMemory):
        def patches(self, index, device=torch.device("cpu")):  # noqa: B008
            asked.append((threading.get_ident(), torch.get_num_threads(), index))
            return super().patches(index, device)

    asked = []
    options = FeatureMatchConfig(matcher="RANSAC", patchweights2use=(0.5, 0.5), similarity="float32")
    database = DescribedPictures(np.eye(9, dtype=np.float32), Watched(map(picture, range(9))))
    ranker = Ranker(options, database, torch.device("cpu"))
    ranker.rank(DescribedPictures(np.ones((1, 9), dtype=np.float32), PatchesInMemory([picture(4)])))
    matched = asked[1:]  # after the pair that decides how pairs are compared
    assert sorted(index for _, _, index in matched) == list(range(9))
    assert {count for _, count, _ in matched} == {1}
    assert threads == 1 or threading.get_ident() not in {thread for thread, _, _ in matched}


def test_a_ranking_does_not_depend_on_the_number_of_threads():
    database = [picture(seed) for seed in range(9)]
    query = picture(4)
    before = torch.get_num_threads()
    rankings = []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            options = FeatureMatchConfig(matcher="RANSAC", patchweights2use=(0.5, 0.5))
            described = DescribedPictures(np.eye(9, dtype=np.float32), PatchesInMemory(database))
            queries = DescribedPictures(np.ones((1, 9), dtype=np.float32), PatchesInMemory([query]))
            rankings.append(Ranker(options, described, torch.device("cpu")).rank(queries))
        finally:
            torch.set_num_threads(before)
    assert rankings[0].indices[0, 0] == 4
    np.testing.assert_array_equal(rankings[0].indices, rankings[1].indices)
    np.testing.assert_array_equal(rankings[0].scores.per_scale, rankings[1].scores.per_scale)
    np.testing.assert_array_equal(rankings[0].scores.fused, rankings[1].scores.fused)


@pytest.mark.parametrize(("processor_share", "threads", "told"), [(0.5, 2, 1), (0.95, 2, 0), (0.5, 1, 0)])
def test_busy_neighbours_are_told_once(
    processor_share: float, threads: int, told: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(workers.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(workers.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(workers.time, "thread_time", lambda: processor_share * clock[0])
    company = workers.Company()
    with caplog.at_level("INFO"):
        for _ in range(40):
            with company.watched():
                clock[0] += 1
    assert caplog.text.count("OMP_NUM_THREADS=1") == told


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
@pytest.mark.parametrize(("kept", "fewer"), [(workers.PICTURE_MEMORY, True), (workers.PAIR_MEMORY, False)])
def test_freed_memory_of_kept_sizes_is_not_handed_out_page_by_page_again(kept: tuple[int, int], fewer: bool) -> None:
    code = f"""
import resource
import torch
from patchnetvlad.workers import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory{kept}
for _ in range(8):  # until room that is freed suits the next array, which needs some for its alignment
    torch.ones(12 << 20)  # 48 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(12 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    pages = 4 * (48 << 20) // mmap.PAGESIZE
    assert faults < pages / 8 if fewer else faults > 16  # huge pages need fewer than one fault each
