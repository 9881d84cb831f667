"""Bad files of every kind, made by hand and generated: each is refused in one line that names the file, status 2."""

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from refusals import assert_refused
from tiny_run import tiny_model

from patchnetvlad.checkpoints import read_checkpoint, read_weights
from patchnetvlad.commands import command_line
from patchnetvlad.commands.features import feature_extract
from patchnetvlad.config import SECTIONS
from patchnetvlad.csv_table import read_table
from patchnetvlad.datasets.matlab import FIELDS, from_struct
from patchnetvlad.encoders.interface import EncoderGeometry
from patchnetvlad.ground_truth import read_ground_truth
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.images import read_image
from patchnetvlad.ini import load_config
from patchnetvlad.localization.poses import read_poses
from patchnetvlad.store.arrays.array_files import read_array
from patchnetvlad.store.manifest import MANIFEST_NAME, StoreHeader, entry_line, header_line, read_manifest
from patchnetvlad.store.manifest import ManifestEntry as Entry


class Bad(NamedTuple):
    """A file's name, its bytes, and what reads it."""

    label: str
    name: str
    content: bytes
    read: Callable[[Path], object]


def cut(label: str, name: str, whole: bytes, read: Callable[[Path], object], places: int = 10) -> Iterator[Bad]:
    """The file cut short at places spread over it."""
    for place in range(places):
        length = len(whole) * place // places
        yield Bad(f"{label}-cut-{place}", name, whole[:length], read)


def table(path: Path) -> object:
    found = read_table(path)
    return found.unique("key"), found.numbers(("lat", "latitude")), found.flags("pano"), found.whole_numbers("frame")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{key: np.asarray(value) for key, value in arrays.items()})  # type: ignore[arg-type]
    return file.getvalue()


def npy_claiming(header: str) -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind)
    return file.getvalue()


def ini_cases() -> Iterator[Bad]:
    for section, kind in SECTIONS.items():
        for item in fields(kind):
            if item.name in (
                "backbone",
                "patch_backbone",
                "matcher",
                "loss",
                "resumepath",
                "dataset_name",
                "pred_input_path",
                "index",
            ):
                continue  # any text
            if item.name in ("cities", "val_cities", "augmentation"):
                continue  # names, looked up where they are used
            for label, text in (("word", "?;?"), ("list", "1,,2"), ("empty", ""), ("blank", "1 2")):
                if item.name == "pretrained" or (label == "empty" and item.name in ("rerank_top", "cache_gb")):
                    continue  # any path; nothing means not given
                content = f"[{section}]\n{item.name} = {text}\n".encode()
                yield Bad(f"ini-{section}-{item.name}-{label}", "bad.ini", content, load_config)
    texts = {
        "no-section": b"threads = 4\n",
        "twice": b"[train]\nseed = 1\nseed = 2\n",
        "section-twice": b"[train]\n[train]\n",
        "unknown-section": b"[nothing]\nseed = 1\n",
        "default": b"[DEFAULT]\nseed = 1\n",
        "unknown-key": b"[train]\nsede = 1\n",
        "no-value": b"[train]\nseed\n",
        "utf16": "[train]\nseed = 1\n".encode("utf-16"),
        "binary": bytes(range(256)),
        "nul": b"[train]\nseed = 1\0\n",
        "inf": b"[train]\nlr = inf\n",
        "nan": b"[train]\nlr = nan\n",
        "negative": b"[train]\nseed = -1\n",
        "huge": b"[train]\nseed = " + b"9" * 5000 + b"\n",
    }
    for label, content in texts.items():
        yield Bad(f"ini-{label}", "bad.ini", content, load_config)


