"""Feature folders: what is written is read back, a killed run resumes, wrong combinations are refused in one line."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import patchnetvlad.files as files
import patchnetvlad.store.arrays.blocks as feature_blocks
import patchnetvlad.store.writing.feature_writer as feature_writer
import patchnetvlad.store.writing.layouts as feature_layouts
import patchnetvlad.store.writing.picture_writer as picture_writer
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.extraction import check_disk, estimate_bytes
from patchnetvlad.image_lists import ImageList, unique_feature_names
from patchnetvlad.patch_codes import coded_grids, rows_to_code, train_codec
from patchnetvlad.patch_grid import EncoderGeometry
from patchnetvlad.patch_rounding import round_patches
from patchnetvlad.store.arrays.codecs import CODECS
from patchnetvlad.store.cache.memory_cache import PictureCache
from patchnetvlad.store.manifest import StoreHeader, first_line, in_list_order
from patchnetvlad.store.reading.feature_store import FeatureStore
from patchnetvlad.store.writing.feature_writer import FeatureWriter

MAP_SIZE = (5, 7)
NAMES = ("night/a.jpg", "day/a.jpg", "day/b.jpg")


def make_list(names: Sequence[str] = NAMES, feature_names: Sequence[str] | None = None) -> ImageList:
    own = unique_feature_names(names) if feature_names is None else tuple(feature_names)
    return ImageList(tuple(names), tuple(map(Path, names)), own, Path("lists/pictures.txt"))


LIST = make_list()


def make_header(**changes: object) -> StoreHeader:
    header = StoreHeader(
        checkpoint_sha256="ab" * 32,
        settings={"backbone": "vgg16", "imageresizeh": 80, "imageresizew": 112},
        num_dims=6,
        patch_sizes=(2, 3),
        strides=(1, 2),
        geometry=EncoderGeometry(),
    )
    return replace(header, **changes)  # type: ignore[arg-type]


def make_features(header: StoreHeader, index: int, map_size=MAP_SIZE) -> tuple[torch.Tensor, PatchFeatures]:
    generator = torch.Generator().manual_seed(index)
    grids = header.grids(map_size)

    def unit_rows(rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, header.num_dims, generator=generator), dim=1)

    return unit_rows(1)[0], PatchFeatures(tuple(unit_rows(len(grid)) for grid in grids), grids)


def write_all(folder: Path, header: StoreHeader, pictures: ImageList = LIST, map_sizes=None) -> list[int]:
    """Write what is missing and tell what that was."""
    with FeatureWriter(folder, pictures, header) as writer:
        missing = writer.missing
        for index in missing:
            writer.write(index, *make_features(header, index, map_sizes[index] if map_sizes else MAP_SIZE))
        writer.finish()
    return missing


def open_store(folder: Path, header: StoreHeader, pictures: ImageList = LIST, **options) -> FeatureStore:
    return FeatureStore.open(folder, pictures, header, **options)


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- round trips -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_round_trip(tmp_path, dtype):
    header = make_header(dtype=dtype)
    assert write_all(tmp_path, header) == [0, 1, 2]
    with open_store(tmp_path, header) as store:
        assert len(store) == 3
        for index in range(3):
            global_, patches = make_features(header, index)
            assert store.global_.dtype == np.float32
            np.testing.assert_array_equal(store.global_[index], global_)
            read = store.patches(index)
            assert read.grids == patches.grids
            for stored, given_ in zip(read.descriptors, patches.descriptors, strict=True):
                assert stored.dtype == torch.float32 and stored.is_contiguous()
                bound = {"float32": 0.0, "float16": 2**-11, "int8": float(given_.abs().max()) / 126}
                assert float((stored - given_).abs().max()) <= bound[dtype]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_features_of_an_accelerator(tmp_path, dtype):
    header = make_header(dtype=dtype)
    with FeatureWriter(tmp_path / "gpu", LIST, header) as writer:
        for index in writer.missing:
            global_, patches = make_features(header, index)
            descriptors = tuple(tensor.cuda() for tensor in patches.descriptors)
            writer.write(index, global_.cuda(), PatchFeatures(descriptors, patches.grids))
        writer.finish()
    write_all(tmp_path / "cpu", header)
    step = 0.01 if dtype == "int8" else 0.0  # a value between two integers may go either way
    with open_store(tmp_path / "gpu", header) as gpu, open_store(tmp_path / "cpu", header) as cpu:
        np.testing.assert_array_equal(gpu.global_, cpu.global_)
        for a, b in zip(gpu.patches(1).descriptors, cpu.patches(1).descriptors, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=step)


def test_files_are_those_of_the_published_code(tmp_path):
    header = make_header()
    write_all(tmp_path, header)
    patches = {f"patchfeats_psize{size}_{name}.npy" for size in (2, 3) for name in ("night_a.jpg", "day_a.jpg", "b")}
    assert files_of(tmp_path) == {"globalfeats.npy", "manifest.jsonl", *patches}
    _, features = make_features(header, 2)
    on_disk = np.load(tmp_path / "patchfeats_psize3_b.npy", allow_pickle=False)
    assert on_disk.shape == (6, 6) and on_disk.dtype == np.float32  # D × P, P = 2 rows of 3
    np.testing.assert_array_equal(on_disk, features.descriptors[1].numpy().T)
    assert np.load(tmp_path / "globalfeats.npy").shape == (3, 6)


def test_int8_scales_are_in_the_manifest(tmp_path):
    header = make_header(dtype="int8")
    write_all(tmp_path, header)
    line = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[3])
    assert line["name"] == "day/b.jpg" and line["map"] == [5, 7]
    _, features = make_features(header, 2)
    integers = np.load(tmp_path / "patchfeats_psize2_b.npy").astype(float)
    scales = np.array(line["scales"][0])[:, None]  # six dimensions: each is a band
    numbers = integers * np.abs(integers) * scales
    assert (np.abs(numbers - features.descriptors[0].numpy().T) <= 127.5 * scales).all()


def test_manifest_says_what_made_it(tmp_path):
    header = make_header()
    write_all(tmp_path, header)
    first = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[0])
    assert first["checkpoint_sha256"] == "ab" * 32 and first["list"] == "pictures.txt"
    assert first["settings"] == dict(header.settings)
    assert {"version", "software", "created", "names_sha256", "dtype", "strides", "geometry"} <= first.keys()


@given(
    st.lists(st.floats(-2, 2, width=32), min_size=0, max_size=40).map(
        lambda values: torch.tensor(values, dtype=torch.float32).reshape(-1, 1)
    )
)
def test_int8_error_is_at_most_half_a_step_of_roots(descriptors):
    stored = CODECS["int8"].encode(descriptors)
    maxabs = float(descriptors.abs().max()) if len(descriptors) else 0.0
    assert stored.array.dtype == np.int8 and stored.array.shape == tuple(descriptors.shape)
    assert stored.scales is not None and stored.scales[0] == pytest.approx(maxabs / 127**2, rel=1e-6, abs=1e-30)
    error = (CODECS["int8"].decode(stored) - descriptors).abs()
    # The root r, 0 to 127, is off by up to 1/2, its square by r + 1/4
    most = ((descriptors.abs() / max(maxabs, 1e-30)).sqrt() * 127 + 0.25) * stored.scales[0]
    assert (error <= most * 1.001 + 1e-30).all()


def test_int8_bands_have_steps_of_their_own():
    spread = torch.logspace(0, -5, 40)  # 14 bands of up to 3 dimensions
    descriptors = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * spread
    descriptors[:, 36:] = 0
    stored = CODECS["int8"].encode(descriptors)
    assert (
        stored.scales is not None
        and len(stored.scales) == CODECS["int8"].num_scales(40) == 14
        and stored.scales[-1] == 0
    )
    error = (CODECS["int8"].decode(stored) - descriptors).abs()
    assert (error <= 4 * spread / 127).all() and (error[:, 36:] == 0).all()


def test_float32_is_not_copied():
    descriptors = torch.randn(4, 3)
    stored = CODECS["float32"].encode(descriptors)
    assert stored.array.ctypes.data == descriptors.data_ptr() == CODECS["float32"].decode(stored).data_ptr()


def test_pictures_of_their_own_size_keep_their_maps(tmp_path):
    header = make_header()
    sizes = [(5, 7), (3, 9), (1, 4)]  # the last has no patch at all
    write_all(tmp_path, header, map_sizes=sizes)
    with open_store(tmp_path, header) as store:
        for index, size in enumerate(sizes):
            read, patches = store.patches(index), make_features(header, index, size)[1]
            assert read.grids == patches.grids == header.grids(size)
            assert all(torch.equal(a, b) for a, b in zip(read.descriptors, patches.descriptors, strict=True))
        assert [tuple(d.shape) for d in store.patches(2).descriptors] == [(0, 6), (0, 6)]


@pytest.mark.parametrize("num_dims,map_size", [(1, (5, 7)), (6, (3, 3)), (1, (3, 3))])
def test_one_patch_or_one_dimension(tmp_path, num_dims, map_size):
    header = make_header(num_dims=num_dims)
    write_all(tmp_path, header, map_sizes=[map_size] * 3)
    with open_store(tmp_path, header) as store:
        expected = make_features(header, 1, map_size)[1].descriptors
        assert all(torch.equal(a, b) for a, b in zip(store.patches(1).descriptors, expected, strict=True))


def test_global_only_store(tmp_path):
    header = make_header(patch_sizes=(), strides=())
    with FeatureWriter(tmp_path, LIST, header) as writer:
        for index in writer.missing:
            writer.write(index, make_features(header, index)[0])
        writer.finish()
    assert files_of(tmp_path) == {"globalfeats.npy", "manifest.jsonl"}
    assert write_all(tmp_path, header) == []
    with open_store(tmp_path, header) as store:
        assert store.patches(0) == PatchFeatures((), ())
        np.testing.assert_array_equal(store.global_[1], make_features(header, 1)[0])


def test_selected_patch_sizes(tmp_path):
    header = make_header(dtype="int8")
    write_all(tmp_path, header)
    wanted = replace(header, patch_sizes=(3,), strides=(2,), dtype="float32")
    with (
        open_store(tmp_path, header) as whole,
        FeatureStore.open(tmp_path, LIST, wanted) as part,
    ):
        assert part.patch_sizes == (3,)
        assert torch.equal(part.patches(0).descriptors[0], whole.patches(0).descriptors[1])
        assert part.patches(0).grids == whole.patches(0).grids[1:]


PICTURE_NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r\n", exclude_categories=("Zl", "Zp", "Cc")),
    min_size=1,
    max_size=60,
).filter(lambda name: name.strip() == name)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PICTURE_NAMES, min_size=1, max_size=6))
def test_any_names_are_kept_apart(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    header, pictures = make_header(patch_sizes=(5,), strides=(1,)), make_list(names)
    features = {name: make_features(header, index) for index, name in enumerate(names)}
    with FeatureWriter(folder, pictures, header) as writer:
        for index in writer.missing:
            writer.write(index, *features[names[index]])
        writer.finish()
    with open_store(folder, header, pictures) as store:
        for index, name in enumerate(names):
            np.testing.assert_array_equal(store.global_[index], features[name][0])
            assert torch.equal(store.patches(index).descriptors[0], features[name][1].descriptors[0])


# --- resuming --------------------------------------------------------------------------------------------------


def test_finished_pictures_are_skipped(tmp_path):
    header = make_header()
    with FeatureWriter(tmp_path, LIST, header) as writer:
        writer.write(1, *make_features(header, 1))
    assert "globalfeats.npy" not in files_of(tmp_path) and "globalfeats.npy.partial" in files_of(tmp_path)
    with pytest.raises(UserError, match="not finished, 1 of 3"):
        open_store(tmp_path, header)
    before = (tmp_path / "patchfeats_psize2_day_a.jpg.npy").stat().st_mtime_ns
    assert write_all(tmp_path, header) == [0, 2]
    assert (tmp_path / "patchfeats_psize2_day_a.jpg.npy").stat().st_mtime_ns == before
    assert write_all(tmp_path, header) == []
    np.testing.assert_array_equal(open_store(tmp_path, header).global_[1], make_features(header, 1)[0])


def test_an_exception_keeps_what_was_handed_over(tmp_path):
    header = make_header()
    with pytest.raises(KeyError), FeatureWriter(tmp_path, LIST, header) as writer:
        writer.write(0, *make_features(header, 0))
        raise KeyError("computation failed")
    assert write_all(tmp_path, header) == [1, 2]


KILLED_RUN = """
import time
from pathlib import Path
from test_feature_store import make_features, make_header, make_list
from patchnetvlad.store.writing.feature_writer import FeatureWriter

