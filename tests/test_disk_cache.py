"""Described pictures on disk: found again, bounded, and never those of another picture or model."""

import os
from pathlib import Path

import numpy as np
import pytest

from patchnetvlad.store.cache.disk_cache import DiskCache


def picture(folder: Path, number: int) -> Path:
    path = folder / f"{number}.jpg"
    path.write_bytes(bytes([number]))
    return path


def arrays(number: int) -> tuple[np.ndarray, ...]:
    """800 bytes, besides what the file needs."""
    return np.full((10, 8), number, np.float32), np.full((15, 8), -number, np.float32)


def held(cache: DiskCache, folder: Path, count: int) -> list[int]:
    return [number for number in range(count) if cache.get(folder / f"{number}.jpg") is not None]


def test_what_was_put_is_found_by_a_later_run(tmp_path):
    DiskCache(tmp_path / "kept", 10_000, "model").put(picture(tmp_path, 3), (5, 7), arrays(3))
    found = DiskCache(tmp_path / "kept", 10_000, "model").get(tmp_path / "3.jpg")
    assert found is not None and found[0] == (5, 7)
    for mine, given in zip(found[1], arrays(3), strict=True):
        np.testing.assert_array_equal(mine, given)
        assert mine.dtype == np.float32


def test_another_model_and_a_replaced_picture_find_nothing(tmp_path):
    path = picture(tmp_path, 3)
    cache = DiskCache(tmp_path / "kept", 10_000, "model")
    cache.put(path, (5, 7), arrays(3))
    assert DiskCache(tmp_path / "kept", 10_000, "another").get(path) is None
    os.utime(path, ns=(1, 1))
    assert cache.get(path) is None


def test_the_oldest_make_room(tmp_path):
    cache = DiskCache(tmp_path / "kept", 10_000, "model")
    cache.put(picture(tmp_path, 0), (5, 7), arrays(0))
    size = sum(path.stat().st_size for path in (tmp_path / "kept").iterdir())
    small = DiskCache(tmp_path / "kept", 3 * size, "model")
    for number in (1, 2):
        small.put(picture(tmp_path, number), (5, 7), arrays(number))
    assert small.get(tmp_path / "0.jpg") is not None  # used just now
    small.put(picture(tmp_path, 3), (5, 7), arrays(3))
    assert held(small, tmp_path, 4) == [0, 2, 3]
    for number in (0, 2, 3):  # clocks may be coarse
        os.utime(small._folder / small._name(tmp_path / f"{number}.jpg"), ns=(number, number))
    assert held(DiskCache(tmp_path / "kept", size, "model"), tmp_path, 4) == [3]
    DiskCache(tmp_path / "kept", 10, "model").put(picture(tmp_path, 4), (5, 7), arrays(4))
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_what_is_damaged_counts_as_missing(tmp_path, content):
    cache = DiskCache(tmp_path / "kept", 10_000, "model")
    cache.put(picture(tmp_path, 3), (5, 7), arrays(3))
    (path,) = (tmp_path / "kept").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(arrays(3)[0].tobytes(), arrays(4)[0].tobytes()) if content is None else content)
    assert cache.get(tmp_path / "3.jpg") is None
    cache.put(tmp_path / "3.jpg", (5, 7), arrays(3))
    assert cache.get(tmp_path / "3.jpg") is not None
