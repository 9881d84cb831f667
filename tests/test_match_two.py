"""match_two and the loop behind match_realtime, on a tiny model, rendered pictures and a video made of them."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_run import EXAMPLES, tiny_model

from patchnetvlad.commands.pairs import match_two
from patchnetvlad.config import MATCHERS
from patchnetvlad.figures import _fitting_names, match_figure, save_figure
from patchnetvlad.images import read_image
from patchnetvlad.matching import Matches, Score
from patchnetvlad.pair_comparison import MatchedPair, distinct_names
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.realtime import follow, frames
from patchnetvlad.recognizer import PlaceRecognizer
from patchnetvlad.reranking import PairScore

QUERY, SAME = EXAMPLES / "queries" / "query00_0.jpg", EXAMPLES / "database" / "place00_0.jpg"
OTHER = EXAMPLES / "database" / "place07_0.jpg"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*tiny_model(tmp_path_factory.mktemp("model")), "--nocuda", "-q"]


@pytest.fixture(scope="module")
def recognizer(options: list[str]) -> PlaceRecognizer:
    return PlaceRecognizer.load("rootsift.ini", overrides=options[3:-2:2])


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "walk.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5, (160, 120))
    assert writer.isOpened()
    for picture in (OTHER, SAME, QUERY):
        writer.write(cv2.resize(cv2.imread(str(picture)), (160, 120)))
    writer.release()
    return path


def pictures(*paths: Path) -> list[str]:
    return ["--first_im_path", str(paths[0]), "--second_im_path", str(paths[1])]


def test_prints_the_known_line_and_draws(options, tmp_path, capsys):
    assert match_two([*options, *pictures(QUERY, SAME), "--plot_save_path", str(tmp_path / "made")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Similarity score between the two images is: ")
    assert out[0].endswith(". Larger scores indicate better matches.")
    assert read_image(tmp_path / "made" / "patchMatchings.png").width == 1600


def test_without_pictures_it_takes_examples(options, tmp_path, capsys):
    match_two([*options, "--plot_save_path", str(tmp_path)])
    examples = capsys.readouterr().out.splitlines()[0]
    match_two([*options, *pictures(QUERY, SAME), "--plot_save_path", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[0] == examples


def test_one_picture_alone_is_refused(options, capsys):
    assert match_two([*options, "--first_im_path", str(QUERY)]) == 2
    assert "name both pictures, or none" in capsys.readouterr().err


def test_threshold_decides_the_exit_status(options, tmp_path, capsys):
    arguments = [*options, *pictures(QUERY, SAME), "--plot_save_path", str(tmp_path), "--threshold"]
    assert match_two([*arguments, "0"]) == 0
    score = float(capsys.readouterr().out.split(": ")[1].split(". ")[0])
    assert match_two([*arguments, str(score + 0.1)]) == 1


@pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator", "spatialSimilarity"])
def test_json(options, recognizer, tmp_path, capsys, matcher):
    matched = ["--set", f"feature_match.matcher={matcher}", *pictures(QUERY, SAME)]
    assert match_two([*options, *matched, "--plot_save_path", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert "figure in" in captured.err
    assert (record["query"], record["reference"], record["matcher"]) == (QUERY.name, SAME.name, matcher)
    weighted = sum(scale["weight"] * scale["score"] for scale in record["scales"])
    assert record["score"] == pytest.approx(weighted)
    for scale, grid_shape in zip(record["scales"], ((6, 9), (5, 8)), strict=True):
        assert scale["query_patches"] == grid_shape[0] * grid_shape[1]
        assert scale["num_matches"] == len(scale["matches"]) > 0
        assert scale["num_inliers"] == sum(match[4] for match in scale["matches"])
        assert (scale["homography"] is None) == (matcher != "RANSAC")
    if matcher == "RANSAC":
        best = max(record["scales"], key=lambda scale: scale["num_inliers"])
        homography = np.array(best["homography"])
        # Pixels of the files, 640×480: the threshold is 1.5·16 pixels of the picture at 160×120
        for query_x, query_y, reference_x, reference_y, inlier in best["matches"]:
            x, y, w = homography @ (reference_x, reference_y, 1)
            distance = np.hypot(x / w - query_x, y / w - query_y)
            assert (distance <= 4 * 24 + 0.1) == inlier


def test_json_draws_only_where_a_folder_is_named(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert match_two([*options, *pictures(QUERY, SAME), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scales"] and not captured.err and not list(tmp_path.iterdir())
    for option in (["--formats", "pdf"], ["--width", "3"], ["--outlines"]):
        assert match_two([*options, *pictures(QUERY, SAME), "--json", *option]) == 2
        assert f"{option[0]}: with --json" in capsys.readouterr().err
    assert match_two([*options, *pictures(QUERY, SAME), "--json", "--plot_save_path", "drawn", "--formats", "svg"]) == 0
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["patchMatchings.svg"]


def test_pictures_of_one_name_are_told_apart_by_their_folders():
    for first, second, names in (
        ("a/1.jpg", "a/2.jpg", ("1.jpg", "2.jpg")),
        ("day/left/1.jpg", "night/left/1.jpg", ("day/left/1.jpg", "night/left/1.jpg")),
        ("a/1.jpg", "a/1.jpg", ("1.jpg", "1.jpg")),
        ("/1.jpg", "/a/1.jpg", ("/1.jpg", "a/1.jpg")),
    ):
        assert distinct_names(Path(first), Path(second)) == names


@given(first=st.text(min_size=1, max_size=90), second=st.text(min_size=1, max_size=90), room=st.integers(24, 130))
def test_names_in_a_figure_fit_and_keep_their_beginnings_and_ends(first: str, second: str, room: int) -> None:
    shown = _fitting_names(first, second, room)
    assert len(shown) <= room and shown.startswith(first[:4]) and shown.endswith(second[-4:])
    if len(first) + len(second) + 3 <= room:
        assert shown == f"{first} | {second}"


def test_a_narrow_figure_tells_equal_names_apart(options, tmp_path):
    paths = []
    for folder in ("the first drive of today", "the second drive of today"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "frame_00001.jpg")
        paths[-1].write_bytes(QUERY.read_bytes())
    chosen = [*pictures(*paths), "--width", "3.4", "--formats", "svg", "--plot_save_path", str(tmp_path)]
    assert match_two([*options, *chosen]) == 0
    (names,) = re.findall(r">([^<>]* \| [^<>]*)<", (tmp_path / "patchMatchings.svg").read_text(encoding="utf-8"))
    first, second = names.split(" | ")
    assert first.startswith("the f") and second.startswith("the s") and "…" in first


def test_coordinates_are_pixels_of_the_pictures_themselves():
    grid = PatchGrid(2, 2, 1)  # of a 32×32 picture, centres at 7.5 and 23.5
    found = Matches(torch.tensor([0, 3]), torch.tensor([0, 3]))
    score = Score(1.0, torch.tensor([True, True]), torch.eye(3, dtype=torch.float64))
    query, reference = Image.new("RGB", (320, 64)), Image.new("RGB", (32, 32))
    matched = MatchedPair(query, reference, (grid,), (grid,), PairScore((score,), (found,)), (32, 32))
    first, second = matched.points(0)
    assert first.tolist() == [[79.5, 15.5], [239.5, 47.5]]
    assert second.tolist() == [[7.5, 7.5], [23.5, 23.5]]
    mapped = np.c_[second, np.ones(2)] @ matched.homography(0).T
    np.testing.assert_allclose(mapped[:, :2] / mapped[:, 2:], first)
    assert matched.patch_sides(0, query).tolist() == [160, 32]


@pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator", "spatialSimilarity"])
@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_figures_for_screen_and_paper(options, tmp_path, matcher, ending):
    chosen = ["--set", f"feature_match.matcher={matcher}", *pictures(QUERY, SAME), "--width", "3.4", "--outlines"]
    assert match_two([*options, *chosen, "--plot_save_path", str(tmp_path), "--formats", ending]) == 0
    content = (tmp_path / f"patchMatchings.{ending}").read_bytes()
    if ending == "svg":
        assert b"inliers of" in content  # text, not outlines of letters
        assert MATCHERS[matcher].meaning.replace("'", "&apos;").encode() in content.replace(b"'", b"&apos;")
        assert b'width="244.8pt"' in content
    elif ending == "pdf":
        assert content.startswith(b"%PDF") and b"/MediaBox [ 0 0 244.8 " in content


def test_figure_shows_inliers_in_colour_at_their_place(tmp_path):
    """Black pictures: what has colour was drawn, and it begins and ends at the patches' centres."""
    grid = PatchGrid(30, 40, 2)
    found = Matches(torch.tensor([0]), torch.tensor([0]))
    pair = PairScore((Score(0.1, torch.tensor([True])),), (found,))
    black = Image.new("RGB", (640, 480))
    save_figure(match_figure(MatchedPair(black, black, (grid,), (grid,), pair, (480, 640)), 0.1), tmp_path / "a.png")
    drawn = np.asarray(read_image(tmp_path / "a.png")).astype(int)
    height = round(1600 / (2 * 4 / 3 + 0.025))  # of the pictures in the figure
    body = drawn[-height:]
    coloured = np.argwhere((body[..., 0] > 150) & (body[..., 2] < 90))
    expected_y, first_x = 16 / 480 * height, 16 / 480 * height  # centre 15.5 of 2×2 patches, the pixel's middle
    second_x = 1600 - (640 - 16) / 480 * height
    assert abs(np.median(coloured[:, 0]) - expected_y) < 2
    assert abs(coloured[:, 1].min() - first_x) < 6 and abs(coloured[:, 1].max() - second_x) < 6


