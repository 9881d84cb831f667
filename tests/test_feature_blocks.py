"""Blocks of a packed folder: what is written is read, pictures of any size, and damage is told."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy_format

from patchnetvlad.errors import UserError
from patchnetvlad.store.arrays import blocks
from patchnetvlad.store.arrays.array_files import array_header
from patchnetvlad.store.arrays.blocks import Block, BlockLayout, BlockReader, BlockWriter, block_name, scales_name

SIZES = (2, 3)


def counts(map_size: tuple[int, int]) -> tuple[int, ...]:
    return tuple(max(0, map_size[0] - size + 1) * max(0, map_size[1] - size + 1) for size in SIZES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "PICTURES_IN_BLOCK", 4)


def make(folder: Path, layout: BlockLayout, maps: list[tuple[int, int]], seed: int = 0):
    """Write a folder; returns blocks, and each picture's arrays and scales."""
    rng = np.random.default_rng(seed)
    blocks, pictures = [], []
    for number in range(layout.num_blocks):
        with BlockWriter(folder, layout, number) as writer:
            for index in layout.pictures(number):
                assert writer.next_picture == index and not writer.complete
                arrays = [
                    rng.integers(0, 100, (count, layout.width)).astype(layout.dtype) for count in counts(maps[index])
                ]
                scales = rng.random(layout.num_scales).astype(np.float32)
                writer.add(maps[index], arrays, scales)
                pictures.append((arrays, scales))
            blocks.append(writer.finish())
    return blocks, pictures


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    maps=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=14),
    width=st.integers(1, 9),
    dtype=st.sampled_from(["u1", "i1", "f2", "f4"]),
    num_scales=st.sampled_from([0, 3]),
)
def test_pictures_are_read_as_written(tmp_path_factory, maps, width, dtype, num_scales):
    folder = tmp_path_factory.mktemp("packed")
    layout = BlockLayout(len(maps), width, np.dtype(dtype), counts, num_scales)
    blocks, pictures = make(folder, layout, maps)
    reader = BlockReader(folder, layout, blocks)
    for index in np.random.default_rng(1).permutation(len(maps)).tolist():
        arrays, scales = pictures[index]
        assert reader.map_size(index) == maps[index]
        assert reader.num_bytes(index) == sum(array.nbytes for array in arrays)
        for found, written in zip(reader.read(index), arrays, strict=True):
            assert found.dtype == written.dtype
            np.testing.assert_array_equal(found, written)
        if num_scales:
            np.testing.assert_array_equal(reader.scales(index), scales)
        else:
            assert reader.scales(index) is None
    for number in range(layout.num_blocks):  # any reader of .npy can open a block
        rows = np.load(folder / block_name(number), mmap_mode="r")
        assert rows.shape == (sum(sum(counts(maps[index])) for index in layout.pictures(number)), width)


def test_runs_of_equal_maps():
    block = Block.of(3, [(30, 40), (30, 40), (20, 40), (30, 40)])
    assert block.maps == ((30, 40, 2), (20, 40, 1), (30, 40, 1))
    assert block.num_pictures == 4


def test_a_block_that_was_not_finished_leaves_nothing(tmp_path):
    layout = BlockLayout(4, 2, np.dtype(np.uint8), counts)
    with pytest.raises(ValueError, match="lacks picture 1"), BlockWriter(tmp_path, layout, 0) as writer:
        writer.add((3, 3), [np.zeros((count, 2), np.uint8) for count in counts((3, 3))])
        writer.finish()
    assert not list(tmp_path.iterdir())


def test_wrong_rows_are_not_written(tmp_path):
    layout = BlockLayout(4, 2, np.dtype(np.uint8), counts)
    with BlockWriter(tmp_path, layout, 0) as writer:
        for wrong in (np.zeros((4, 3), np.uint8), np.zeros((4, 2), np.int8), np.zeros(8, np.uint8)):
            with pytest.raises(ValueError, match="expected"):
                writer.add((3, 3), [wrong])


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", [block_name(1), scales_name(1)])
@pytest.mark.parametrize("damage", [shorten, Path.unlink])
def test_a_block_cut_short_is_told_when_the_folder_is_opened(tmp_path, name, damage):
    layout = BlockLayout(7, 5, np.dtype(np.int8), counts, 2)
    blocks, _ = make(tmp_path, layout, [(4, 5)] * 7)
    damage(tmp_path / name)
    with pytest.raises(UserError, match=name) as caught:
        BlockReader(tmp_path, layout, blocks)
    assert "\n" not in str(caught.value)


def test_a_block_cut_short_while_it_is_read(tmp_path):
    layout = BlockLayout(3, 5, np.dtype(np.uint8), counts)
    blocks, _ = make(tmp_path, layout, [(4, 5)] * 3)
    reader = BlockReader(tmp_path, layout, blocks)
    shorten(tmp_path / block_name(0))
    with pytest.raises(UserError, match="became shorter"):
        reader.read(2)
    (tmp_path / block_name(0)).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        reader.read(0)


def test_missing_blocks_are_told(tmp_path):
    layout = BlockLayout(7, 5, np.dtype(np.uint8), counts)
    blocks, _ = make(tmp_path, layout, [(4, 5)] * 7)
    with pytest.raises(UserError, match="not finished, block 2 of 2 is not there"):
        BlockReader(tmp_path, layout, blocks[:1])


def test_reading_takes_one_read_of_the_file(tmp_path, monkeypatch):
    layout = BlockLayout(3, 5, np.dtype(np.uint8), counts)
    blocks, _ = make(tmp_path, layout, [(4, 5)] * 3)
    reader = BlockReader(tmp_path, layout, blocks)
    reads = []
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *args, **options: reads.append(args[2]) or fromfile(*args, **options))
    reader.read(1)
    assert reads == [sum(counts((4, 5))) * 5]


@settings(deadline=None)
@given(st.integers(0, 10**15), st.integers(1, 10**6), st.sampled_from(["u1", "i1", "f2", "f4"]))
def test_a_header_is_as_long_for_any_number_of_rows(rows, width, dtype):
    """A block's rows begin where its header ends, which is written when they are counted."""
    header = array_header((rows, width), np.dtype(dtype))
    assert len(header) == blocks.HEADER_BYTES
    assert npy_format.read_magic(BytesIO(header)) == (1, 0)
