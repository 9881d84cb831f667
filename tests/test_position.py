"""Positions from matches: numbers on paper, and the example places from the shell."""

import csv
import re

import numpy as np
import pytest
from conftest import ROOT

from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.commands.places import locate
from patchnetvlad.localization.coordinates import Zone, to_geographic
from patchnetvlad.localization.position import estimate_position, score_positions
from patchnetvlad.matching import rounding_works

EXAMPLES = ROOT / "example_images"
STREET = np.array([[0.0, 0], [10, 0], [20, 0], [30, 0], [1000, 0]])


def test_agreeing_matches_outvote_a_better_one_far_away():
    found = estimate_position(np.array([4, 1, 2]), np.array([2.0, 1.8, 1.7]), STREET, 15)
    weights = np.exp([1.8, 1.7])
    assert found.coordinates == pytest.approx([(10 * weights[0] + 20 * weights[1]) / weights.sum(), 0])
    assert (found.supporters, found.best) == (2, 4)
    # the two hold less than 68 % of the weight, so the radius reaches the far one
    assert found.radius == pytest.approx(1000 - found.coordinates[0])
    sure = estimate_position(np.array([4, 1, 2]), np.array([0.0, 1.8, 1.7]), STREET, 15)
    assert sure.radius < 10


def test_one_match_is_as_sure_as_the_database_is_dense():
    found = estimate_position(np.array([2, -1]), np.array([1.0, 0.0]), STREET, 5)
    assert found.coordinates.tolist() == [20, 0] and found.radius == 5 and found.supporters == 1
    alone = estimate_position(np.array([0]), np.array([1.0]), STREET[:1], 5)
    assert alone.radius == 0
    with pytest.raises(ValueError):
        estimate_position(np.array([-1, -1]), np.array([1.0, 0.0]), STREET, 5)


def test_errors_on_paper():
    positions = [
        estimate_position(np.array([row]), np.array([1.0]), STREET, 5) if row is not None else None
        for row in (0, 1, 4, None)
    ]
    truth = np.array([[0.0, 3], [10, 20], [930, 0], [0, 0]])  # errors 3, 20, 70, none
    score = score_positions(positions, truth)
    assert score.median_error == pytest.approx(45) and score.within == (0.25, 0.5, 0.75)
    assert score.covered == 0.5  # 3 within 5, 70 within 485


@pytest.fixture(scope="module")
def run(small_model, tmp_path_factory):
    """Features and results of the example places."""
    folder = tmp_path_factory.mktemp("run")
    lists = {part: f"example_imageNames_{part}.txt" for part in ("query", "index")}
    root = ["--dataset_root_dir", str(EXAMPLES)]
    for part, listed in lists.items():
        options = ["--dataset_file_path", listed, "--output_features_dir", str(folder / part)]
        assert feature_extract([*small_model, *root, *options]) == 0
    options = [f"--{part}_file_path={listed}" for part, listed in lists.items()]
    options += [f"--{part}_input_features_dir={folder / part}" for part in lists]
    options += ["--ground_truth_path", "example.npz", "--result_save_folder", str(folder / "results")]
    assert feature_match([*small_model, *root, *options]) == 0
    return folder


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_queries_of_a_run(run, tmp_path, capsys):
    options = ["--results", str(run / "results"), "--ground_truth_path", "example.npz", "--zone", "33N"]
    assert locate([*options, "--positions", str(tmp_path / "positions.csv")]) == 0
    (summary, _) = capsys.readouterr().out.splitlines()
    assert summary.startswith("18 queries: median error")
    rows = rows_of(tmp_path / "positions.csv")
    assert len(rows) == 18 and rows[0]["query"] == "queries/query00_0.jpg"
    with np.load(ROOT / "dataset_gt_files" / "example.npz") as truth:
        places = np.array([[float(row["easting"]), float(row["northing"])] for row in rows])
        errors = np.linalg.norm(places - truth["utmQ"], axis=1)
        assert np.median(errors) < truth["posDistThr"]
    geographic = to_geographic(places, Zone(33))
    assert [float(row["latitude"]) for row in rows] == pytest.approx(geographic[:, 0], abs=1e-6)
    assert [float(row["longitude"]) for row in rows] == pytest.approx(geographic[:, 1], abs=1e-6)


