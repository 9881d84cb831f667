"""Checkpoints: the published format and its oddities, and what is refused."""

import os
import pathlib
import re
import zipfile
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from patchnetvlad.checkpoints import build_model, read_checkpoint, write_checkpoint
from patchnetvlad.config import GlobalParams
from patchnetvlad.errors import UserError
from patchnetvlad.files import file_sha256
from patchnetvlad.model import PlaceModel


def small_model(num_pcs=6, **options):
    torch.manual_seed(0)
    return PlaceModel("rootsift", "patchnetvlad", 3, num_pcs, (2,), (1,), **options)


def params(**changes):
    return replace(GlobalParams(), backbone="rootsift", num_pcs=6, patch_sizes=(2,), strides=(1,), **changes)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "small_WPCA6.pth.tar"
    write_checkpoint(path, small_model(), epoch=3)
    return path


def test_round_trip(saved):
    checkpoint = read_checkpoint(saved)
    assert (checkpoint.num_clusters, checkpoint.num_pcs, checkpoint.backbone) == (3, 6, "rootsift")
    assert checkpoint.extras["epoch"] == 3
    assert checkpoint.sha256 == file_sha256(saved)
    model, pictures = build_model(checkpoint, params()), torch.rand(1, 3, 64, 64)
    assert not model.training
    torch.testing.assert_close(model.describe(pictures).global_, small_model().describe(pictures).global_)
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_published_oddities_are_read(tmp_path, saved):
    state = torch.load(saved, weights_only=True)["state_dict"]
    odd = {
        "pool.module.centroids": state["pool.centroids"],
        "pool.module.conv.weight": state["pool.conv.weight"],
        "WPCA.0.weight": state["WPCA.0.weight"].double(),
        "WPCA.0.bias": state["WPCA.0.bias"].double(),
    }
    path = tmp_path / "odd.pth.tar"
    torch.save(
        {
            "state_dict": odd,
            "backbone": "rootsift",
            "epoch": 7,
            "recalls": {1: np.float64(0.5), 5: np.float32(0.75)},
            "best_score": np.float64(0.75),
            "not_improved": np.int64(2),
            "parallel": np.bool_(False),
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        },
        path,
    )
    checkpoint = read_checkpoint(path)
    assert checkpoint.extras["best_score"] == 0.75
    assert build_model(checkpoint, params()).WPCA.weight.dtype == torch.float32


def test_arrays_and_defaultdicts_beside_the_tensors_are_read(tmp_path, saved):
    content = torch.load(saved, weights_only=True)
    recalls = defaultdict(list, {1: [np.float64(0.5)], 5: [0.75]})
    seen = {"f8": np.arange(6.0).reshape(2, 3), "f4": np.float32([[1]]), "i8": np.array([1, 2]), "b": np.array([True])}
    path = tmp_path / "arrays.pth.tar"
    torch.save({**content, "recalls": recalls, "counts": defaultdict(int), "seen": seen}, path)
    # NumPy 1 wrote the same under its old module names
    old = tmp_path / "old.pth.tar"
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(old, "w") as older:
        for name in new.namelist():
            older.writestr(name, new.read(name).replace(b"numpy._core.", b"numpy.core."))
    for file in (path, old):
        extras = read_checkpoint(file).extras
        assert extras["recalls"] == recalls and extras["counts"] == {}
        for key, array in seen.items():
            np.testing.assert_array_equal(extras["seen"][key], array)
            assert extras["seen"][key].dtype == array.dtype
        build_model(read_checkpoint(file), params())


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.array([1, "x", None], dtype=object), r"numpy\.dtypes\.ObjectDType"),
        (np.array(["text"]), r"numpy\.dtypes\.StrDType"),
        (np.zeros(2, dtype=[("place", np.float64)]), r"numpy\.dtypes\.VoidDType"),
        (pathlib.PurePosixPath("a"), r"pathlib\S*PurePosixPath"),
        (defaultdict(pathlib.PurePosixPath), r"pathlib\S*PurePosixPath"),
    ],
)
def test_others_are_refused_with_the_command_that_saves_the_tensors(tmp_path, monkeypatch, saved, value, what):
    content = torch.load(saved, weights_only=True)
    path = tmp_path / "foreign_WPCA6.pth.tar"
    torch.save({**content, "extra": value}, path)
    with pytest.raises(UserError, match=rf"foreign_WPCA6\.pth\.tar: holds a {what}; only tensors") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    command = re.search(r'python -c "(.*)"$', str(caught.value)).group(1)
    exec(command, {})
    plain = read_checkpoint(tmp_path / "plain_foreign_WPCA6.pth.tar")
    assert plain.num_pcs == 6 and not plain.extras


