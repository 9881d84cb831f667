"""The whole chain from the shell: known results beside measured ones, cities joined, what is missing named."""

import json
import runpy
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from patchnetvlad import paths
from patchnetvlad.commands.datasets import measure, reproduce
from patchnetvlad.commands.features import feature_match
from patchnetvlad.datasets import benchmark_files
from patchnetvlad.datasets.known_results import BENCHMARKS, Benchmark, Known, ListPair
from patchnetvlad.datasets.reproduction import compare
from patchnetvlad.errors import UserError
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.judging import judge
from patchnetvlad.judging import measure as measure_judged

EXAMPLES = ROOT / "example_images"


def settings(small_model) -> list[str]:
    """The small model's options as overrides, which a known result's configuration takes too."""
    return small_model[small_model.index("--nocuda") :]


@pytest.fixture(scope="module")
def cities(tmp_path_factory) -> Path:
    """The example places as two cities with lists of their own below one root."""
    root = tmp_path_factory.mktemp("cities")
    (root / "pictures").symlink_to(EXAMPLES)
    truth = np.load(ROOT / "dataset_gt_files" / "example.npz")
    lists = {
        part: read_image_list(ROOT / "dataset_imagenames" / f"example_imageNames_{part}.txt", EXAMPLES).names
        for part in ("query", "index")
    }
    for city, first in (("north", 0), ("south", 1)):
        arrays = {"posDistThr": truth["posDistThr"]}
        for part, key in (("query", "utmQ"), ("index", "utmDb")):
            rows = range(len(lists[part]))[first::2]
            names = "".join(f"pictures/{lists[part][row]}\n" for row in rows)
            (root / f"{city}_imageNames_{part}.txt").write_text(names)
            arrays[key] = truth[key][list(rows)]
        np.savez(root / f"{city}.npz", **arrays)
    return root