header, pictures = make_header(), make_list([f"{i}.jpg" for i in range(200)])
with FeatureWriter(Path(FOLDER), pictures, header) as writer:
    for index in writer.missing:
        writer.write(index, *make_features(header, index))
        time.sleep(0.005)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_resumes(tmp_path):
    header, pictures = make_header(), make_list([f"{i}.jpg" for i in range(200)])
    program = textwrap.dedent(KILLED_RUN).replace("FOLDER", repr(str(tmp_path)))
    run = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent, env=_environment())
    manifest = tmp_path / "manifest.jsonl"
    deadline = time.monotonic() + 60
    while not manifest.exists() or manifest.read_bytes().count(b"\n") < 20:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(UserError, match="another process"):
        FeatureWriter(tmp_path, pictures, header)
    run.send_signal(signal.SIGKILL)
    run.wait()
    missing = write_all(tmp_path, header, pictures)
    assert 0 < len(missing) <= 181
    assert not {name for name in files_of(tmp_path) if name.startswith(".") or name.endswith(".partial")}
    with open_store(tmp_path, header, pictures) as store:
        for index in range(200):
            global_, patches = make_features(header, index)
            np.testing.assert_array_equal(store.global_[index], global_)
            assert torch.equal(store.patches(index).descriptors[1], patches.descriptors[1])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(7)), stops=st.lists(st.integers(0, 7), max_size=2), lost=st.sampled_from(range(7)))
def test_stopped_runs_leave_the_manifest_in_list_order(tmp_path_factory, order, stops, lost):
    """Whatever comes when, and when a finished picture's file was lost: a line for each picture, in order, once."""
    folder = tmp_path_factory.mktemp("features")
    header, pictures = make_header(), make_list([f"{index}.jpg" for index in range(7)])
    for stop in sorted(stops):
        with FeatureWriter(folder, pictures, header) as writer:
            for index in [index for index in order[:stop] if index in writer.missing]:
                writer.write(index, *make_features(header, index))
        (folder / f"patchfeats_psize2_{lost}.npy").unlink(missing_ok=True)
    with FeatureWriter(folder, pictures, header) as writer:
        for index in [index for index in order if index in writer.missing]:
            writer.write(index, *make_features(header, index))
        writer.finish()
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines[1:]] == list(range(7))
    assert first_line(folder).decode() == lines[0] + "\n"


