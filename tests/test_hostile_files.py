"""Files made to do harm: nothing in them runs, nothing is read or written outside, nothing is believed unchecked."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from refusals import assert_refused
from tiny_run import EXAMPLES, example_names, tiny_model

from patchnetvlad.checkpoints import read_checkpoint
from patchnetvlad.commands.features import feature_extract
from patchnetvlad.datasets.matlab import from_struct
from patchnetvlad.encoders.interface import EncoderGeometry
from patchnetvlad.errors import UserError
from patchnetvlad.ground_truth import read_ground_truth
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.ini import load_config
from patchnetvlad.mapillary import read_side
from patchnetvlad.store.arrays.array_files import read_array
from patchnetvlad.store.manifest import MANIFEST_NAME, ManifestEntry, StoreHeader, entry_line, header_line
from patchnetvlad.store.manifest import read_manifest as read_folder
from patchnetvlad.store.reading.feature_store import FeatureStore


class Payload:
    """Unpickled, it makes a folder: that is how the tests see whether it ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


def test_the_payload_would_run(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.is_dir()


def test_pickle_in_a_checkpoint(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "a.pth.tar"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": Payload(mark)}, path)
    with pytest.raises(UserError, match=r"a\.pth\.tar"):
        read_checkpoint(path)
    assert not mark.exists()


def test_pickle_in_an_old_checkpoint(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "a.pth.tar"
    torch.save({"state_dict": Payload(mark)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"a\.pth\.tar"):
        read_checkpoint(path)
    assert not mark.exists()


def test_pickle_alone_in_place_of_a_checkpoint(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "a.pth.tar"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match=r"a\.pth\.tar"):
        read_checkpoint(path)
    assert not mark.exists()


def test_pickle_in_a_feature_array(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([[Payload(mark)]], object))
    with pytest.raises(UserError, match=r"a\.npy"):
        read_array(path, lambda info: None)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["utmQ", "unit"])
def test_pickle_in_a_ground_truth(key: str, tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {"utmQ": np.zeros((2, 2)), "utmDb": np.zeros((2, 2)), "posDistThr": np.array(1.0)}
    np.savez(path, **{**arrays, key: np.array([Payload(mark)], object)})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a\.npz"):
        read_ground_truth(path, 2, 2)
    assert not mark.exists()


def test_pickle_in_place_of_a_struct(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match=r"a\.mat"):
        from_struct(path, "a", Path(), Path(), None)
    scipy.io.savemat(path, {"dbStruct": str(mark)})
    with pytest.raises(UserError, match=r"a\.mat"):
        from_struct(path, "a", Path(), Path(), None)
    assert not mark.exists()


def test_names_in_a_list_that_lead_out_make_no_path_of_a_feature_file(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("../../etc/passwd\n/etc/passwd\n..\n..\\..\\a\n", encoding="utf-8")
    listed = read_image_list(path, tmp_path)
    for name in listed.feature_names:
        assert not {"/", "\\"} & set(name)
        assert (tmp_path / f"patch_{name}.npy").resolve().parent == tmp_path.resolve()


def header() -> StoreHeader:
    return StoreHeader("0" * 64, {}, 8, (), (), EncoderGeometry(1, 1, 0))


def test_manifest_whose_feature_name_leads_out(tmp_path: Path) -> None:
    lines = [entry_line(ManifestEntry(row, name, name, None, ())) for row, name in enumerate(("../../a", "b"))]
    (tmp_path / MANIFEST_NAME).write_bytes(header_line(header(), ("../../a", "b"), "l") + b"".join(lines))
    with pytest.raises(UserError, match="line 2"):
        read_folder(tmp_path)


def test_manifest_that_claims_petabytes_costs_no_memory(tmp_path: Path) -> None:
    record = json.loads(header_line(header(), ("a",), "l")) | {"num_pictures": 10**15, "num_dims": 10**6}
    (tmp_path / MANIFEST_NAME).write_bytes(json.dumps(record).encode() + b"\n")
    found = read_folder(tmp_path)
    assert found is not None and not found.entries


def test_array_that_claims_petabytes(tmp_path: Path) -> None:
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000), }\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    with pytest.raises(UserError, match="its header says"):
        read_array(path, lambda info: None)


def test_ini_whose_values_would_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    path = tmp_path / "a.ini"
    path.write_text("[global_params]\nresumepath = %(SECRET)s${SECRET}\n", encoding="utf-8")
    assert load_config(path).global_params.resumepath == "%(SECRET)s${SECRET}"


def test_array_header_that_is_code(tmp_path: Path, mark: Path) -> None:
    text = f"__import__('os').mkdir({str(mark)!r})\n".encode()
    file = io.BytesIO(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    path = tmp_path / "a.npy"
    path.write_bytes(file.getvalue())
    with pytest.raises(UserError, match=r"a\.npy"):
        read_array(path, lambda info: None)
    assert not mark.exists()


def test_opening_a_folder_that_claims_petabytes(tmp_path: Path) -> None:
    record = json.loads(header_line(header(), ("a",), "l")) | {"num_pictures": 10**15, "num_dims": 10**6}
    (tmp_path / MANIFEST_NAME).write_bytes(json.dumps(record).encode() + b"\n")
    np.save(tmp_path / "globalfeats.npy", np.zeros((1, 8), np.float32))
    (tmp_path / "list.txt").write_text("a\n")
    with pytest.raises(UserError, match=str(tmp_path)):
        FeatureStore.open(tmp_path, read_image_list(tmp_path / "list.txt", tmp_path))


@pytest.mark.parametrize("key", ["../../../../outside", "/etc/passwd", "..\\..\\outside"])
def test_keys_of_a_table_that_lead_out(key: str, msls: Path, tmp_path: Path) -> None:
    shutil.copytree(msls / "train_val" / "london", tmp_path / "train_val" / "london")
    for path in (tmp_path / "train_val" / "london" / "query").glob("*.csv"):
        lines = path.read_text().splitlines()
        column = lines[0].split(",").index("key") if "key" in lines[0].split(",") else None
        if column is not None:
            cells = lines[1].split(",")
            cells[column] = key
            path.write_text("\n".join([lines[0], ",".join(cells), *lines[2:], ""]))
    with pytest.raises(UserError, match=r"line 2: key .*: expected a plain name"):
        read_side(tmp_path, "london", "query")


def with_member(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"harm")


@pytest.mark.parametrize("name", ["../outside.npy", "/tmp/outside.npy", "a/../../outside.npy"])
def test_archives_whose_names_lead_out(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    np.savez(folder / "truth.npz", utmQ=np.zeros((2, 2)), utmDb=np.zeros((2, 2)), posDistThr=1.0)
    torch.save({"state_dict": {"a": torch.ones(2)}}, folder / "a.pth.tar")
    for file in ("truth.npz", "a.pth.tar"):
        with_member(folder / file, name)
    assert len(read_ground_truth(folder / "truth.npz", 2, 2).utm_query) == 2  # what was not asked for is not unpacked
    try:
        read_checkpoint(folder / "a.pth.tar")
    except UserError as error:
        assert "a.pth.tar" in str(error)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.pth.tar", "in", "side", "truth.npz"]
    assert not Path("/tmp/outside.npy").exists()


@pytest.mark.parametrize("name", ["manifest.jsonl", "globalfeats.npy", "globalfeats.npy.partial"])
def test_links_out_of_the_feature_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tiny_model(tmp_path)
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    names = example_names("database")
    places = ["--dataset_root_dir", str(EXAMPLES), "--dataset_file_path", str(listed)]
    command = [*options, *places, "--output_features_dir", str(out), "-q", "--nocuda"]
    listed.write_text(f"{names[0]}\n")
    assert feature_extract(command) == 0
    outside = tmp_path / "outside"
    (out / name.removesuffix(".partial")).replace(outside)
    (out / name).symlink_to(outside)
    before = outside.read_bytes()
    listed.write_text(f"{names[0]}\n{names[1]}\n")
    assert_refused(feature_extract(command), capsys.readouterr().err, name, "symbolic link")
    assert outside.read_bytes() == before
    assert feature_extract([*command, "--overwrite"]) == 0
    assert outside.read_bytes() == before and not (out / name.removesuffix(".partial")).is_symlink()


def test_a_linked_patch_file_is_replaced_not_followed(tmp_path: Path) -> None:
    options = tiny_model(tmp_path)
    (tmp_path / "list.txt").write_text(f"{example_names('database')[0]}\n")
    places = ["--dataset_root_dir", str(EXAMPLES), "--dataset_file_path", str(tmp_path / "list.txt")]
    out, outside = tmp_path / "out", tmp_path / "outside"
    command = [*options, *places, "--output_features_dir", str(out), "-q", "--nocuda"]
    assert feature_extract(command) == 0
    patches = min(out.glob("patch*.npy"))
    whole = patches.read_bytes()
    outside.write_bytes(b"a secret")
    patches.unlink()
    patches.symlink_to(outside)
    assert feature_extract([*command, "--overwrite"]) == 0
    assert outside.read_bytes() == b"a secret"
    assert not patches.is_symlink() and patches.read_bytes() == whole