def test_two_cities_against_a_known_result(cities, small_model, tmp_path, monkeypatch, capsys):
    known = (
        Known("PatchNetVLAD", {1: 0.0, 10: 50.0}, "a band that holds", (0.0, 100.0)),
        Known("PatchNetVLAD", {1: 100.0}, "no band"),
    )
    list_pairs = tuple(ListPair(city, city) for city in ("north", "south"))
    monkeypatch.setitem(BENCHMARKS, "corridor", Benchmark("rootsift.ini", list_pairs, known, "nowhere"))
    options = ["corridor", "--dataset_root_dir", str(cities), "--output_dir", str(tmp_path), *settings(small_model)]
    assert reproduce([*options, "--estimate_only"]) == 0
    printed = capsys.readouterr().out
    assert "GB on disk" in printed and "of memory" in printed and not (tmp_path / "features").exists()
    assert reproduce(options) == 0
    printed = capsys.readouterr().out
    assert "18 queries against" in printed and "% interval" in printed and "passed" in printed
    record = json.loads((tmp_path / "results" / "reproduction.json").read_text())
    assert [one["passed"] for one in record["known"]] == [True, True, None]
    parts_found = [
        json.loads((tmp_path / "results" / city / "recalls.json").read_text()) for city in ("north", "south")
    ]
    found = sum(
        part["protocol"]["queries"] * part["recalls"]["PatchNetVLAD"]["all_queries"]["1"] for part in parts_found
    )
    assert record["recalls"]["PatchNetVLAD"]["all_queries"]["1"] == pytest.approx(found / 18)
    predictions = (tmp_path / "results" / "predictions_msls.txt").read_text().splitlines()
    assert len(predictions) == 18 and len({len(line.split()) for line in predictions}) == 1
    # again: what is described stays, the joined predictions are not doubled; a band that does not hold fails
    failing = Benchmark("rootsift.ini", list_pairs, (Known("NetVLAD", {1: -5.0}, "impossible", (1.0, 1.0)),), "nowhere")
    monkeypatch.setitem(BENCHMARKS, "corridor", failing)
    assert reproduce(options) == 1
    assert "FAILED" in capsys.readouterr().out
    # the same file straight from the matching runs
    for city in ("north", "south"):
        matching = [f"--{part}_file_path={cities / f'{city}_imageNames_{part}.txt'}" for part in ("query", "index")]
        matching += [
            f"--{part}_input_features_dir={tmp_path / 'features' / f'{city}_{part}'}" for part in ("query", "index")
        ]
        matching += ["--dataset_root_dir", str(cities), "--result_save_folder", str(tmp_path / "again" / city)]
        assert feature_match([*small_model, *matching, "--msls_predictions", str(tmp_path / "again" / "msls.txt")]) == 0
    assert (tmp_path / "again" / "msls.txt").read_text().splitlines() == predictions
    capsys.readouterr()
    # the same runs joined by the measuring tool
    folders = [f"{city}={tmp_path / 'results' / city}" for city in ("north", "south")]
    assert measure(["-q", *folders, "--n_values", "1", "10", "--json", str(tmp_path / "joined.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("all 2 joined, each searched in its own database: north, south")
    joined = json.loads((tmp_path / "joined.json").read_text())
    assert joined["recalls"]["PatchNetVLAD"]["all_queries"]["1"] == pytest.approx(found / 18)
    assert set(joined["parts"]) == {"north", "south"} and joined["protocol"]["queries"] == 18


def test_predictions_of_another_method(tmp_path, capsys):
    queries, index = (ROOT / "dataset_imagenames" / f"example_imageNames_{part}.txt" for part in ("query", "index"))
    with np.load(ROOT / "dataset_gt_files" / "example.npz") as truth:
        distances = np.linalg.norm(truth["utmQ"][:, None] - truth["utmDb"][None], axis=2)
    np.save(tmp_path / "oracle.npy", np.argsort(distances, axis=1)[:, :5])
    np.save(tmp_path / "worst.npy", np.argsort(-distances, axis=1)[:, :5])
    options = ["--query_file_path", str(queries), "--index_file_path", str(index), "--ground_truth_path", "example.npz"]
    given = ["--predictions", f"oracle={tmp_path / 'oracle.npy'}", str(tmp_path / "worst.npy"), "--n_values", "1"]
    assert measure(["-q", *given, *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["oracle", "100.0"] in lines and ["worst.npy", "0.0"] in lines
    assert measure(["-q", *given]) == 2
    assert "--predictions: needs --query_file_path" in capsys.readouterr().err
    assert measure(["-q"]) == 2 and measure(["-q", str(tmp_path)]) == 2
    assert "judged.npz: cannot be read" in capsys.readouterr().err


def test_what_is_missing_is_all_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_files, "find_file", lambda *_: None)
    monkeypatch.setattr(paths, "find_checkpoint", lambda *_: None)
    for name in ("pitts30k", "tokyo247", "msls_val", "nordland"):
        assert reproduce([name, "--dataset_root_dir", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name}: missing data: " in line and "get it: " in line
        assert "weights: " in line and "download_models.py --models" in line
    assert reproduce(["corridor", "--dataset_root_dir", str(tmp_path)]) == 2
    assert "no corridor_imageNames_query.txt" in capsys.readouterr().err


def test_lists_are_made_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_files, "find_file", lambda *a: None)
    for season in ("winter", "summer"):
        for frame in range(3):
            path = tmp_path / season / f"images-{frame:05}.png"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    weights = tmp_path / "w512.pth.tar"
    weights.touch()
    overrides = [f"global_params.resumepath={tmp_path / 'w'}", "global_params.num_pcs=512"]
    absent = [f"global_params.resumepath={tmp_path / 'absent'}", overrides[1]]
    with pytest.raises(UserError, match=r"nordland: missing weights: .*absent512"):
        benchmark_files.prepare("nordland", tmp_path, tmp_path / "work", None, absent)
    assert not (tmp_path / "work").exists()
    config, (files,) = benchmark_files.prepare("nordland", tmp_path, tmp_path / "work", None, overrides)
    assert files.queries.names == tuple(f"winter/images-{frame:05}.png" for frame in range(3))
    assert files.ground_truth == tmp_path / "work" / "lists" / "nordland.npz" and config.global_params.num_pcs == 512


def test_bands_on_paper():
    measures = {"NetVLAD": measure_judged(judge(np.array([[0], [1]]), [np.array([0]), np.array([0])]), (1,))}
    known = [Known("NetVLAD", {1: value, 5: 3.0}, "x", (1.0, 2.0)) for value in (48.0, 51.0, 47.9, 51.1)]
    found = compare([*known, Known("PatchNetVLAD", {1: 50.0}, "x")], measures)
    assert [(one.known.recalls[1], one.measured, one.passed) for one in found] == [
        (48.0, 50.0, True),
        (51.0, 50.0, True),
        (47.9, 50.0, False),
        (51.1, 50.0, False),
    ]


def test_every_script_is_installed_under_its_name(monkeypatch):
    described = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: described.update(settings))
    runpy.run_path(str(ROOT / "setup.py"))
    installed = dict(line.split(" = ") for line in described["entry_points"]["console_scripts"])
    scripts = [*(ROOT / name for name in described["scripts"]), *(ROOT / "tools").glob("*.py")]
    for script in scripts:
        module, _, name = installed.pop(f"patchnetvlad-{script.stem.replace('_', '-')}").partition(":")
        assert name == script.stem and callable(getattr(import_module(module), name))
        assert f"from {module} import {name}\n" in script.read_text()
    assert not installed