def test_coordinates_are_called_what_they_are(run, tmp_path, capsys):
    places = np.stack([np.arange(30), np.zeros(30)], axis=1)
    for unit, names in (("frames", "frame"), ("model units", "x,y"), ("m", "easting,northing")):
        truth = tmp_path / "truth.npz"
        np.savez(truth, utmQ=np.vstack([places[:17], [[900, 0]]]), utmDb=places, posDistThr=2, unit=unit)
        table = tmp_path / "positions.csv"
        options = ["--results", str(run / "results"), "--ground_truth_path", str(truth), "--positions", str(table)]
        assert locate(options) == 0
        assert table.read_text().splitlines()[0] == f"query,{names},radius,supporters,best_match"
        (summary, unmatched, _) = capsys.readouterr().out.splitlines()
        assert re.search(r"; the radius of uncertainty holds the true place of [\d.]+ %$", summary)
        assert unmatched == f"1 query has no database picture within 2 {unit}, and cannot be located as near as that"


def test_one_picture_as_in_the_run(run, small_model, tmp_path, capsys):
    options = [*small_model, "--picture", str(EXAMPLES / "queries" / "query03_0.jpg")]
    options += ["--ground_truth_path", "example.npz"]
    assert locate(options) == 2
    assert "needs --index_file_path" in capsys.readouterr().err
    options += ["--index_file_path", "example_imageNames_index.txt", "--dataset_root_dir", str(EXAMPLES)]
    options += ["--index_input_features_dir", str(run / "index")]
    assert locate([*options, "--positions", str(tmp_path / "one.csv")]) == 0
    assert re.search(r"easting [\d.]+, .*radius [\d.]+ m, supporters", capsys.readouterr().out)
    rounded = [*options, "--set", "feature_match.similarity=int8", "--positions", str(tmp_path / "rounded.csv")]
    if rounding_works():
        assert locate(rounded) == 0 and rows_of(tmp_path / "rounded.csv") == rows_of(tmp_path / "one.csv")
    assert (
        locate(
            [
                "--results",
                str(run / "results"),
                "--ground_truth_path",
                "example.npz",
                "--positions",
                str(tmp_path / "all.csv"),
            ]
        )
        == 0
    )
    # As recorded with the features, and the picture below the root
    recorded = ["--nocuda", "-q", "--picture", "queries/query03_0.jpg", *options[len(small_model) + 2 :]]
    assert locate([*recorded, "--positions", str(tmp_path / "recorded.csv")]) == 0
    assert rows_of(tmp_path / "recorded.csv") == rows_of(tmp_path / "one.csv")
    (of_run,) = [row for row in rows_of(tmp_path / "all.csv") if row["query"].endswith("query03_0.jpg")]
    (single,) = rows_of(tmp_path / "one.csv")
    assert {**single, "query": ""} == {**of_run, "query": ""}


def test_runs_that_cannot_be_located(run, tmp_path, capsys):
    assert locate(["--results", str(tmp_path), "--ground_truth_path", "example.npz"]) == 2
    assert "scores.npz: no such file" in capsys.readouterr().err
    other = tmp_path / "other.npz"
    np.savez(other, utmQ=np.zeros((18, 2)), utmDb=np.zeros((3, 2)), posDistThr=25)
    assert locate(["--results", str(run / "results"), "--ground_truth_path", str(other)]) == 2
    assert "the ground truth 3 rows" in capsys.readouterr().err
    options = ["--results", str(run / "results"), "--ground_truth_path", "example.npz", "--zone", "here"]
    assert locate(options) == 2
    assert "UTM zone 'here'" in capsys.readouterr().err
    frames = tmp_path / "frames.npz"
    np.savez(frames, utmQ=np.zeros((18, 2)), utmDb=np.zeros((30, 2)), posDistThr=2, unit="frames")
    assert locate(["--results", str(run / "results"), "--ground_truth_path", str(frames), "--zone", "33N"]) == 2
    assert "is in frames, and a zone is for metres" in capsys.readouterr().err
