"""Two folders of pictures, one command: what it makes, what it makes anew, and what it refuses."""

import json
import shutil
import webbrowser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from patchnetvlad.commands.features import feature_match
from patchnetvlad.commands.recognize import recognize
from patchnetvlad.datasets.makers import MAKERS
from patchnetvlad.errors import UserError
from patchnetvlad.result_files import read_pairs

EXAMPLES = ROOT / "example_images"


def lay_out(folder: Path, database: int, name: str = "{:04}.jpg") -> tuple[Path, Path]:
    """Two drives past the same places."""
    drives = folder / "first", folder / "second"
    for drive, source, count in (
        (drives[0], "database/place{:02}_0.jpg", database),
        (drives[1], "queries/query{:02}_0.jpg", 2),
    ):
        drive.mkdir(exist_ok=True)
        for number in range(count):
            shutil.copy(EXAMPLES / source.format(number), drive / name.format(number))
    return drives


def options_of(drives: tuple[Path, Path], output: Path, small_model: list[str]) -> list[str]:
    return ["--database", str(drives[0]), "--queries", str(drives[1]), "--output_dir", str(output), *small_model]


def test_two_folders_and_later_more_pictures(small_model, tmp_path, capsys, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(opened.append(address)) or True)
    output = tmp_path / "out"
    options = options_of(lay_out(tmp_path, 3), output, small_model)
    assert recognize([*options, "--open"]) == 0
    printed = capsys.readouterr().out
    assert "positions: none" in printed and "first/0000.jpg (" in printed
    assert opened == [(output / "results/report.html").absolute().as_uri()]
    predictions = output / "results" / "PatchNetVLAD_predictions.txt"
    assert [ranking.query for ranking in read_pairs(predictions)] == ["second/0000.jpg", "second/0001.jpg"]
    assert not (output / "results/recalls.txt").exists()

    commands = [line for line in printed.splitlines() if line.startswith("$ python ")]
    assert [command.split()[2] for command in commands] == [
        "tools/make_dataset.py",
        *["feature_extract.py"] * 2,
        "feature_match.py",
    ]
    before = predictions.read_bytes()
    assert feature_match(commands[-1].split()[3:]) == 0  # each step can be repeated by its script
    assert predictions.read_bytes() == before

    lay_out(tmp_path, 5)
    old = (output / "features/first/patchfeats_psize2_0000.npy").stat()
    assert recognize([*options, "--frames", "0", "--radius", "1"]) == 0
    assert "2 queries against 5 pictures, a match within 1 frame" in capsys.readouterr().out
    assert (output / "features/first/patchfeats_psize2_0000.npy").stat() == old
    assert np.load(output / "features/first/globalfeats.npy").shape == (5, 32)
    assert json.loads((output / "results/recalls.json").read_text())["protocol"]["unit"] == "frames"


def test_drives_that_cannot_be_compared(small_model, tmp_path, capsys):
    drives = lay_out(tmp_path, 3)
    for (database, queries), more, said in (
        ((drives[0], drives[0]), [], "lies within the other"),
        ((tmp_path, drives[0]), [], "lies within the other"),
        ((drives[0], tmp_path / "absent"), [], "absent: no such folder"),
        (drives, ["--radius", "3"], "--radius: needs positions"),
        (drives, ["--frames", "--no_positions"], "not allowed with"),
        (drives, ["--pairs_csv", "absent.csv"], "absent.csv: no such file"),
    ):
        assert recognize([*options_of((database, queries), tmp_path / "out", small_model), *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def make(kind: str, root: Path, **options: object) -> tuple[list[str], list[float], list[float]]:
    """Names of the queries, and the first coordinates of queries and database."""
    (dataset,) = MAKERS[kind].make(root, queries="second", database="first", **options)
    assert dataset.queries.coordinates is not None and dataset.database.coordinates is not None
    coordinates = (side.coordinates[:, 0].tolist() for side in (dataset.queries, dataset.database))
    return list(dataset.queries.names), *coordinates


def test_positions_by_names_within_the_folders(tmp_path):
    blank(tmp_path / "first", ["1.png", "2.png", "extra.png"])
    blank(tmp_path / "second", ["q.png"])
    (tmp_path / "d.csv").write_text("name,easting,northing\n2.png,20,0\n1.png,10,0\n")
    (tmp_path / "q.csv").write_text("name,easting,northing\nq.png,12,0\n")
    (dataset,) = MAKERS["csv"].make(
        tmp_path,
        queries=str(tmp_path / "q.csv"),
        database=str(tmp_path / "d.csv"),
        query_folder="second",
        database_folder="first",
    )
    assert (dataset.queries.names, dataset.database.names) == (("second/q.png",), ("first/2.png", "first/1.png"))
    assert any("1 pictures of first stand in no row" in note and "extra.png" in note for note in dataset.notes)


def blank(folder: Path, names: list[str]) -> None:
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)


def test_a_shift_between_frames(tmp_path):
    blank(tmp_path / "first", ["f10.png", "f11.png"])
    blank(tmp_path / "second", ["g1.png", "g2.png", "g3.png"])
    assert make("frames", tmp_path, offset=9) == (
        ["second/g1.png", "second/g2.png", "second/g3.png"],
        [10, 11, 12],
        [10, 11],
    )


def test_pairs_by_name(tmp_path):
    blank(tmp_path / "first", [f"{number}.png" for number in range(8)])
    blank(tmp_path / "second", [f"q{number}.png" for number in range(5)])
    table = tmp_path / "pairs.csv"
    table.write_text("query,database\nsecond/q3.png,first/7.png\nq1.png,1.png\n")
    with pytest.raises(UserError, match=r"3 of 5 queries have no place by .*second/q0\.png"):
        make("pairs", tmp_path, pairs_csv=table)
    names, asked, shown = make("pairs", tmp_path, pairs_csv=table, incomplete="leave_out")
    assert (names, asked, shown) == (["second/q1.png", "second/q3.png"], [1, 7], list(range(8)))
    names, asked, _ = make("pairs", tmp_path, pairs_csv=table, interpolate=True, incomplete="leave_out")
    assert (names, asked) == (["second/q1.png", "second/q2.png", "second/q3.png"], [1, 4, 7])
    for text, said in (
        ("query,database\nq1.png,9.png\n", "line 2: database 9.png is no picture of first"),
        ("query,database\nq1.png,1.png\nq1.png,2.png\n", "stands in line 2 too"),
        ("query,database\n", "names no pair"),
        ("query,place\nq1.png,1.png\n", "has no column database"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=said):
            make("pairs", tmp_path, pairs_csv=table)
