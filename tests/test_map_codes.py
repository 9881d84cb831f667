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
from patchnetvlad.store.arrays.map_codes import (
    MapCodec,
    _planned,
    cosines,
    from_cosines,
    map_grid,
    train_map_codec,
)
from patchnetvlad.store.arrays.patch_head import PatchHead
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


def smooth_map(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """The same with neighbours that are alike, as those of an encoder are."""
    rows = F.avg_pool2d(random_map(height + 2, width + 2, seed).permute(2, 0, 1)[None], 3, 1)[0]
    return F.normalize(rows.permute(1, 2, 0), dim=2).contiguous()


def codec_for(num_bytes: int, dims: int = 20, count: int = 12) -> MapCodec:
    maps = [smooth_map(9, 10, 100 + number) for number in range(count)]
    return train_map_codec(maps, num_bytes, PatchHead.of(*layers(dims)))


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


@settings(deadline=None, max_examples=15)
@given(st.integers(3, 12), st.integers(3, 12), st.sampled_from([1, 6, 12]))
def test_a_picture_is_as_its_decoded_map(height, width, num_bytes):
    """Of whatever size, which need not be that of the maps that the codec has learned from."""
    codec, local = CODECS[num_bytes], smooth_map(height, width)
    grids = [PatchGrid(height, width, 3), PatchGrid(height, width, 13)]
    codes = codec.encode_picture([], grids, local)
    assert [(array.shape, array.dtype) for array in codes] == [((height * width, num_bytes), np.uint8)]
    decoded = codec.decode(codes[0], height, width)
    torch.testing.assert_close(torch.linalg.vector_norm(decoded, dim=2), torch.ones(height, width))
    rows = codec.decode_picture(codes, map_grid(grids), grids)
    expected = codec.head.descriptors(decoded, grids)
    assert all(map(torch.equal, rows, expected)) and [len(of_size) for of_size in rows] == [len(grids[0]), 0]


CODECS = {num_bytes: codec_for(num_bytes) for num_bytes in (1, 6, 12)}


@given(st.integers(1, 12), st.integers(1, 12))
def test_cosines_are_orthonormal_and_come_back(height, width):
    local = random_map(height, width)
    turned = cosines(local)
    torch.testing.assert_close(turned.square().sum(), local.square().sum())
    torch.testing.assert_close(from_cosines(turned), local, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[0, 0], local.sum(dim=(0, 1)) / (height * width) ** 0.5, atol=1e-5, rtol=0)


def test_bytes_go_where_they_save_most():
    spectrum = np.array([[8.0, 1.0], [2.0, 0.5]])
    gains = np.array([[0.5, 0.4], [0.1, 0.05]], dtype=np.float32)  # of two stages in two groups
    groups = np.array([[0, 2], [1, -1]])
    plan = _planned(spectrum, gains, groups, 6)
    # 4 and 3.2 of the first cosine, 1 and 0.8 of the third, then 0.8 of the first once more, then 0.5 of the second
    assert [stage.places.tolist() for stage in plan.stages] == [[0, 1, 2], [0]]
    assert plan.stages[0].coded.tolist() == [[True, True], [True, False], [True, True]]
    assert plan.stages[1].coded.tolist() == [[True, False]]
    assert plan.stages[1].mask.tolist() == [[1, 0, 1]]


def test_more_bytes_are_more_exact_and_smooth_maps_need_fewer():
    grids = [PatchGrid(12, 12, 4)]
    alike = []
    for local in (smooth_map(12, 12, 1), random_map(12, 12, 1)):
        expected = PatchHead.of(*layers(20)).descriptors(local, grids)[0]
        for codec in CODECS.values():
            (rows,) = codec.decode_picture(codec.encode_picture([], grids, local), map_grid(grids), grids)
            alike.append(float((rows * expected).sum(dim=1).mean()))
    smooth, rough = alike[:3], alike[3:]
    assert smooth == sorted(smooth) and smooth[-1] > 0.97
    assert 1 - smooth[1] < 0.5 * (1 - rough[1])


def test_pictures_without_patches_or_maps():
    codec = codec_for(3)
    empty = [PatchGrid(2, 2, 5)]
    assert map_grid(empty) == () and codec.encode_picture([], empty, random_map(2, 2)) == []
    assert [rows.shape for rows in codec.decode_picture([], (), empty)] == [(0, 20)]
    with pytest.raises(ValueError, match="without its map"):
        codec.encode_picture([], [PatchGrid(5, 5, 2)], None)


def test_training_repeats_itself_and_the_hash_tells_codecs_apart():
    first, again = codec_for(4), codec_for(4)
    np.testing.assert_array_equal(first.centroids, again.centroids)
    assert first.sha256 == again.sha256
    others = codec_for(5), codec_for(4, dims=16), codec_for(4, dims=0), codec_for(4, count=11)
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
        train_map_codec([], 4, PatchHead.of(*layers(0)))
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