def test_video_against_a_picture(options, video, tmp_path, capsys):
    arguments = [*options, "--video", str(video), "--second_im_path", str(SAME), "--plot_save_path", str(tmp_path)]
    assert match_two([*arguments, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["frame"] for line in lines] == [1, 2, 3]
    assert max(lines, key=lambda line: line["score"])["frame"] == 2
    assert match_two([*arguments, "--threshold", str(lines[1]["score"] + 1)]) == 1
    assert capsys.readouterr().out.startswith("frame 1: ")


def test_video_against_its_first_frame(options, video, tmp_path, capsys):
    assert match_two([*options, "--video", str(video), "--plot_save_path", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert (tmp_path / "patchMatchings.png").exists()


def test_video_that_cannot_be_opened(options, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENCV_LOG_LEVEL", "SILENT")
        (tmp_path / "empty.avi").touch()
        assert match_two([*options, "--video", str(tmp_path / "empty.avi")]) == 2
    assert "cannot be opened as a camera or video" in capsys.readouterr().err
    assert match_two([*options, "--video", str(tmp_path / "absent.avi")]) == 2
    assert "absent.avi: no such file" in capsys.readouterr().err
    assert match_two([*options, "--video", "0", "--first_im_path", str(QUERY)]) == 2


def test_every_frame_is_described_once_and_n_takes_a_new_reference(recognizer, video, monkeypatch):
    described = []
    original = PlaceRecognizer.describe
    monkeypatch.setattr(PlaceRecognizer, "describe", lambda self, some: described.append(1) or original(self, some))
    references = []
    keys = iter([None, "n", None])

    def show(frame):
        references.append(np.asarray(frame.comparison.matched().reference))
        return next(keys)

    assert follow(recognizer, frames(video), show) == 3
    assert len(described) == 3
    stream = list(frames(video))
    for shown, expected in zip(references, (stream[0], stream[0], stream[1]), strict=True):
        np.testing.assert_array_equal(shown, expected)


def test_q_ends(recognizer, video):
    assert follow(recognizer, frames(video), lambda frame: "q") == 1


def test_frame_and_file_compare_alike(recognizer, video):
    of_files = recognizer.compare(*recognizer.describe([QUERY, SAME]))
    query, reference = recognizer.describe([np.asarray(read_image(path)) for path in (QUERY, SAME)])
    assert recognizer.compare(query, reference).score == pytest.approx(of_files.score)