def test_a_manifest_in_order_is_not_read_again(tmp_path, monkeypatch):
    """Neither after a run that was stopped and continued; only lines that came out of order are brought into it."""
    header, pictures = make_header(), make_list([f"{index}.jpg" for index in range(4)])
    sorted_ = []
    monkeypatch.setattr(feature_writer, "in_list_order", lambda content: sorted_.append(1) or in_list_order(content))

    def run(folder: Path, *parts: Sequence[int]) -> None:
        for number, part in enumerate(parts, start=1):
            with FeatureWriter(folder, pictures, header) as writer:
                for index in part:
                    writer.write(index, *make_features(header, index))
                if number == len(parts):
                    writer.finish()

    run(tmp_path / "stopped", (0, 1), (), (2, 3))
    run(tmp_path / "whole", (0, 1, 2, 3))
    assert not sorted_
    run(tmp_path / "shared", (1, 0), (2, 3))
    assert sorted_ == [1]


def _environment() -> dict[str, str]:
    places = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in places if place)}


def test_a_torn_last_line_is_ignored(tmp_path):
    header = make_header()
    write_all(tmp_path, header)
    manifest = tmp_path / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    for torn in (lines[-1][:-10], lines[-1][:-1], b'{"index": 2}\n', b"\0" * 30):
        manifest.write_bytes(b"".join(lines[:-1]) + torn)
        with pytest.raises(UserError, match="2 of 3"):
            open_store(tmp_path, header)
        assert write_all(tmp_path, header) == [2]
        assert manifest.read_bytes() == b"".join(lines)


def test_a_damaged_line_further_up_is_refused(tmp_path):
    header = make_header()
    write_all(tmp_path, header)
    manifest = tmp_path / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join([lines[0], b"oops\n", *lines[2:]]))
    with pytest.raises(UserError, match="line 2") as caught:
        open_store(tmp_path, header)
    one_line(caught)


@pytest.mark.parametrize(
    "first", [b"", b"{}\n", b"[1]\n", b"\xff\n", b'{"format": "patchnetvlad features", "version": 2}\n']
)
def test_a_damaged_header_is_refused(tmp_path, first):
    (tmp_path / "manifest.jsonl").write_bytes(first)
    for attempt in (FeatureWriter, FeatureStore.open):
        with pytest.raises(UserError, match="line 1"):
            attempt(tmp_path, LIST, make_header())


def test_lines_that_a_lost_machine_left_blank_end_the_manifest(tmp_path):
    header = make_header()
    write_all(tmp_path, header)
    manifest = tmp_path / "manifest.jsonl"
    whole = manifest.read_bytes()
    lines = whole.splitlines(keepends=True)
    manifest.write_bytes(b"".join([*lines[:2], b"\0" * len(lines[2]), lines[3]]))
    assert write_all(tmp_path, header) == [1, 2]
    assert manifest.read_bytes() == whole


def test_a_folder_of_the_version_before_is_read(tmp_path):
    """Manifest lines as they were written before headers knew no names."""
    header = make_header(settings={"backbone": "vgg16"}, patch_sizes=(3,), strides=(2,))
    write_all(tmp_path, header, make_list(["a.jpg"]))
    (tmp_path / "manifest.jsonl").write_text(
        '{"format": "patchnetvlad features", "version": 2, "software": "0.2.0", "created": "2026-11-25T12:20:23+00:00",'
        ' "list": "pictures.txt", "checkpoint_sha256": "' + "ab" * 32 + '", "settings": {"backbone": "vgg16"}, '
        '"num_pictures": 1, "names_sha256": "' + hashlib.sha256(b'["a.jpg"]').hexdigest() + '", '
        '"num_dims": 6, "patch_sizes": [3], "strides": [2], '
        '"geometry": {"stride": 16, "receptive_field": 196, "padding": 90}, "dtype": "float32"}\n'
        '{"index": 0, "name": "a.jpg", "feature_name": "a", "map": [5, 7]}\n'
    )
    assert write_all(tmp_path, header, make_list(["a.jpg"])) == []
    with open_store(tmp_path, header, make_list(["a.jpg"])) as store:
        assert torch.equal(store.patches(0).descriptors[0], make_features(header, 0)[1].descriptors[0])


def test_a_newer_format_is_refused(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"format": "patchnetvlad features", "version": 9}\n')
    with pytest.raises(UserError, match="version 9"):
        FeatureWriter(tmp_path, LIST, make_header())


def test_lost_or_short_files_are_made_again(tmp_path):
    header = make_header()
    write_all(tmp_path, header)
    (tmp_path / "patchfeats_psize2_b.npy").unlink()
    short = tmp_path / "patchfeats_psize3_day_a.jpg.npy"
    short.write_bytes(short.read_bytes()[:-4])
    assert write_all(tmp_path, header) == [1, 2]
    rows = np.lib.format.open_memmap(tmp_path / "globalfeats.npy", mode="r+")
    rows[0] = 0  # as a lost machine leaves a row that was not written
    del rows
    assert write_all(tmp_path, header) == [0]
    (tmp_path / "globalfeats.npy").unlink()
    assert write_all(tmp_path, header) == [0, 1, 2]
    open_store(tmp_path, header)


def test_leftovers_of_a_crash_are_removed(tmp_path):
    (tmp_path / ".writing-123-abc.npy").write_bytes(b"half")
    (tmp_path / "globalfeats.npy.partial").write_bytes(b"half")
    assert write_all(tmp_path, make_header()) == [0, 1, 2]
    assert not any("tmp" in name or "partial" in name or "lock" in name for name in files_of(tmp_path))


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"checkpoint_sha256": "cd" * 32}, "checkpoint"),
        ({"settings": {"backbone": "rootsift"}}, "backbone"),
        ({"settings": {"backbone": "vgg16", "imageresizeh": 80}}, "imageresizew: 112 there, absent wanted"),
        ({"num_dims": 5}, "dimensions: 6 there, 5 wanted"),
        ({"patch_sizes": (2, 4)}, "patch_sizes"),
        ({"strides": (1, 1)}, "strides"),
        ({"dtype": "int8"}, "dtype: float32 there, int8 wanted"),
        ({"geometry": EncoderGeometry(8, 100, 40)}, "geometry"),
        ({"names": NAMES[:2]}, f"pictures in the list: 3 there, 2 wanted, without {NAMES[2]} ("),
        ({"names": NAMES[::-1]}, "picture list: the same names in another order"),
        ({"names": [*NAMES[:2], "x.jpg"]}, "picture list: other names, or another order"),
        ({"names": ["x.jpg", *NAMES[:2], "y.jpg"]}, "pictures that the list has not: day/b.jpg"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, changes, word):
    header = make_header()
    write_all(tmp_path, header)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    names = changes.pop("names", NAMES)
    with pytest.raises(UserError) as caught:
        FeatureWriter(tmp_path, make_list(names), make_header(**changes))
    assert word in one_line(caught) and str(tmp_path) in str(caught.value) and "--overwrite" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwriting(tmp_path):
    write_all(tmp_path, make_header())
    (tmp_path / "notes.txt").write_text("mine")
    header = make_header()
    with FeatureWriter(tmp_path, make_list(["one.jpg"]), header, overwrite=True) as writer:
        assert files_of(tmp_path) >= {"notes.txt", "manifest.jsonl"} and writer.missing == [0]
        writer.write(0, *make_features(header, 0))
        writer.finish()
    assert {name for name in files_of(tmp_path) if name.startswith("patch")} == {
        "patchfeats_psize2_one.npy",
        "patchfeats_psize3_one.npy",
    }
    assert "notes.txt" in files_of(tmp_path)


# --- a list that grows ---------------------------------------------------------------------------------------------


def write_named(folder: Path, header: StoreHeader, names: Sequence[str], stop: int | None = None) -> list[str]:
    """Write what is missing of a list, `stop` pictures at most, each with features of its name; what that was."""
    with FeatureWriter(folder, make_list(names), header) as writer:
        missing = writer.missing
        for index in missing[:stop]:
            writer.write(index, *make_features(header, features_of(names[index])))
        if stop is None:
            writer.finish()
    return [names[index] for index in missing]


