"""Codes of the feature map: patches made of them are those of the map that the codes stand for."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad import patch_rounding
from patchnetvlad.config_values import code_form
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.patch_netvlad import patch_descriptors
from patchnetvlad.patch_rounding import integer_products
from patchnetvlad.store.arrays.codecs import LearnedCodec, codec_of, read_patch_codec, write_patch_codec
from patchnetvlad.store.arrays.map_codes import MapCodec, PatchHead, map_grid, train_map_codec
from patchnetvlad.whitening import WPCA

CHANNELS = 12


def layers(dims: int, vladv2: bool = False) -> tuple[NetVLAD, WPCA | None]:
    """Clusters and a projection to so many dimensions, 0 for none."""
    torch.manual_seed(3)
    pool = NetVLAD(4, CHANNELS, vladv2)
    with torch.no_grad():
        pool.conv.weight.mul_(20)
    return pool, WPCA(4 * CHANNELS, dims) if dims else None


def random_map(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """H×W×C unit local descriptors."""
    return F.normalize(torch.randn(height, width, CHANNELS, generator=torch.Generator().manual_seed(seed)), dim=2)


def described(local: torch.Tensor, grids: list[PatchGrid], pool: NetVLAD, wpca: WPCA | None) -> list[torch.Tensor]:
    """Patches as a model makes them, in float32."""
    with torch.no_grad():
        unit, assignment = pool.assign(local.permute(2, 0, 1)[None])
        sizes, strides = [grid.patch_size for grid in grids], [grid.stride for grid in grids]
        rows = patch_descriptors(unit, assignment, pool.centroids, sizes, strides)
        return [of_size[0] if wpca is None else wpca(of_size)[0] for of_size in rows]


def codec_for(num_bytes: int, dims: int = 20, count: int = 2000) -> MapCodec:
    sample = random_map(1, count, 9)[0]
    return train_map_codec(sample, num_bytes, PatchHead.of(*layers(dims)))


@settings(deadline=None, max_examples=25)
@given(st.integers(3, 9), st.integers(3, 9), st.sampled_from([0, 20]), st.booleans(), st.integers(1, 2))
def test_the_head_makes_the_patches_of_the_model(height, width, dims, vladv2, stride):
    pool, wpca = layers(dims, vladv2)
    grids = [PatchGrid(height, width, 3, stride), PatchGrid(height, width, 2, 1)]
    local = random_map(height, width)
    made = PatchHead.of(pool, wpca).descriptors(local, grids)
    for rows, expected, grid in zip(made, described(local, grids, pool, wpca), grids, strict=True):
        assert rows.shape == (len(grid), dims or 4 * CHANNELS) and rows.dtype == torch.float32
        torch.testing.assert_close(torch.linalg.vector_norm(rows, dim=1), torch.ones(len(grid)))
        assert float((rows * expected).sum(dim=1).min()) > (0.999 if dims else 1 - 1e-6)


def test_integers_are_multiplied_exactly_on_every_processor(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-127, 128, (40, 3000), dtype=torch.int8, generator=generator)
    right = torch.randint(-127, 128, (9, 3000), dtype=torch.int8, generator=generator)
    left[0], right[0] = 127, -127  # sums beyond what float32 counts singly
    expected = (left.long() @ right.long().T).float()
    assert torch.equal(integer_products(left, right), expected)
    monkeypatch.setattr(patch_rounding, "products_are_exact", lambda: False)
    assert torch.equal(integer_products(left, right), expected)


def test_a_picture_is_as_its_decoded_map():
    codec, local = codec_for(6), random_map(7, 8)
    grids = [PatchGrid(7, 8, 3), PatchGrid(7, 8, 9)]
    codes = codec.encode_picture([], grids, local)
    assert [(array.shape, array.dtype) for array in codes] == [((56, 6), np.uint8)]
    decoded = codec.decode(codes[0])
    torch.testing.assert_close(torch.linalg.vector_norm(decoded, dim=1), torch.ones(56))
    rows = codec.decode_picture(codes, map_grid(grids), grids)
    expected = codec.head.descriptors(decoded.reshape(7, 8, CHANNELS), grids)
    assert all(map(torch.equal, rows, expected)) and [len(of_size) for of_size in rows] == [30, 0]


def test_up_to_256_positions_are_kept_exactly():
    local = random_map(15, 16)
    codec = train_map_codec(local.flatten(0, 1), 5, PatchHead.of(*layers(0)))
    torch.testing.assert_close(codec.decode(codec.encode(local)), local.flatten(0, 1), atol=1e-5, rtol=0)


def test_more_bytes_are_more_exact_and_windows_more_so_than_positions():
    local, grids = random_map(12, 12, 1), [PatchGrid(12, 12, 4)]
    expected = PatchHead.of(*layers(20)).descriptors(local, grids)[0]
    alike, of_positions = [], []
    for num_bytes in (2, 4, 8, 12):
        codec = codec_for(num_bytes)
        (rows,) = codec.decode_picture(codec.encode_picture([], grids, local), map_grid(grids), grids)
        alike.append(float((rows * expected).sum(dim=1).mean()))
        of_positions.append(float((codec.decode(codec.encode(local)) * local.flatten(0, 1)).sum(dim=1).mean()))
    assert alike == sorted(alike) and alike[-1] > 0.995
    assert alike[1] > of_positions[1]  # errors of single positions are averaged


def test_pictures_without_patches_or_maps():
    codec = codec_for(3)
    empty = [PatchGrid(2, 2, 5)]
    assert map_grid(empty) == () and codec.encode_picture([], empty, random_map(2, 2)) == []
    assert [rows.shape for rows in codec.decode_picture([], (), empty)] == [(0, 20)]
    with pytest.raises(ValueError, match="without its map"):
        codec.encode_picture([], [PatchGrid(5, 5, 2)], None)


def test_training_repeats_itself_and_the_hash_tells_codecs_apart():
    first, again = codec_for(4), codec_for(4)
    np.testing.assert_array_equal(first.codes.centroids, again.codes.centroids)
    assert first.sha256 == again.sha256
    others = codec_for(5), codec_for(4, dims=16), codec_for(4, dims=0), codec_for(4, count=1999)
    assert len({codec.sha256 for codec in (first, *others)}) == 5


@pytest.mark.parametrize("dims", [0, 20])
def test_a_codec_is_kept_in_its_folder(dims: int, tmp_path: Path):
    codec = codec_for(4, dims)
    write_patch_codec(tmp_path, codec)
    found = read_patch_codec(tmp_path)
    assert isinstance(found, MapCodec) and found.sha256 == codec.sha256 and found.dtype == "map4"
    grids = [PatchGrid(6, 6, 2)]
    codes = codec.encode_picture([], grids, random_map(6, 6))
    pictures = [one.decode_picture(codes, map_grid(grids), grids)[0] for one in (codec, found)]
    assert torch.equal(*pictures)


def test_what_cannot_be():
    with pytest.raises(ValueError, match=f"expected 1 to {CHANNELS}"):
        codec_for(CHANNELS + 1)
    with pytest.raises(ValueError, match="learn from"):
        train_map_codec(torch.empty(0, CHANNELS), 4, PatchHead.of(*layers(0)))
    for dtype in ("map5", "pq4"):
        with pytest.raises(ValueError, match="with their codec"):
            codec_of(dtype, codec_for(4))
    untrained = codec_of("map4")
    assert isinstance(untrained, LearnedCodec)
    with pytest.raises(ValueError, match="not trained"):
        untrained.encode_picture([], [], None)


def test_names_of_storage_types():
    assert [code_form(name) for name in ("pq1", "map32", "pq160")] == [("pq", 1), ("map", 32), ("pq", 160)]
    wrong = ("pq", "pq0", "pq08", "pq-1", "pq8x", "int8", "PQ8", "map", "map0", "mapq8")
    assert [code_form(name) for name in wrong] == [None] * len(wrong)