def test_an_array_of_objects_is_refused_however_it_is_pickled(tmp_path):
    class Objects:
        """An array of objects whose type is never built, as ordinary pickles do, but only named."""

        def __reduce__(self):
            make, arguments, _ = np.zeros(1).__reduce__()
            return make, arguments, (1, (1,), ObjectType(), False, [[1]])

    class ObjectType:
        def __reduce__(self):
            return np.dtype, ("O8", False, True)

    path = tmp_path / "objects.pth.tar"
    torch.save({"state_dict": {}, "extra": [Objects()]}, path)
    with pytest.raises(UserError, match=r"objects\.pth\.tar: holds a NumPy array of object"):
        read_checkpoint(path)


def test_code_inside_a_checkpoint_is_refused_and_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "harmful.pth.tar"
    torch.save({"state_dict": {}, "extra": Harmful()}, path)
    with pytest.raises(UserError, match=r"harmful\.pth\.tar: holds a \S*mkdir"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_damaged_files_are_one_line(tmp_path, content):
    path = tmp_path / "damaged.pth.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.pth\.tar: ") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"weights": torch.zeros(1)}, {"state_dict": {"a": 1}}])
def test_other_content_is_refused(tmp_path, content):
    path = tmp_path / "other.pth.tar"
    torch.save(content, path)
    with pytest.raises(UserError, match="no `state_dict` of tensors"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vgg16"}, "made for backbone = rootsift"),
        ({"num_pcs": 7}, "WPCA has 6 dimensions, .* says 7"),
        ({"num_pcs": 0}, "WPCA has 6 dimensions, .* says 0"),
        ({"pooling": "max"}, "has a NetVLAD layer"),
        ({"vladv2": True}, r"has no pool\.conv\.bias, so vladv2 must be False"),
    ],
)
def test_a_configuration_that_does_not_fit(saved, changes, message):
    with pytest.raises(UserError, match=message):
        build_model(read_checkpoint(saved), replace(params(), **changes))


def test_states_that_do_not_fit(tmp_path):
    good = small_model().state_dict()
    for name, change, message in [
        ("missing", lambda state: state.pop("pool.conv.weight"), r"lacks pool\.conv\.weight"),
        ("extra", lambda state: state.update({"pool.other": torch.zeros(1)}), r"unknown pool\.other"),
        (
            "shape",
            lambda state: state.update({"WPCA.0.bias": torch.zeros(9)}),
            r"WPCA\.0\.bias is 9.* needs 6",
        ),
        ("nan", lambda state: state.update({"WPCA.0.bias": torch.full((6,), torch.nan)}), "NaN"),
    ]:
        state = dict(good)
        change(state)
        path = tmp_path / f"{name}.pth.tar"
        torch.save({"state_dict": state, "backbone": "rootsift"}, path)
        with pytest.raises(UserError, match=message):
            build_model(read_checkpoint(path), params())


def test_half_precision_wpca_is_read_as_float32(tmp_path):
    path = tmp_path / "half.pth.tar"
    write_checkpoint(path, small_model(), half_precision=["WPCA"])
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {key for key, value in state.items() if value.dtype == torch.float16} == {"WPCA.0.weight"}
    assert build_model(read_checkpoint(path), params()).WPCA.weight.dtype == torch.float32


def test_vladv2_and_no_wpca(tmp_path):
    path = tmp_path / "v2.pth.tar"
    write_checkpoint(path, small_model(num_pcs=0, vladv2=True))
    model = build_model(read_checkpoint(path), replace(params(), vladv2=True, num_pcs=0))
    assert model.output_dims == 3 * 128