def text_cases() -> Iterator[Bad]:
    def read_list(path: Path) -> object:
        return read_image_list(path, path.parent)

    lists = {"empty": b"", "blank": b" \n\n", "utf16": "a.jpg\n".encode("utf-16"), "latin": b"\xe9t\xe9.jpg\n"}
    lists |= {"nul": b"a\0b.jpg\n", "picture": picture("JPEG"), "npy": npy(np.zeros(3))}
    for label, content in lists.items():
        yield Bad(f"list-{label}", "bad.txt", content, read_list)
    row = b"key,lat,pano,frame\n"
    tables = {"empty": b"", "short": row + b"a,1\n", "long": row + b"a,1,True,1,9\n", "word": row + b"a,x,True,1\n"}
    tables |= {"nan": row + b"a,nan,True,1\n", "inf": row + b"a,inf,True,1\n", "comma": b"key;lat\na;1,5\n"}
    tables |= {"flag": row + b"a,1,maybe,1\n", "frame": row + b"a,1,True,1.5\n", "no-key": row + b",1,True,1\n"}
    tables |= {"twice": row + b"a,1,True,1\na,1,True,1\n", "columns": b"key,key\n", "missing": b"key,lat\na,1\n"}
    tables |= {"utf16": row.decode().encode("utf-16"), "nul": row + b"a\0,1,True,1\n", "field": b"a" * 200_000}
    tables |= {"quote": row + b'"a,1,True,1\n', "frame-huge": row + b"a,1,True," + b"9" * 40 + b"\n"}
    for label, content in tables.items():
        yield Bad(f"csv-{label}", "bad.csv", content, table)


def pose_cases() -> Iterator[Bad]:
    good = b"1 0 0 0 1 2 3"
    lines = {"few": b"a.jpg 1 0 0\n", "word": b"a.jpg x 0 0 0 1 2 3\n", "zero": b"a.jpg 0 0 0 0 1 2 3\n"}
    lines |= {"nan": b"a.jpg nan 0 0 0 1 2 3\n", "twice": b"a " + good + b"\na " + good + b"\n"}
    lines |= {"inf": b"a.jpg 1 0 0 0 inf 2 3\n", "utf16": "a 1".encode("utf-16"), "many": b"a " + good + b" 4\n"}
    for label, content in lines.items():
        yield Bad(f"poses-{label}", "poses.txt", content, read_poses)
    colmap = {"few": b"1 1 0 0\n", "word": b"1 x 0 0 0 1 2 3 1 a.jpg\n", "zero": b"1 0 0 0 0 1 2 3 1 a.jpg\n"}
    colmap |= {"twice": b"1 1 0 0 0 1 2 3 1 a\n\n2 1 0 0 0 1 2 3 1 a\n\n", "nan": b"1 nan 0 0 0 1 2 3 1 a\n"}
    for label, content in colmap.items():
        yield Bad(f"colmap-{label}", "images.txt", content, read_poses)
    model = struct.pack("<Q", 1) + struct.pack("<i7di", 1, 1, 0, 0, 0, 1, 2, 3, 1) + b"a.jpg\0" + struct.pack("<Q", 0)
    yield from cut("colmap", "images.bin", model, read_poses)
    yield Bad("colmap-long", "images.bin", model + b"\0", read_poses)
    yield Bad("colmap-count", "images.bin", b"\xff" * 8 + model[8:], read_poses)
    yield Bad("colmap-points", "images.bin", model[:-8] + b"\xff" * 8, read_poses)

    def kapture(path: Path) -> object:
        return read_poses(path.parent.parent)

    rows = {"few": b"1, cam\n", "many": b"1, cam, a, b\n", "twice": b"1, c, a\n2, c, a\n", "binary": b"\xff\xfe\0"}
    for label, content in rows.items():
        yield Bad(f"kapture-{label}", "sensors/records_camera.txt", content, kapture)


