"""The result page's numbers and text, without a browser."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import EXAMPLES, example_names, run, tiny_model, write_ground_truth

from patchnetvlad.ground_truth import GroundTruth
from patchnetvlad.image_lists import ImageList
from patchnetvlad.judging import wilson_interval
from patchnetvlad.matching import Matches
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.ransac import ransac_score
from patchnetvlad.recall import ranks_of_first_match
from patchnetvlad.report.content import ReportContent, drawn_matches, match_ranks, outcomes
from patchnetvlad.report.curves import curves
from patchnetvlad.report.page import write_report
from patchnetvlad.report.thumbnails import thumbnails
from patchnetvlad.reranking import PairScore

NASTY = "<script>alert(1)</script>&'\"`</b>"


def picture_list(folder: Path, kind: str, count: int, readable: bool = True) -> ImageList:
    names = tuple(f"{kind}/{NASTY}{number}.png" for number in range(count))
    paths = tuple(folder / f"{kind}{number}.png" for number in range(count))
    for number, path in enumerate(paths):
        if readable:
            Image.new("RGB", (40, 30), (number * 20, 90, 60)).save(path)
    return ImageList(names, paths, names, folder / f"{kind}{NASTY.replace('/', '')}.txt")


def content(folder: Path, readable: bool = True) -> ReportContent:
    """Five queries: right, rescued, lost, wrong and without a match."""
    truth = GroundTruth(
        np.array([[0.0, 0], [100, 0], [200, 0], [300, 0], [900, 0]]),
        np.array([[0.0, 3], [100, 3], [200, 3], [300, 3], [400, 0]]),
        5.0,
    )
    before = np.array([[0, 1, 2], [2, 1, 0], [2, 0, 1], [0, 1, 2], [4, 3, -1]])
    after = np.array([[0, 2, 1], [1, 2, 0], [0, 2, 1], [2, 1, 0], [3, 4, -1]])
    scores = np.array([[0.9, 0.5, 0.1]] * 5)
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    return ReportContent(
        picture_list(folder, "query", 5, readable),
        picture_list(folder, "database", 5, readable),
        {"NetVLAD": before, "PatchNetVLAD": after},
        {"NetVLAD": scores, "PatchNetVLAD": scores},
        {"NetVLAD": ("cosine", confidence), "PatchNetVLAD": ("score", confidence)},
        truth,
    )


def embedded(page: str, name: str):
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_outcomes_and_ranks(tmp_path):
    page = content(tmp_path)
    assert outcomes(page) == ["right", "rescued", "lost", "wrong", "none"]
    assert match_ranks(page) == [[1, 1], [2, 1], [1, 2], [0, 0], [0, 0]]


def test_wilson_interval_as_published():
    low, high = wilson_interval(8, 10)  # Wilson's interval for 8 of 10 at 95 %
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson_interval(0, 5)[0] == 0 and wilson_interval(5, 5)[1] == 1
    assert np.isnan(wilson_interval(0, 0)).all()


def test_ranks_of_first_match():
    ranks = ranks_of_first_match(np.array([[4, 7], [1, -1]]), [np.array([7, 4]), np.array([3])])
    assert ranks.tolist() == [1, np.inf]


def test_curves(tmp_path):
    drawn = curves(content(tmp_path))
    assert [point[:2] for point in drawn["recall"]["NetVLAD"]] == [[1, 0.4], [2, 0.6], [3, 0.6]]
    assert drawn["precision"]["PatchNetVLAD"][-1] == [0.5, 0.4]
    histogram = drawn["confidence"]["NetVLAD"]
    assert sum(histogram["right"]) == 2 and sum(histogram["wrong"]) == 3


def test_drawn_matches_keep_inliers_first_and_lie_on_the_picture():
    grid = PatchGrid(6, 8, 2)
    found = Matches(torch.tensor([0, 34, 3, 9, 17]), torch.tensor([34, 34, 3, 9, 17]))
    pair = PairScore((ransac_score(found, grid, grid),), (found,))
    (drawn,) = drawn_matches(pair, (grid,), (grid,))
    assert (drawn.num_matches, drawn.num_inliers, drawn.patch_size) == (5, 4, 2)
    pixels = drawn.positions / 255 * [128, 96, 128, 96]
    centers = grid.centers().numpy()
    expected = np.concatenate([centers[[34, 3, 9, 17, 0]], centers[[34, 3, 9, 17, 34]]], axis=1)
    assert np.abs(pixels - expected).max() < 128 / 255


def test_thumbnails_stay_within_their_budget(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, (240, 400, 3), dtype=np.uint8)).save(paths[-1])
    large, aspects = thumbnails(paths, 10_000_000)
    small, _ = thumbnails(paths, 60_000)
    assert aspects == [round(400 / 240, 4)] * 6
    assert Image.open(io.BytesIO(base64.b64decode(large[0]))).size == (320, 192)
    assert sum(map(len, small)) <= 60_000


def test_page_escapes_every_name_and_needs_no_network(tmp_path):
    path = tmp_path / "out" / "report.html"
    size = write_report(path, content(tmp_path))
    page = path.read_text(encoding="utf-8")
    assert size == path.stat().st_size
    assert "<script>alert" not in page
    assert "query&lt;script&gt;alert(1)" in page  # the list's name, in the heading
    assert page.count("<script") == 3  # data, pictures, program
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert embedded(page, "data")["queries"][0] == f"query/{NASTY}0.png"
    assert len(embedded(page, "pictures")) == 10


def test_unreadable_pictures_are_left_blank(tmp_path, caplog):
    write_report(tmp_path / "report.html", content(tmp_path, readable=False))
    page = (tmp_path / "report.html").read_text()
    assert embedded(page, "pictures") == [None] * 10
    assert "10 of 10 pictures cannot be read" in caplog.text


def test_feature_match_writes_the_page(tmp_path):
    options = tiny_model(tmp_path)
    queries, database = example_names("queries")[:4], example_names("database")[:8]
    write_ground_truth(tmp_path / "truth.npz", queries, database)
    results = run(options, EXAMPLES, tmp_path, queries, database, "--report", "--distance_unit", "yards")
    page = (results / "report.html").read_text()
    data = embedded(page, "data")
    assert data["queries"] == queries and data["unit"] == "yards"
    assert data["stages"] == ["NetVLAD", "PatchNetVLAD"]
    recalls = dict(line.split(": ") for line in (results / "recalls.txt").read_text().splitlines())
    for stage in data["stages"]:
        at_one = data["curves"]["recall"][stage][0]
        assert at_one[0] == 1 and at_one[1] == pytest.approx(float(recalls[f"Recall {stage}@1"]), abs=1e-4)
    best = data["candidates"][0][1][0][0]
    assert [scale[0] for scale in data["matches"][f"0:{best}"]] == [2, 3]
    predictions = (results / "PatchNetVLAD_predictions.txt").read_text().splitlines()
    assert predictions[2].split(", ")[:2] == [queries[0], data["database"][best]]


def test_page_without_ground_truth_and_without_patches(tmp_path):
    options = [*tiny_model(tmp_path), "--set", "global_params.pooling=netvlad"]
    queries, database = example_names("queries")[:2], example_names("database")[:3]
    results = run(options, EXAMPLES, tmp_path, queries, database, "--report")
    data = embedded((results / "report.html").read_text(), "data")
    assert data["stages"] == ["NetVLAD"] and data["outcomes"] == [] and data["matches"] == {}
    assert len(data["candidates"][0][0]) == 3
