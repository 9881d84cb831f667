"""ONNX, torch.export, TorchScript and hloc files of a tiny model, read back by the runtimes they are for."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import EXAMPLES, example_names, run, tiny_model

from patchnetvlad.commands.export import export_hloc, export_onnx
from patchnetvlad.errors import UserError
from patchnetvlad.export.hloc_features import write_hloc_descriptors
from patchnetvlad.export.onnx_model import ExportableModel, export_script, export_torch
from patchnetvlad.images import read_image
from patchnetvlad.model import PlaceModel
from patchnetvlad.recognizer import PlaceRecognizer

PICTURE = EXAMPLES / "queries" / "query03_0.jpg"


def rgb(height: int, width: int) -> np.ndarray:
    """The example picture, 1×3×H×W with values 0 to 1."""
    pixels = np.asarray(read_image(PICTURE).resize((width, height)), dtype=np.float32) / 255
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_describes_as_the_recognizer_does(tmp_path, capsys, dynamic):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    options, path = tiny_model(tmp_path), tmp_path / "exported" / "model.onnx"
    assert export_onnx([*options, "--output_path", str(path), *["--dynamic_size"] * dynamic, "-q"]) == 0
    printed = capsys.readouterr().out
    assert "1×3×120×160: differs from torch by" in printed and " ms, torch " in printed
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["global", "patches_2", "patches_3"]
    properties = session.get_modelmeta().custom_metadata_map
    assert (properties["patch_sizes"], properties["first_center"]) == ("2,3", "7.5")
    for height, width in [(120, 160), (96, 208)] if dynamic else [(120, 160)]:
        size = [f"feature_extract.imageresizeh={height}", f"feature_extract.imageresizew={width}"]
        size += [item.replace("extract", "match") for item in size]
        recognizer = PlaceRecognizer.load("rootsift.ini", overrides=[*options[3::2], *size])
        pictures = rgb(height, width)
        (expected,) = recognizer.describe(torch.from_numpy(pictures[0]))
        for batch in (1, 4):
            outputs = session.run(None, {"pictures": pictures.repeat(batch, axis=0)})
            for output, reference in zip(outputs, (expected.global_, *expected.patches.descriptors), strict=True):
                assert output.shape == (batch, *reference.shape)
                np.testing.assert_allclose(output[-1], reference.numpy(), atol=2e-4)


@pytest.mark.parametrize("load", ["torch.export.load('model.pt2').module()", "torch.jit.load('model.pt')"])
def test_torch_runs_its_files_without_this_package(tmp_path, load):
    options, path = tiny_model(tmp_path), tmp_path / load.split("'")[1]
    sizes = [(120, 160), (96, 208)]
    assert export_onnx([*options, "--output_path", str(path), "--dynamic_size", "-q"]) == 0
    for height, width in sizes:
        np.save(tmp_path / f"pictures_{height}.npy", rgb(height, width).repeat(3, axis=0))
    program = (
        f"import sys, numpy as np, torch\nmodel = {load}\n"
        "for height in (120, 96):\n"
        "    pictures = torch.from_numpy(np.load(f'pictures_{height}.npy'))\n"
        "    for count in (1, 3):\n"
        "        outputs = model(pictures[:count])\n"
        "        np.savez(f'{height}_{count}', *(output.detach().numpy() for output in outputs))\n"
        "assert 'patchnetvlad' not in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for height, width in sizes:
        own_size = [f"feature_extract.imageresizeh={height}", f"feature_extract.imageresizew={width}"]
        own_size += [item.replace("extract", "match") for item in own_size]
        recognizer = PlaceRecognizer.load("rootsift.ini", overrides=[*options[3::2], *own_size])
        (expected,) = recognizer.describe(torch.from_numpy(rgb(height, width)[0]))
        for count in (1, 3):
            with np.load(tmp_path / f"{height}_{count}.npz") as outputs:
                references = (expected.global_, *expected.patches.descriptors)
                for output, reference in zip(outputs.values(), references, strict=True):
                    assert output.shape == (count, *reference.shape)
                    np.testing.assert_allclose(output[-1], reference.numpy(), atol=2e-4)


@pytest.mark.parametrize(("export", "name"), [(export_torch, "model.pt2"), (export_script, "model.pt")])
def test_a_convolutional_encoder_is_exported_to_torch(tmp_path, export, name):
    torch.manual_seed(0)
    model = PlaceModel("vgg16", "patchnetvlad", 4, 8, (1,), (1,)).eval()
    checks = export(model, 48, 64, tmp_path / name, dynamic_size=True)
    assert [check.shape for check in checks] == [(1, 3, 48, 64), (3, 3, 48, 64), (2, 3, 96, 69)]


def test_a_torch_export_that_takes_one_size_only_is_said(tmp_path, capsys, monkeypatch):
    export, one_size = torch.export.export, ({0: torch.export.Dim.DYNAMIC},)
    monkeypatch.setattr("torch.export.export", lambda *given, **options: export(*given, dynamic_shapes=one_size))
    command = [*tiny_model(tmp_path), "--output_path", str(tmp_path / "model.pt2"), "-q", "--dynamic_size"]
    assert export_onnx(command) == 2
    assert "the export does not take pictures (2, 3, 168, 165)" in capsys.readouterr().err


def test_a_torch_export_of_one_size_refuses_another(tmp_path):
    path = tmp_path / "model.pt2"
    assert export_onnx([*tiny_model(tmp_path), "--output_path", str(path), "-q"]) == 0
    model = torch.export.load(path).module()
    assert model(torch.zeros(5, 3, 120, 160))[0].shape[0] == 5
    with pytest.raises((AssertionError, RuntimeError)):  # torch's versions differ
        model(torch.zeros(1, 3, 96, 208))


@pytest.mark.parametrize("pooling", ["patchnetvlad", "netvlad", "max", "avg"])
def test_the_graph_computes_what_the_model_does(pooling):
    torch.manual_seed(0)
    model = PlaceModel("rootsift", pooling, 6, 16, (1, 3), (2, 1)).eval()
    pictures = torch.rand(2, 3, 96, 128)
    normalised = (pictures - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    described = model.describe(normalised)
    with torch.no_grad():
        outputs = ExportableModel(model)(pictures)
    for output, expected in zip(outputs, (described.global_, *described.patches), strict=True):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def test_wrong_ending_and_no_size_are_refused(tmp_path, capsys):
    options = tiny_model(tmp_path)
    assert export_onnx([*options, "--output_path", str(tmp_path / "model.bin")]) == 2
    assert "must end in .onnx, .pt2, .pt" in capsys.readouterr().err
    own = [item for key in ("extract", "match") for item in ("--set", f"feature_{key}.imageresizew=0")]
    assert export_onnx([*options, *own, "--output_path", str(tmp_path / "model.onnx")]) == 2


def hloc_names(path: Path) -> list[str]:
    """Names in an HDF5 file as hloc lists them: the groups that hold data sets."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    names: list[str] = []

    def visit(_: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            names.append(node.parent.name.strip("/"))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return names


def test_hloc_gets_descriptors_and_pairs(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    options = tiny_model(tmp_path)
    queries, database = example_names("queries")[:2], example_names("database")[:5]
    results = run(options, EXAMPLES, tmp_path, queries, database, "--formats", "hloc")
    for kind in ("queries", "database"):
        source = ["--features_dir", str(tmp_path / kind), "--dataset_file_path", str(tmp_path / f"{kind}.txt")]
        assert export_hloc([*source, "--output_path", str(tmp_path / f"{kind}.h5")]) == 0
    assert hloc_names(tmp_path / "database.h5") == database
    # As hloc's pairs_from_retrieval does: the product of all descriptors, best first
    vectors = []
    for kind, names in (("queries", queries), ("database", database)):
        with h5py.File(tmp_path / f"{kind}.h5", "r") as file:
            vectors.append(np.stack([file[name]["global_descriptor"].__array__() for name in names]))
    ranking = np.argsort(-(vectors[0] @ vectors[1].T), axis=1)
    expected = [f"{query} {database[index]}" for query, row in zip(queries, ranking, strict=True) for index in row]
    assert (results / "NetVLAD_pairs_hloc.txt").read_text().splitlines() == expected


def test_names_that_hdf5_cannot_hold_are_refused(tmp_path):
    pytest.importorskip("h5py", reason="h5py is not installed")
    with pytest.raises(UserError, match="HDF5 has that name already"):
        write_hloc_descriptors(tmp_path / "a.h5", ["a/b.jpg", "a/b.jpg"], np.zeros((2, 4), dtype=np.float32))
    assert list(tmp_path.iterdir()) == []