def truth_cases() -> Iterator[Bad]:
    def read(path: Path) -> object:
        return read_ground_truth(path, 2, 3)

    good: dict[str, object] = {"utmQ": np.zeros((2, 2)), "utmDb": np.zeros((3, 2)), "posDistThr": 25.0}
    changes: dict[str, dict[str, object]] = {
        "rows": {"utmQ": np.zeros((4, 2))},
        "swapped": {"utmQ": np.zeros((3, 2)), "utmDb": np.zeros((2, 2))},
        "flat": {"utmQ": np.zeros(2)},
        "one-column": {"utmQ": np.zeros((2, 1))},
        "columns": {"utmQ": np.zeros((2, 3))},
        "nan": {"utmDb": np.full((3, 2), np.nan)},
        "inf": {"utmDb": np.full((3, 2), np.inf)},
        "text": {"utmQ": np.array([["a", "b"]] * 2)},
        "complex": {"utmQ": np.zeros((2, 2), complex)},
        "objects": {"utmQ": np.array([[None, 1]] * 2, object)},
        "negative": {"posDistThr": -1.0},
        "radius-nan": {"posDistThr": np.nan},
        "radius-text": {"posDistThr": "far"},
        "radii": {"posDistThr": np.zeros(2)},
        "unit-object": {"unit": np.array({"m": 1}, object)},
        "list-object": {"listQ": np.array({"m": 1}, object)},
        "other-list": {},
    }
    for label, change in changes.items():
        if label != "other-list":
            yield Bad(f"truth-{label}", "bad.npz", npz(**{**good, **change}), read)
    for key in good:
        yield Bad(f"truth-no-{key}", "bad.npz", npz(**{k: v for k, v in good.items() if k != key}), read)
    yield Bad("truth-array", "bad.npz", npy(np.zeros((2, 2))), read)
    yield Bad("truth-pickle", "bad.npz", pickle.dumps([1]), read)
    yield from cut("truth", "bad.npz", npz(**good), read)


def array_cases() -> Iterator[Bad]:
    def read(path: Path) -> object:
        return read_array(path, lambda info: None)

    arrays = {
        "flat": np.zeros(3),
        "cube": np.zeros((2, 2, 2)),
        "text": np.array([["a"]]),
        "bool": np.ones((2, 2), bool),
    }
    arrays |= {
        "nan": np.array([[np.nan]]),
        "inf": np.array([[np.inf]], np.float16),
        "complex": np.ones((1, 1), complex),
    }
    arrays |= {
        "objects": np.array([[None]], object),
        "dates": np.zeros((1, 1), "M8[s]"),
        "struct": np.zeros((1, 1), "f4,i4"),
    }
    for label, array in arrays.items():
        yield Bad(f"npy-{label}", "bad.npy", npy(array), read)
    yield from cut("npy", "bad.npy", npy(np.ones((20, 20), np.float32)), read)
    yield Bad("npy-long", "bad.npy", npy(np.ones((2, 2))) + b"x", read)
    for label, header in {
        "petabytes": "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 100000000), }",
        "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -4), }",
        "brackets": "{'descr': '<f4', 'fortran_order': False, 'shape': (((((",
        "code": "__import__('os').system('true')",
        "quote": "{'descr': '''",
        "nested": "(" * 3000,
    }.items():
        yield Bad(f"npy-header-{label}", "bad.npy", npy_claiming(header), read)


def manifest_cases() -> Iterator[Bad]:
    header = StoreHeader("0" * 64, {"pooling": "netvlad"}, 8, (), (), EncoderGeometry(1, 1, 0), "float32")
    first = header_line(header, ("a", "b"), "list.txt")
    record = json.loads(first)
    entry = entry_line(Entry(0, "a", "a", None, ()))

    def read(path: Path) -> object:
        return read_manifest(path.parent)

    for key in ("format", "version", "num_pictures", "names_sha256", "settings", "num_dims", "patch_sizes", "geometry"):
        left = {k: v for k, v in record.items() if k != key}
        yield Bad(f"manifest-no-{key}", MANIFEST_NAME, json.dumps(left).encode() + b"\n", read)
    wrong = {"num_pictures": ["x", float("inf"), None], "version": [99, "x", float("inf")], "dtype": ["float1"]}
    wrong |= {"patch_sizes": [5, ["x"], [float("inf")]], "settings": [3], "geometry": [{"x": 1}, 3], "layout": ["?"]}
    for key, values in wrong.items():
        for value in values:
            changed = json.dumps({**record, key: value}).encode() + b"\n"
            yield Bad(f"manifest-{key}-{value}", MANIFEST_NAME, changed, read)
    for label, content in {"list": b"[]\n", "text": b"hello\n", "empty": b"", "nested": b"[" * 100_000 + b"\n"}.items():
        yield Bad(f"manifest-{label}", MANIFEST_NAME, content, read)
    for label, line in {
        "index": entry.replace(b'"index": 0', b'"index": 7'),
        "infinite": entry.replace(b'"index": 0', b'"index": Infinity'),
        "path": entry.replace(b'"feature_name": "a"', b'"feature_name": "../a"'),
        "text": b"hello\n",
        "nested": b"[" * 100_000 + b"\n",
        "scales": entry.replace(b"}", b', "scales": 3}'),
    }.items():
        yield Bad(f"manifest-line-{label}", MANIFEST_NAME, first + line + entry, read)