def features_of(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def check_named(folder: Path, header: StoreHeader, names: Sequence[str]) -> None:
    with open_store(folder, header, make_list(names)) as store:
        for index, name in enumerate(names):
            global_, patches = make_features(header, features_of(name))
            np.testing.assert_array_equal(store.global_[index], global_)
            for stored, given_ in zip(store.patches(index).descriptors, patches.descriptors, strict=True):
                assert torch.equal(stored, given_)
    patch_files = {name for name in files_of(folder) if name.startswith("patchfeats")}
    assert len(patch_files) == len(header.patch_sizes) * len(set(names))
    assert files_of(folder) - patch_files == {"globalfeats.npy", "manifest.jsonl"}


def test_a_longer_list_describes_new_pictures_only(tmp_path):
    header, first = make_header(), ["b.jpg", "d.jpg"]
    write_named(tmp_path, header, first)
    longer = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert write_named(tmp_path, header, longer) == ["a.jpg", "c.jpg", "e.jpg"]
    check_named(tmp_path, header, longer)
    shuffled = ["f.jpg", *longer[::-1], "b.jpg"]
    assert write_named(tmp_path, header, shuffled) == ["f.jpg"]
    check_named(tmp_path, header, shuffled)
    with pytest.raises(UserError, match="7 pictures, the list has 2"):
        open_store(tmp_path, header, make_list(first))


def test_new_pictures_of_equal_stems_stay_apart_from_old_ones(tmp_path):
    header = make_header()
    write_named(tmp_path, header, ["one/1.jpg", "one/2.jpg"])
    assert "patchfeats_psize2_1.npy" in files_of(tmp_path)
    both = ["one/1.jpg", "one/2.jpg", "two/1.jpg", "two_1.jpg", "two/2.jpg", "1/1.jpg"]
    write_named(tmp_path, header, both, stop=1)
    assert len(write_named(tmp_path, header, both)) == 3
    check_named(tmp_path, header, both)


def test_an_unfinished_folder_grows(tmp_path):
    header, names = make_header(), [f"{number}.jpg" for number in range(6)]
    write_named(tmp_path, header, names[2:5], stop=2)
    assert write_named(tmp_path, header, names) == ["0.jpg", "1.jpg", "4.jpg", "5.jpg"]
    check_named(tmp_path, header, names)


class Killed(BaseException):
    """The end of a process, which does nothing more to files."""


class Executioner:
    """Ends a process at one of its file events, and lets nothing of it touch a file afterwards."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.events_left = 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None or event not in ("open", "os.rename", "os.remove", "os.truncate"):
            return
        if str(arguments[0]).startswith(self.folder):
            self.events_left -= 1
            if self.events_left < 0:
                raise Killed

    def run(self, folder: Path, events: int, work: Callable[[], object]) -> bool:
        """Whether the work survived so many events in the folder."""
        self.folder, self.events_left = str(folder), events
        try:
            work()
            return True
        except Killed:
            return False
        finally:
            self.folder = None


EXECUTIONER = Executioner()


@pytest.mark.parametrize("finished", [True, False])
def test_growing_may_be_killed_at_any_file_event(tmp_path, finished):
    header = make_header(patch_sizes=(2,), strides=(1,))
    first, longer = ["b.jpg", "d.jpg", "e.jpg"], ["a.jpg", "e.jpg", "b.jpg", "c.jpg", "d.jpg"]
    kept = first if finished else first[:2]
    told = set()
    for events in range(1000):
        folder = tmp_path / str(events)
        write_named(folder, header, first, None if finished else 2)
        survived = EXECUTIONER.run(folder, events, lambda at=folder: write_named(at, header, longer, stop=0))
        try:
            again = write_named(folder, header, first)  # not yet grown: as if nothing had been
            assert again == [name for name in first if name not in kept]
            check_named(folder, header, first)
            told.add("before")
        except UserError:
            told.add("after")
        missing = set(write_named(folder, header, longer))
        assert missing in ({"a.jpg", "c.jpg"}, {"a.jpg", "c.jpg"} | (set(first) - set(kept)))
        check_named(folder, header, longer)
        if survived:
            break
    assert told == {"before", "after"} and events > 5


@pytest.mark.parametrize("name", ["globalfeats.npy", "patchfeats_psize5_x.npy"])
def test_published_features_are_not_mixed_with(tmp_path, name):
    (tmp_path / name).write_bytes(b"features of hours")
    with pytest.raises(UserError, match="without a manifest") as caught:
        FeatureWriter(tmp_path, LIST, make_header())
    assert "--overwrite" in one_line(caught)
    assert (tmp_path / name).read_bytes() == b"features of hours"


# --- failures while writing ------------------------------------------------------------------------------------


def test_a_full_disk_is_told_with_the_way_on(tmp_path, monkeypatch):
    header = make_header()
    real, calls = feature_layouts.write_patch_array, []

    def full(path: Path, array: np.ndarray) -> None:
        calls.append(path)
        if len(calls) == 4:  # the second size of the second picture
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, array)

    monkeypatch.setattr(feature_layouts, "write_patch_array", full)
    with pytest.raises(UserError) as caught:
        write_all(tmp_path, header)
    message = one_line(caught)
    assert "No space left" in message and "1 of 3" in message and "same command" in message
    assert len(calls) == 4  # nothing is written after the failure
    monkeypatch.undo()
    assert write_all(tmp_path, header) == [1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit")
def test_a_write_that_stops_midway_leaves_nothing_half(tmp_path):
    import resource

    header = make_header(num_dims=600)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # psize2 has 24 patches: 57,728 bytes
        with pytest.raises(UserError, match="File too large"), FeatureWriter(tmp_path, LIST, header) as writer:
            writer.write(0, *make_features(header, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path) == {"manifest.jsonl", "globalfeats.npy.partial"}
    assert write_all(tmp_path, header) == [0, 1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit")
def test_a_manifest_line_is_whole_or_absent(tmp_path):
    import resource

    header = make_header(patch_sizes=(), strides=(), num_dims=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError), FeatureWriter(tmp_path, LIST, header) as writer:
            size = (tmp_path / "manifest.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
            writer.write(0, torch.ones(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "manifest.jsonl").stat().st_size == size


def test_writing_runs_beside_the_caller_and_is_bounded(tmp_path, monkeypatch):
    header, pictures = make_header(patch_sizes=(2,), strides=(1,)), make_list([f"{i}.jpg" for i in range(6)])
    gate, written = threading.Event(), []
    real = feature_layouts.write_patch_array

    def slow(path: Path, array: np.ndarray) -> None:
        assert gate.wait(10)
        written.append(path)
        real(path, array)

    monkeypatch.setattr(feature_layouts, "write_patch_array", slow)
    with FeatureWriter(tmp_path, pictures, header, queue_size=2) as writer:
        for index in (0, 1):
            writer.write(index, *make_features(header, index))
        assert written == [] and writer.missing == [0, 1, 2, 3, 4, 5]
        third = threading.Thread(target=writer.write, args=(2, *make_features(header, 2)))
        third.start()
        third.join(0.1)
        assert third.is_alive()  # the queue is full
        gate.set()
        third.join(10)
        assert not third.is_alive()
        with pytest.raises(ValueError, match="3 pictures were not written"):
            writer.finish()
        assert writer.missing == [3, 4, 5]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_descriptors_that_are_not_finite_are_not_written(tmp_path, dtype, value):
    header = make_header(dtype=dtype)
    global_, patches = make_features(header, 0)
    patches.descriptors[1][2, 3] = value
    with pytest.raises(UserError, match=r"night/a\.jpg") as caught, FeatureWriter(tmp_path, LIST, header) as writer:
        writer.write(0, global_, patches)
    assert "NaN" in one_line(caught)
    with pytest.raises(UserError, match="NaN"), FeatureWriter(tmp_path, LIST, header) as writer:
        writer.write(0, global_ * value, make_features(header, 0)[1])
    assert write_all(tmp_path, header) == [0, 1, 2]


def test_what_does_not_fit_the_header_is_a_bug_of_the_caller(tmp_path):
    header = make_header()
    global_, patches = make_features(header, 0)
    with FeatureWriter(tmp_path, LIST, header) as writer:
        for index, row, features in (
            (3, global_, patches),
            (0, global_[:5], patches),
            (0, global_, None),
            (0, global_, PatchFeatures(patches.descriptors[::-1], patches.grids)),
            (0, global_, PatchFeatures(patches.descriptors, patches.grids[::-1])),
        ):
            with pytest.raises(ValueError):
                writer.write(index, row, features)
    for changes in ({"dtype": "float64"}, {"strides": (1,)}):
        with pytest.raises(ValueError):
            make_header(**changes)
    for feature_names in (("a", "a", "b"), ("a", "../x", "b")):
        with pytest.raises(ValueError):
            FeatureWriter(tmp_path / "new", make_list(NAMES, feature_names), header)
    for changes in ({"checkpoint_sha256": None}, {"num_dims": 0}):
        with pytest.raises(ValueError):
            FeatureWriter(tmp_path / "new", LIST, make_header(**changes))
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="twice"):
        make_header(patch_sizes=(2, 2))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "features"):
        with pytest.raises(UserError, match="a file is in the place of a folder") as caught:
            FeatureWriter(folder, LIST, make_header())
        assert str(folder) in one_line(caught)


def test_a_picture_is_on_the_disk_before_the_manifest_says_so(tmp_path, monkeypatch):
    events: list[str] = []
    real_files, real_append, real_sync = picture_writer.sync_files, feature_writer._append, os.fsync

    def sync_files(paths):
        paths = list(paths)
        events.extend(path.name for path in paths)
        real_files(paths)

    def append(manifest, lines):
        events.append(f"{lines.count(bytes([10]))} lines")
        real_append(manifest, lines)

    def sync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_sync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    with FeatureWriter(tmp_path, LIST, make_header()) as writer:
        monkeypatch.setattr(picture_writer, "sync_files", sync_files)
        monkeypatch.setattr(feature_writer, "_append", append)
        monkeypatch.setattr(os, "fsync", sync)
        for index in (0, 2):
            writer.write(index, *make_features(make_header(), index))
    written = [f"patchfeats_psize{size}_{name}.npy" for name in ("night_a.jpg", "b") for size in (2, 3)]
    last = events.index("2 lines")
    assert sorted(events[: last - 1]) == sorted([*written, *written])  # asked for, and synchronised
    assert events[last - 1 :] == ["globalfeats.npy.partial", "2 lines", "manifest.jsonl"]


def test_pictures_are_recorded_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_writer, "_TOGETHER", 2)
    header = make_header()
    with FeatureWriter(tmp_path, LIST, header) as writer:
        writer.write(0, *make_features(header, 0))
        writer.write(1, *make_features(header, 1))
        deadline = time.monotonic() + 10
        while writer.missing != [2]:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        monkeypatch.setattr(picture_writer, "_SECONDS", 0.0)
        writer.write(2, *make_features(header, 2))
        while writer.missing:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert (tmp_path / "manifest.jsonl").read_bytes().count(b"\n") == 4


# --- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_estimated_bytes_are_those_written(tmp_path, dtype):
    header = make_header(dtype=dtype, num_dims=500)
    write_all(tmp_path, header)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written <= estimate_bytes(header, MAP_SIZE, 3) + 2000
    assert written == pytest.approx(estimate_bytes(header, MAP_SIZE, 3), rel=0.05)
    assert estimate_bytes(header, MAP_SIZE, 30) == pytest.approx(10 * estimate_bytes(header, MAP_SIZE, 3), rel=1e-4)


def test_performance_features_of_pitts30k():
    header = make_header(num_dims=4096, patch_sizes=(2, 5, 8), strides=(1, 1, 1))
    assert estimate_bytes(header, (30, 40), 1) == pytest.approx(46.3e6, rel=0.01)


def test_check_disk(tmp_path, monkeypatch):
    check_disk(tmp_path / "not" / "there", 1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3 * 10**9}))
    with pytest.raises(UserError, match=r"812\.0 GB, its disk has 3\.0 GB free") as caught:
        check_disk(tmp_path / "not" / "there", 812 * 10**9)
    assert "feature_dtype" in one_line(caught)


# --- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"checkpoint_sha256": ""}, "checkpoint sha256: abababababab there, none wanted"),
        ({"settings": {"backbone": "rootsift"}}, "backbone: vgg16 there, rootsift wanted"),
        ({"num_dims": 5}, "dimensions"),
        ({"patch_sizes": (2, 8)}, r"patch_sizes: [2, 3] there, [2, 8] wanted"),
        ({"strides": (1, 1)}, "stride of patch size 3: 2 there, 1 wanted"),
        ({"geometry": EncoderGeometry(8, 100, 40)}, "geometry"),
        ({"names": NAMES[:2]}, "of 3 pictures, the list has 2"),
        ({"names": ("night/a.jpg", "day/c.jpg", "day/b.jpg")}, "picture 2 is day/a.jpg there and day/c.jpg"),
    ],
)
def test_features_of_something_else_are_refused(tmp_path, changes, word):
    write_all(tmp_path, make_header())
    names = changes.pop("names", NAMES)
    with pytest.raises(UserError) as caught:
        open_store(tmp_path, make_header(**changes), make_list(names))
    assert word in one_line(caught) and str(tmp_path) in str(caught.value)


def test_settings_that_are_not_expected_do_not_matter(tmp_path):
    write_all(tmp_path, make_header())
    open_store(tmp_path, make_header(settings={"imageresizeh": 80}, dtype="float16"))
    store = FeatureStore.open(tmp_path, LIST)
    assert store.patch_sizes == (2, 3) and store.num_dims == 6


def damage(path: Path, how: str) -> None:
    array = np.load(path)
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "header":
        path.write_bytes(path.read_bytes()[:20])
    elif how == "other":
        path.write_bytes(b"<html>not found</html>" * 20)
    elif how == "objects":
        np.save(path, np.array([None]), allow_pickle=True)
    else:
        changed = {"shape": array[:, :-1], "nan": np.where(array == array[0, 0], np.nan, array)}
        changed |= {"infinite": np.where(array == array[0, 0], -np.inf, array), "integers": array.astype(int)}
        changed |= {"precision": array.astype(np.float16), "flat": array.reshape(-1)}
        changed |= {"text": array.astype(str)}
        np.save(path, changed[how].astype(array.dtype) if how in ("nan", "infinite") else changed[how])


DAMAGES = [
    ("missing", "is missing"),
    ("truncated", "its header says"),
    ("header", "not a whole"),
    ("other", "not a whole"),
    ("objects", "Python objects"),
    ("shape", "24 patches"),
    ("flat", "24 patches"),
    ("nan", "NaN"),
    ("infinite", "NaN or infinity"),
    ("integers", "int64"),
    ("precision", "the manifest says float32"),
]


@pytest.mark.parametrize("how,word", DAMAGES)
def test_damaged_patch_files(tmp_path, how, word):
    header = make_header()
    write_all(tmp_path, header)
    path = tmp_path / "patchfeats_psize2_b.npy"
    damage(path, how)
    with pytest.raises(UserError) as caught, open_store(tmp_path, header) as store:
        store.patches(0)
        store.prefetch([2])
        store.patches(2)
    assert word in one_line(caught) and str(path) in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_damaged_small_files(tmp_path, dtype):
    header = make_header(dtype=dtype)
    write_all(tmp_path, header)
    damage(tmp_path / "patchfeats_psize2_b.npy", "integers" if dtype == "int8" else "nan")
    with pytest.raises(UserError), open_store(tmp_path, header) as store:
        store.patches(2)


@pytest.mark.parametrize(
    "how,word",
    [
        ("missing", "not finished, 3 of 3"),
        ("truncated", "its header says"),
        ("shape", "5 dimensions, expected 6"),
        ("nan", "NaN"),
        ("text", "<U"),
        ("flat", "expected N×D"),
    ],
)
def test_damaged_global_file(tmp_path, how, word):
    header = make_header()
    write_all(tmp_path, header)
    damage(tmp_path / "globalfeats.npy", how)
    with pytest.raises(UserError) as caught:
        open_store(tmp_path, header)
    assert word in one_line(caught)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        open_store(tmp_path / "features", make_header())


def test_dimensions_and_checkpoint_that_the_configuration_does_not_know(tmp_path):
    header = make_header()
    unknown = make_header(num_dims=0, checkpoint_sha256=None)
    write_all(tmp_path, header)
    assert open_store(tmp_path, unknown).num_dims == 6
    (tmp_path / "manifest.jsonl").unlink()
    with open_store(tmp_path, unknown, map_size=MAP_SIZE) as store:
        assert store.num_dims == 6 and store.patches(1).descriptors[0].shape == (24, 6)
    damage(tmp_path / "globalfeats.npy", "flat")
    with pytest.raises(UserError, match="expected N×D"):
        open_store(tmp_path, unknown, map_size=MAP_SIZE)
    (tmp_path / "globalfeats.npy").unlink()
    with pytest.raises(UserError, match="is missing"):
        open_store(tmp_path, unknown, map_size=MAP_SIZE)


# --- folders of the published code -----------------------------------------------------------------------------


def publish(folder: Path, header: StoreHeader, names: tuple[str, ...], order: str = "C", dtype=np.float32):
    """Write as the published code does: no manifest, files called `names`."""
    rows = np.zeros((len(names), header.num_dims), np.float32)
    for index, name in enumerate(names):
        global_, patches = make_features(header, index)
        rows[index] = global_
        for size, descriptors in zip(header.patch_sizes, patches.descriptors, strict=True):
            table = np.array(descriptors.numpy().T, dtype=dtype, order=order)
            np.save(folder / f"patchfeats_psize{size}_{name}.npy", table)
    np.save(folder / "globalfeats.npy", rows)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4", "float16"])
def test_published_folder(tmp_path, order, dtype):
    names = ("night/a.b.jpg", "/data/c.png", "d", "night/a.b.jpg")
    header, pictures = make_header(), make_list(names)
    publish(tmp_path, header, ("a.b", "c", "d"), order, dtype)
    rows = np.load(tmp_path / "globalfeats.npy")
    np.save(tmp_path / "globalfeats.npy", rows[[0, 1, 2, 0]].astype(np.float64))
    with open_store(tmp_path, header, pictures, map_size=MAP_SIZE) as store:
        assert store.global_.dtype == np.float32 and store.global_.shape == (4, 6)
        for index in range(4):
            expected = make_features(header, index % 3)[1]
            read = store.patches(index)
            assert read.grids == expected.grids
            for a, b in zip(read.descriptors, expected.descriptors, strict=True):
                assert a.dtype == torch.float32
                torch.testing.assert_close(a, b, rtol=0, atol=2**-11 if dtype == "float16" else 0)


def test_published_folder_with_names_of_ours(tmp_path):
    header = make_header()
    publish(tmp_path, header, LIST.feature_names)
    with open_store(tmp_path, header, map_size=MAP_SIZE) as store:
        assert torch.equal(store.patches(1).descriptors[0], make_features(header, 1)[1].descriptors[0])


def test_published_pictures_of_one_stem(tmp_path):
    header = make_header()
    publish(tmp_path, header, ("a", "a", "b"))
    with pytest.raises(UserError, match="2 pictures of the list are called a") as caught:
        open_store(tmp_path, header, map_size=MAP_SIZE)
    one_line(caught)


def test_published_folder_that_does_not_fit(tmp_path):
    header, pictures = make_header(), make_list(["x/a.jpg", "b.jpg"])
    publish(tmp_path, header, ("a", "b"))
    with pytest.raises(UserError, match="5×8 map"), open_store(tmp_path, header, pictures, map_size=(5, 8)) as store:
        store.patches(0)
    with pytest.raises(UserError, match="2 rows, the list has 3"):
        open_store(tmp_path, make_header(), map_size=MAP_SIZE)
    with pytest.raises(UserError, match="6 dimensions, expected 5"):
        open_store(tmp_path, make_header(num_dims=5), pictures, map_size=MAP_SIZE)
    with pytest.raises(UserError, match=r"of b\.jpg, as are 0 further"):
        (tmp_path / "patchfeats_psize3_b.npy").unlink()
        open_store(tmp_path, header, pictures, map_size=MAP_SIZE)
    with pytest.raises(UserError, match="own size"):
        open_store(tmp_path, header, pictures)
    with pytest.raises(UserError, match="no manifest"):
        FeatureStore.open(tmp_path, pictures)
    assert len(open_store(tmp_path, replace(header, patch_sizes=(), strides=()), pictures)) == 2


def test_int8_needs_its_manifest(tmp_path):
    header, pictures = make_header(dtype="int8"), make_list(["a.jpg"])
    write_all(tmp_path, header, pictures)
    (tmp_path / "manifest.jsonl").unlink()
    with pytest.raises(UserError, match="scales"), open_store(tmp_path, header, pictures, map_size=MAP_SIZE) as store:
        store.patches(0)


# --- the cache -------------------------------------------------------------------------------------------------

PICTURE_BYTES = 4 * 6 * (24 + 6)  # of make_header's store: D = 6, P = 24 and 6, float32


def big_store(folder: Path, num: int, pictures_in_cache: float, **changes) -> FeatureStore:
    header, pictures = make_header(**changes), make_list([f"{i}.jpg" for i in range(num)])
    write_all(folder, header, pictures)
    return open_store(folder, header, pictures, cache_gb=pictures_in_cache * PICTURE_BYTES / 1e9)


def settle(store: FeatureStore, reads: int) -> None:
    deadline = time.monotonic() + 10
    while store.statistics.reads < reads:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_picture_is_read_once_while_it_fits(tmp_path):
    with big_store(tmp_path, 4, 4) as store:
        for index in (0, 1, 2, 3) * 3:
            store.patches(index)
        found = store.statistics
        assert (found.reads, found.hits, found.bytes_read) == (4, 8, 4 * PICTURE_BYTES)
        assert (found.held_pictures, found.held_bytes) == (4, 4 * PICTURE_BYTES)


def test_the_cache_is_bounded_and_drops_the_least_recently_used(tmp_path):
    with big_store(tmp_path, 4, 2.5) as store:
        for index in (0, 1, 0, 2):  # 1 goes
            store.patches(index)
        assert store.statistics.held_pictures == 2
        store.patches(0)
        assert store.statistics.reads == 3
        store.patches(1)
        assert store.statistics.reads == 4 and store.statistics.held_bytes <= 2.5 * PICTURE_BYTES


@pytest.mark.parametrize("dtype,factor", [("float16", 2), ("int8", 4)])
def test_small_dtypes_stay_small_in_the_cache(tmp_path, dtype, factor):
    with big_store(tmp_path, 2 * factor, 2, dtype=dtype) as store:
        for index in list(range(2 * factor)) * 2:
            assert store.patches(index).descriptors[0].dtype == torch.float32
        assert store.statistics.reads == 2 * factor
        assert store.statistics.held_bytes == 2 * PICTURE_BYTES


def test_without_a_cache_everything_is_read_again(tmp_path):
    with big_store(tmp_path, 2, 0) as store:
        store.prefetch([0, 1])
        for index in (0, 1, 0):
            store.patches(index)
        assert store.statistics.reads == 3 and store.statistics.held_bytes == 0


def test_prefetching_reads_ahead_half_the_cache_and_moves_on(tmp_path):
    with big_store(tmp_path, 10, 6) as store:
        store.prefetch(iter(range(10)))
        settle(store, 3)
        time.sleep(0.02)
        assert store.statistics.reads == 3
        for index in range(10):
            store.patches(index)
            settle(store, min(10, index + 4))
        found = store.statistics
        assert found.reads == 10 and found.hits == 10 and found.held_bytes <= 6 * PICTURE_BYTES


def test_prefetching_a_whole_run_reads_every_picture_once(tmp_path):
    order = [int(index) for index in np.random.default_rng(0).integers(0, 8, 100)]
    with big_store(tmp_path, 8, 8) as store:
        store.prefetch(order)
        for index in order:
            store.patches(index)
        assert store.statistics.reads == len(set(order)) and store.statistics.hits == 100


def test_a_small_cache_still_gives_the_right_pictures(tmp_path):
    order = [int(index) for index in np.random.default_rng(1).integers(0, 8, 60)]
    with big_store(tmp_path, 8, 1.5) as store:
        header = make_header()
        store.prefetch(order)
        for index in order:
            expected = make_features(header, index)[1]
            assert torch.equal(store.patches(index).descriptors[0], expected.descriptors[0])


def test_many_threads_share_one_read():
    started, gate = threading.Event(), threading.Event()
    loads: list[int] = []

    def load(index: int) -> tuple[np.ndarray, ...]:
        loads.append(index)
        started.set()
        assert gate.wait(10)
        return (np.full(10, index, np.int8),)

    cache = PictureCache(load, lambda index: 10, 100)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(int(cache.get(3)[0][0]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    gate.set()
    for thread in threads:
        thread.join(10)
    assert loads == [3] and found == [3] * 8
    cache.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60), st.lists(st.integers(0, 9), max_size=60), st.integers(0, 400))
def test_any_order_is_answered_within_the_bound(asked, announced, max_bytes):
    sizes = [7 * index for index in range(10)]
    loads: list[int] = []

    def load(index: int) -> tuple[np.ndarray, ...]:
        loads.append(index)
        return (np.full(sizes[index], index, np.int8),)

    cache = PictureCache(load, sizes.__getitem__, max_bytes)
    cache.prefetch(announced)
    for index in asked:
        (array,) = cache.get(index)
        assert len(array) == sizes[index] and np.all(array == index)
        assert cache.statistics.held_bytes <= max_bytes
    cache.close()
    if max_bytes >= sum(sizes):
        assert len(loads) == len(set(loads))
    assert cache.statistics.held_bytes == 0


def test_a_failed_read_is_told_and_may_be_tried_again():
    failures = [OSError("first"), OSError("second")]

    def load(index: int) -> tuple[np.ndarray, ...]:
        if failures:
            raise failures.pop(0)
        return (np.zeros(4, np.int8),)

    cache = PictureCache(load, lambda index: 4, 100)
    cache.prefetch([0])
    deadline = time.monotonic() + 10
    while len(failures) == 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    with pytest.raises(OSError, match="second"):
        cache.get(0)
    assert len(cache.get(0)[0]) == 4 and cache.statistics.reads == 1
    cache.close()


def test_rounded_descriptors_come_beside_the_others_and_count_in_the_cache(tmp_path):
    with big_store(tmp_path, 2, 4, dtype="float16") as store:
        assert store.patches(0).rounded == ()
        store.round_references()
        features = store.patches(0)
        for rows, rounded in zip(features.descriptors, features.rounded, strict=True):
            expected = round_patches(rows, "reference")
            assert torch.equal(rounded.levels, expected.levels)
            assert torch.equal(rounded.scale, expected.scale) and torch.equal(rounded.norm, expected.norm)
            assert torch.equal(rounded.offset, expected.offset)
        assert store.statistics.held_bytes == PICTURE_BYTES / 2 + (24 + 6) * (6 + 12)
        assert store.picture_bytes(0) == store.statistics.held_bytes  # what is held against the room there is


PACKED_LIST = make_list([f"{number:02}.jpg" for number in range(11)])
PACKED_MAPS = [(5, 7), (5, 7), (6, 4), (5, 7), (3, 3), (3, 3), (9, 3), (5, 7), (5, 7), (5, 7), (6, 4)]


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (feature_blocks, feature_layouts):
        monkeypatch.setattr(module, "PICTURES_IN_BLOCK", 4)


def write_packed(folder: Path, header: StoreHeader, indices: Sequence[int] | None = None, finish: bool = True):
    """Write pictures of the packed list, by default those that are missing; returns what was missing."""
    with FeatureWriter(folder, PACKED_LIST, header) as writer:
        missing = writer.missing
        for index in missing if indices is None else indices:
            writer.write(index, *make_features(header, index, PACKED_MAPS[index]))
        if finish:
            writer.finish()
    return missing


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_packed_folders_hold_what_files_hold(tmp_path, small_blocks, dtype):
    files, packed = make_header(dtype=dtype), make_header(dtype=dtype, layout="packed")
    write_packed(tmp_path / "files", files)
    assert write_packed(tmp_path / "packed", packed) == list(range(11))
    assert len(list((tmp_path / "packed").glob("patchblock_*[0-9].npy"))) == 3
    selection = replace(files, patch_sizes=(3,), strides=(2,))
    for expected in (None, selection):
        with (
            FeatureStore.open(tmp_path / "files", PACKED_LIST, expected) as one,
            FeatureStore.open(tmp_path / "packed", PACKED_LIST, expected) as other,
        ):
            np.testing.assert_array_equal(one.global_, other.global_)
            for index in (10, 0, 4, 3, 2, 9, 4):
                assert one.patches(index).grids == other.patches(index).grids
                for first, second in zip(one.patches(index).descriptors, other.patches(index).descriptors, strict=True):
                    assert torch.equal(first, second)


def test_packed_pictures_may_come_in_any_order(tmp_path, small_blocks):
    header = make_header(layout="packed")
    write_packed(tmp_path / "one", header)
    write_packed(tmp_path / "other", header, [3, 10, 1, 0, 6, 2, 4, 9, 8, 7, 5])
    for path in sorted((tmp_path / "one").glob("*.npy")):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_packed_folders_resume_with_whole_blocks(tmp_path, small_blocks):
    header = make_header(layout="packed")
    write_packed(tmp_path / "whole", header)
    write_packed(tmp_path / "cut", header, range(6), finish=False)
    assert not list((tmp_path / "cut").glob(".writing*"))
    with pytest.raises(UserError, match="not finished"):
        FeatureStore.open(tmp_path / "cut", PACKED_LIST)
    assert write_packed(tmp_path / "cut", header) == list(range(4, 11))
    (tmp_path / "cut" / "patchblock_0000001.npy").write_bytes(b"short")
    with pytest.raises(UserError, match=r"patchblock_0000001\.npy: has 5 bytes"):
        FeatureStore.open(tmp_path / "cut", PACKED_LIST)
    assert write_packed(tmp_path / "cut", header) == [4, 5, 6, 7]
    for path in sorted((tmp_path / "whole").glob("*.npy")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert write_packed(tmp_path / "cut", header) == []


def test_a_packed_manifest_that_was_torn(tmp_path, small_blocks):
    header = make_header(layout="packed")
    write_packed(tmp_path, header)
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    assert write_packed(tmp_path, header) == [8, 9, 10]
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (b'{"block": 7, "maps": [[5, 7, 4]]}\n', b'{"block": 1, "maps": [[5, 7, 3]]}\n', b"{}\n"):
        path.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
        with pytest.raises(UserError, match="line 3 does not describe a picture or block"):
            FeatureStore.open(tmp_path, PACKED_LIST)


def test_packed_folders_of_another_list_are_refused(tmp_path, small_blocks):
    header = make_header(layout="packed")
    write_packed(tmp_path, header)
    for names in (PACKED_LIST.names[::-1], ("x.jpg", *PACKED_LIST.names[1:])):
        with pytest.raises(UserError, match="of other pictures than the list names"):
            FeatureStore.open(tmp_path, make_list(names))
    with pytest.raises(UserError, match="layout: packed there, files wanted"):
        FeatureWriter(tmp_path, PACKED_LIST, make_header())


def grow_packed(folder: Path, header: StoreHeader, count: int, indices: Sequence[int] | None = None) -> list[int]:
    """Write what is missing of the first pictures of the packed list, or some of it; returns what was missing."""
    with FeatureWriter(folder, make_list(PACKED_LIST.names[:count]), header) as writer:
        missing = writer.missing
        for index in missing if indices is None else indices:
            writer.write(index, *make_features(header, index, PACKED_MAPS[index]))
        if indices is None:
            writer.finish()
    return missing


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_packed_folders_grow_at_the_end_of_their_list(tmp_path, small_blocks, dtype):
    """In steps of whole blocks and of parts; what is there in the end is what one run makes."""
    header = make_header(layout="packed", dtype=dtype)
    write_packed(tmp_path / "whole", header)
    folder = tmp_path / "grown"
    for before, count in ((0, 2), (2, 3), (3, 4), (4, 9), (9, 11)):
        assert grow_packed(folder, header, count) == list(range(before, count))
        with FeatureStore.open(folder, make_list(PACKED_LIST.names[:count])) as store:
            for index in range(count):
                store.patches(index)
    for path in sorted((tmp_path / "whole").glob("*.npy")):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert not list(folder.glob(".writing*")) and not list(folder.glob("*.grown"))


def test_a_packed_folder_that_grows_is_not_finished(tmp_path, small_blocks):
    """Not while its last block is short, and after another growth neither."""
    header = make_header(layout="packed")
    grow_packed(tmp_path, header, 6)
    assert grow_packed(tmp_path, header, 7, []) == [6]
    with pytest.raises(UserError, match="not finished"):
        FeatureStore.open(tmp_path, make_list(PACKED_LIST.names[:7]))
    assert grow_packed(tmp_path, header, 11, [9, 10]) == [6, 7, 8, 9, 10]  # no block was completed
    assert grow_packed(tmp_path, header, 11, [6, 7]) == [6, 7, 8, 9, 10]
    assert grow_packed(tmp_path, header, 11) == [8, 9, 10]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_packed_growth_that_was_killed(tmp_path, small_blocks, dtype):
    """Before the new manifest was in place, and between a completed block's files and its line."""
    header = make_header(layout="packed", dtype=dtype)
    write_packed(tmp_path / "whole", header)
    folder = tmp_path / "grown"
    grow_packed(folder, header, 6)
    with (folder / "globalfeats.npy.grown").open("wb") as file:  # longer rows without their manifest
        np.save(file, np.ones((11, header.num_dims), np.float32))
    assert grow_packed(folder, header, 6) == []
    assert grow_packed(folder, header, 11, []) == [6, 7, 8, 9, 10]
    for path in (tmp_path / "whole").glob("patchblock_0000001*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert grow_packed(folder, header, 11) == [6, 7, 8, 9, 10]
    for path in sorted((tmp_path / "whole").glob("*.npy")):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_short_block_that_was_cut_is_made_again(tmp_path, small_blocks):
    header = make_header(layout="packed")
    grow_packed(tmp_path, header, 6)
    path = tmp_path / "patchblock_0000001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert grow_packed(tmp_path, header, 11) == list(range(4, 11))
    with FeatureStore.open(tmp_path, PACKED_LIST) as store:
        assert torch.equal(store.patches(4).descriptors[0], make_features(header, 4, PACKED_MAPS[4])[1].descriptors[0])


def test_packed_folders_grow_with_their_own_pictures_only(tmp_path, small_blocks):
    header = make_header(layout="packed")
    grow_packed(tmp_path, header, 6)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="its first 6 are not those in the blocks") as caught:
        FeatureWriter(tmp_path, make_list(("new.jpg", *PACKED_LIST.names[:10])), header)
    one_line(caught)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_packed_features_are_replaced(tmp_path, small_blocks):
    write_packed(tmp_path, make_header(layout="packed", dtype="int8"))
    with FeatureWriter(tmp_path, PACKED_LIST, make_header(), overwrite=True) as writer:
        assert len(writer.missing) == 11
    assert not list(tmp_path.glob("patchblock_*"))


def test_codes_are_kept_with_their_codec(tmp_path, small_blocks):
    """In both layouts; the codec is that of the header, and without the codec nothing is read."""
    trained = train_codec(torch.cat([make_features(make_header(), 99, (20, 20))[1].descriptors[0]]), 3)
    for layout in ("files", "packed"):
        header = make_header(dtype="pq3", codec_sha256=trained.sha256, layout=layout)
        folder = tmp_path / layout
        with FeatureWriter(folder, PACKED_LIST, header, trained=trained) as writer:
            for index in writer.missing:
                writer.write(index, *make_features(header, index, PACKED_MAPS[index]))
            writer.finish()
        with FeatureStore.open(folder, PACKED_LIST) as store:
            assert store.coded
            for index in range(11):
                picture = store.patches(index)
                given = make_features(header, index, PACKED_MAPS[index])[1].descriptors
                coded = coded_grids(picture.grids)
                decoded = [trained.decode(trained.encode(rows)) for rows in rows_to_code(given, picture.grids)]
                expected = trained.estimate(decoded, coded, picture.grids)
                assert all(map(torch.equal, picture.descriptors, expected))
                names = {f"patchfeats_psize{grid.patch_size}_{PACKED_LIST.feature_names[index]}.npy" for grid in coded}
                assert layout == "packed" or names <= files_of(folder)
            assert sum(store.picture_bytes(index) for index in range(11)) == sum(
                3 * len(grid) for size in PACKED_MAPS for grid in coded_grids(header.grids(size))
            )
            store.round_references()
            picture = store.patches(3)
            for rounded, descriptors in zip(picture.rounded, picture.descriptors, strict=True):
                assert torch.equal(rounded.levels, round_patches(descriptors, "reference").levels)
        for size in (2, 3):  # a selection has the same patches as all have
            chosen = replace(
                header, patch_sizes=(size,), strides=(dict(zip((2, 3), header.strides, strict=True))[size],)
            )
            with FeatureStore.open(folder, PACKED_LIST, chosen) as one, FeatureStore.open(folder, PACKED_LIST) as all_:
                for index in range(11):
                    assert torch.equal(one.patches(index).descriptors[0], all_.patches(index).descriptors[size - 2])
        with FeatureWriter(folder, PACKED_LIST, header, trained=trained) as writer:
            assert writer.missing == []
        with pytest.raises(ValueError, match="not that of the header"):
            FeatureWriter(folder, PACKED_LIST, header)
        (folder / "patchcodec.npz").unlink()
        with pytest.raises(UserError, match=r"patchcodec\.npz: is missing"):
            FeatureStore.open(folder, PACKED_LIST)
        with FeatureStore.open(folder, PACKED_LIST, replace(header, patch_sizes=(), strides=())) as store:
            assert len(store.global_) == 11  # what global descriptors do not need is not asked for
