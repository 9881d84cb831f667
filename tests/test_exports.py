"""ONNX, torch.export and hloc files of a tiny model, read back by the runtimes they are for."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import EXAMPLES, example_names, run, tiny_model

from patchnetvlad.errors import UserError
from patchnetvlad.export_commands import export_hloc, export_onnx
from patchnetvlad.hloc_export import write_hloc_descriptors
from patchnetvlad.images import read_image
from patchnetvlad.model import PlaceModel
from patchnetvlad.onnx_export import ExportableModel
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
        recognizer = PlaceRecognizer.load(overrides=[*options[3::2], *size])
        pictures = rgb(height, width)
        (expected,) = recognizer.describe(torch.from_numpy(pictures[0]))
        for batch in (1, 4):
            outputs = session.run(None, {"pictures": pictures.repeat(batch, axis=0)})
            for output, reference in zip(outputs, (expected.global_, *expected.patches.descriptors), strict=True):
                assert output.shape == (batch, *reference.shape)
                np.testing.assert_allclose(output[-1], reference.numpy(), atol=2e-4)


def test_torch_export_runs_without_this_package(tmp_path):
    options, path = tiny_model(tmp_path), tmp_path / "model.pt2"
    assert export_onnx([*options, "--output_path", str(path), "-q"]) == 0
    np.save(tmp_path / "picture.npy", rgb(120, 160))
    program = (
        "import sys, numpy as np, torch\n"
        "model = torch.export.load('model.pt2').module()\n"
        "outputs = model(torch.from_numpy(np.load('picture.npy')))\n"
        "assert 'patchnetvlad' not in sys.modules\n"
        "np.save('global.npy', outputs[0].detach().numpy())\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    recognizer = PlaceRecognizer.load(overrides=options[3::2])
    (expected,) = recognizer.describe(torch.from_numpy(rgb(120, 160)[0]))
    np.testing.assert_allclose(np.load(tmp_path / "global.npy")[0], expected.global_.numpy(), atol=2e-4)


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
    assert "must end in .onnx or .pt2" in capsys.readouterr().err
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