def checkpoint_cases() -> Iterator[Bad]:
    def saved(content: object) -> bytes:
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    yield from cut("checkpoint", "bad.pth.tar", saved({"state_dict": {"a": torch.ones(400)}}), read_checkpoint)
    contents: dict[str, object] = {"list": [1], "text": "x", "no-state": {"a": 1}, "state-list": {"state_dict": [1]}}
    contents |= {"path": {"state_dict": {"a": Path("x")}}, "empty": {"state_dict": {}}, "number": 3}
    for label, content in contents.items():
        yield Bad(f"checkpoint-{label}", "bad.pth.tar", saved(content), read_checkpoint)
    yield Bad("checkpoint-lfs", "bad.pth.tar", b"version https://git-lfs.github.com/spec/v1\n", read_checkpoint)
    yield Bad("checkpoint-html", "bad.pth.tar", b"<!DOCTYPE html><html></html>", read_checkpoint)
    for label, content in {"text": b"hello", "length": b"\xff" * 16, "short": struct.pack("<Q", 90) + b"{}"}.items():
        yield Bad(f"safetensors-{label}", "bad.safetensors", content, read_weights)


def mat_cases() -> Iterator[Bad]:
    def read(path: Path) -> object:
        return from_struct(path, "x", Path("a"), Path("b"), None, expected_set="test")

    def names(*given: str) -> np.ndarray:
        return np.array([[name] for name in given], object)

    good: dict[str, object] = {"whichSet": "test", "dbImageFns": names("a", "b"), "utmDb": np.ones((2, 2))}
    good |= {"qImageFns": names("q"), "utmQ": np.ones((2, 1)), "numImages": 2, "numQueries": 1, "posDistThr": 25}
    good |= {"posDistSqThr": 625, "nonTrivPosDistSqThr": 100}

    def saved(**content: object) -> bytes:
        file = io.BytesIO()
        scipy.io.savemat(file, content)
        return file.getvalue()

    for field in FIELDS:
        yield Bad(f"mat-no-{field}", "bad.mat", saved(dbStruct={k: v for k, v in good.items() if k != field}), read)
    for label, change in {
        "split": {"whichSet": "val"},
        "count": {"numImages": 5},
        "count-text": {"numImages": "x"},
        "coordinates": {"utmDb": np.ones((3, 2))},
        "nan": {"utmDb": np.full((2, 2), np.nan)},
        "square": {"posDistSqThr": 25},
        "names": {"qImageFns": 3},
        "name-cells": {"qImageFns": np.array([[1.5]], object)},
        "text": {"utmQ": "here"},
    }.items():
        yield Bad(f"mat-{label}", "bad.mat", saved(dbStruct={**good, **change}), read)
    yield Bad("mat-other", "bad.mat", saved(x=1), read)
    yield Bad("mat-number", "bad.mat", saved(dbStruct=1), read)
    yield Bad("mat-hdf5", "bad.mat", b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\x02IM" + b"\x89HDF\r\n\x1a\n", read)
    yield from cut("mat", "bad.mat", saved(dbStruct=good), read, 20)


def picture_cases() -> Iterator[Bad]:
    for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"):
        yield from cut(f"picture-{kind}", f"bad.{kind.lower()}", picture(kind), read_image, 8)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (60_000, 2_000_000_000):
        size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
        )
        yield Bad(f"picture-bomb-{side}", "bomb.png", bomb, read_image)
    heic = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
    yield Bad("picture-heic", "bad.heic", heic, read_image)
    for label, content in {
        "text": b"hello",
        "html": b"<html>",
        "svg": b"<svg xmlns='x'/>",
        "zero": bytes(5000),
    }.items():
        yield Bad(f"picture-{label}", "bad.jpg", content, read_image)


