"""Two folders of pictures, one command: what it makes, what it makes anew, and what it refuses."""

import json
import re
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
    results = output / "results" / "second_in_first"
    assert opened == [(results / "report.html").absolute().as_uri()]
    predictions = results / "PatchNetVLAD_predictions.txt"
    assert [ranking.query for ranking in read_pairs(predictions)] == ["second/0000.jpg", "second/0001.jpg"]
    assert not (results / "recalls.txt").exists()

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
    assert json.loads((results / "recalls.json").read_text())["protocol"]["unit"] == "frames"
    assert recognize([*options, "--no_positions"]) == 0  # what was measured before is not of these rankings
    assert not list(results.glob("recalls.*")) and not (results / "judged.npz").exists()


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_queries_keep_results_of_their_own(small_model, tmp_path, capsys):
    first, second = lay_out(tmp_path, 3)
    output = tmp_path / "out"
    assert recognize(options_of((first, second), output, small_model)) == 0
    before = files_of(output / "results") | files_of(output / "lists") | files_of(output / "features" / "first")
    blank(tmp_path / "third", ["a.png"])
    capsys.readouterr()
    assert recognize(options_of((first, tmp_path / "third"), output, small_model)) == 0
    printed = capsys.readouterr().out
    assert "0 of them now" in printed and "1 picture described" in printed  # the database is, once
    after = files_of(output)
    logs = {path for path in before if path.suffix == ".log"}
    assert {path: after[path] for path in before if path not in logs} == {
        path: content for path, content in before.items() if path not in logs
    }
    assert (output / "results" / "third_in_first" / "report.html").is_file()
    shutil.rmtree(tmp_path / "third")
    lay_out(tmp_path, 2, "{:04}x.jpg")  # the same folder, grown
    assert recognize(options_of((first, second), output, small_model)) == 0
    listed = (output / "lists" / "second_in_first_imageNames_query.txt").read_text().split()
    assert len(listed) == 4


def test_mistakes_are_told_in_its_own_words(small_model, tmp_path, capsys):
    drives, output = lay_out(tmp_path, 3), tmp_path / "out"
    options = options_of(drives, output, small_model)
    assert recognize([*options, "--no_positions"]) == 0
    capsys.readouterr()
    for change in (["--set", "feature_extract.precision=bfloat16"], ["--set", "feature_extract.feature_dtype=int8"]):
        assert recognize([*options, "--no_positions", *change]) == 2
        told = capsys.readouterr().err
        assert "choose another output folder, or replace these features with --overwrite" in told
        assert not re.search(r"--(output_features_dir|dataset_root_dir|incomplete)", told)
    shutil.copy(EXAMPLES / "database/place09_0.jpg", drives[0] / "0000.jpg")
    shutil.copy(EXAMPLES / "database/place08_0.jpg", drives[0] / "new.jpg")
    assert recognize([*options, "--no_positions"]) == 2
    told = capsys.readouterr().err
    assert "was another picture when it was described" in told and "with --overwrite)" in told
    assert not re.search(r"--(output_features_dir|dataset_root_dir)", told)
    assert recognize([*options, "--no_positions", "--overwrite"]) == 0


@pytest.mark.parametrize("trouble", ["cut.jpg", "name", "settings", "none"])
def test_a_refused_run_leaves_what_was_there(trouble, small_model, tmp_path, capsys):
    drives, output = lay_out(tmp_path, 3), tmp_path / "out"
    options = options_of(drives, output, small_model)
    assert recognize([*options, "--frames"]) == 0
    before = {path: content for path, content in files_of(output).items() if path.suffix != ".log"}
    lay_out(tmp_path, 5)
    refused, more = 2, []
    if trouble == "cut.jpg":  # among the queries, which are described last
        (drives[1] / "cut.jpg").write_bytes((drives[1] / "0000.jpg").read_bytes()[:3000])
    elif trouble == "name":
        shutil.copy(drives[1] / "0000.jpg", drives[1] / " blank.jpg ")
        (drives[1] / " blank.jpg ").rename(drives[1] / "two\nlines.jpg")
    elif trouble == "settings":
        more = ["--set", "feature_extract.precision=bfloat16"]
    else:
        refused = 0
    assert recognize([*options, "--no_positions", *more]) == refused
    errors = capsys.readouterr().err
    after = {path: content for path, content in files_of(output).items() if path.suffix != ".log"}
    assert (after == before) == bool(refused), errors
    assert len([line for line in errors.splitlines() if "error:" in line]) == bool(refused)


def test_codes_of_the_database_alone(small_model, tmp_path):
    coded = ["--set", "feature_extract.feature_dtype=pq8", "--no_positions"]
    assert recognize([*options_of(lay_out(tmp_path, 3), tmp_path / "out", small_model), *coded]) == 0
    assert (tmp_path / "out/features/first/patchcodec.npz").is_file()
    assert not (tmp_path / "out/features/second/patchcodec.npz").exists()


def test_pictures_of_other_formats_are_counted_once(small_model, tmp_path, capsys):
    drives = lay_out(tmp_path, 2)
    for number in range(3):
        (drives[0] / f"{number}.heic").touch()
    options = options_of(drives, tmp_path / "out", small_model)
    assert recognize(options) == 0
    assert capsys.readouterr().err.count("first: left out: 3 .heic files (convert them to .jpg)") == 1
    for path in drives[0].glob("*.jpg"):
        path.unlink()
    assert recognize(options) == 2
    assert "first: holds no picture to list, but 3 .heic files" in capsys.readouterr().err


def test_positions_of_the_other_drive(small_model, tmp_path, capsys):
    blank(tmp_path / "first", ["1.png", "2.png"])
    blank(tmp_path / "second", ["q1.png", "q2.png"])
    (tmp_path / "d.csv").write_text("name,easting,northing\n2.png,20,0\n1.png,10,0\n")
    (tmp_path / "q.csv").write_text("name,easting,northing\nq1.png,12,0\nq2.png,,\n")
    options = options_of((tmp_path / "first", tmp_path / "second"), tmp_path / "out", small_model)
    assert recognize([*options, "--position_csv", str(tmp_path / "q.csv"), str(tmp_path / "d.csv")]) == 2
    told = capsys.readouterr().err
    assert "d.csv names pictures of first, and" in told and "q.csv those of second (swapped?)" in told
    assert recognize([*options, "--position_csv", str(tmp_path / "d.csv"), str(tmp_path / "q.csv")]) == 0
    printed = capsys.readouterr().out
    assert "left out: " in printed and "1 of 2 rows without a position: second/q2.png" in printed
    assert "1 query against 2 pictures, a match within 25 m" in printed


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
    assert any("1 picture of first in no row" in note and "extra.png" in note for note in dataset.notes)


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
    with pytest.raises(UserError, match=r"3 of 5 queries without a place by .*second/q0\.png"):
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
