"""Files made to do harm: nothing in them runs, nothing is read or written outside, nothing is believed unchecked."""

import io
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from patchnetvlad.checkpoints import read_checkpoint
from patchnetvlad.datasets.matlab import from_struct
from patchnetvlad.encoders.interface import EncoderGeometry
from patchnetvlad.errors import UserError
from patchnetvlad.ground_truth import read_ground_truth
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.ini import load_config
from patchnetvlad.store.feature_files import read_array
from patchnetvlad.store.feature_header import MANIFEST_NAME, ManifestEntry, StoreHeader, entry_line, header_line
from patchnetvlad.store.feature_header import read_manifest as read_folder


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