# The words that tell where in a file of lines the mistake is; a file that is wrong as a whole has no such place.
PLACES = {
    "csv-short": "line 2",
    "csv-long": "line 2",
    "csv-word": "line 2",
    "csv-nan": "line 2",
    "csv-inf": "line 2",
    "csv-flag": "line 2",
    "csv-frame": "line 2",
    "csv-no-key": "line 2",
    "csv-twice": "line 3",
    "csv-frame-huge": "line 2",
    "poses-few": "line 1",
    "poses-word": "line 1",
    "poses-zero": "line 1",
    "poses-nan": "line 1",
    "poses-inf": "line 1",
    "poses-many": "line 1",
    "colmap-few": "line 1",
    "colmap-word": "line 1",
    "colmap-zero": "line 1",
    "colmap-nan": "line 1",
    "kapture-few": "line 1",
    "kapture-many": "line 1",
    "manifest-line-index": "line 2",
    "manifest-line-infinite": "line 2",
    "manifest-line-path": "line 2",
    "manifest-line-text": "line 2",
    "manifest-line-nested": "line 2",
    "manifest-line-scales": "line 2",
    "ini-unknown-key": "sede",
    "ini-unknown-section": "nothing",
    "ini-inf": "lr",
    "ini-nan": "lr",
    "ini-negative": "seed",
    "ini-huge": "seed",
    "truth-nan": "utmDb",
    "truth-text": "utmQ",
    "truth-no-utmQ": "utmQ",
    "truth-no-utmDb": "utmDb",
    "truth-no-posDistThr": "posDistThr",
}


def place_of(case: Bad) -> list[str]:
    """What must be named beside the file: line, section and key, or array."""
    kind, _, rest = case.label.partition("-")
    section = next((name for name in SECTIONS if rest.startswith(f"{name}-")), None)
    if kind == "ini" and section:
        return [f"[{section}]", rest.removeprefix(f"{section}-").rpartition("-")[0]]
    return [PLACES[case.label]] if case.label in PLACES else []


MAKERS = (ini_cases, text_cases, pose_cases, truth_cases, array_cases, manifest_cases, checkpoint_cases, mat_cases)
CASES = [case for maker in (*MAKERS, picture_cases) for case in maker()]


def test_there_are_many_distinct_cases() -> None:
    assert len({(case.name, case.content) for case in CASES}) >= 250


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_bad_file_is_refused_in_one_line(case: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / case.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case.content)
    before = set(tmp_path.rglob("*"))
    parser = command_line.Parser("Read a file.", "read.py")

    def command(args: object) -> None:
        case.read(path)

    status = command_line.run(parser, command, ["-q"])
    assert_refused(status, capsys.readouterr().err, path.name, *place_of(case))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"nowhere.jpg\n", b"bad.jpg\n"], ids=repr)
def test_refused_extraction_leaves_no_folder(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tiny_model(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(picture("JPEG")[:200])
    (tmp_path / "list.txt").write_bytes(content)
    places = ["--dataset_root_dir", str(tmp_path), "--dataset_file_path", str(tmp_path / "list.txt")]
    assert feature_extract([*options, *places, "--output_features_dir", str(tmp_path / "out"), "-q", "--nocuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
