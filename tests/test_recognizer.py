"""The Python API and torch.hub's entry points, on a tiny model and rendered pictures."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import EXAMPLES, run, tiny_model, write_ground_truth

from patchnetvlad.errors import UserError
from patchnetvlad.recognizer import PlaceRecognizer
from patchnetvlad.result_files import read_pairs

QUERY = EXAMPLES / "queries" / "query03_0.jpg"
SAME, OTHER = (EXAMPLES / "database" / f"place{number}_0.jpg" for number in ("03", "07"))
ROOT = Path(__file__).parent.parent


def overrides(folder: Path) -> list[str]:
    return tiny_model(folder)[3::2]


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> PlaceRecognizer:
    return PlaceRecognizer.load("rootsift.ini", overrides=overrides(tmp_path_factory.mktemp("model")))


def test_a_picture_is_the_same_in_every_form(recognizer):
    picture = Image.open(SAME).convert("RGB")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    described = recognizer.describe([str(SAME), SAME, picture, array, tensor])
    for other in described[1:]:
        torch.testing.assert_close(other.global_, described[0].global_)
        for mine, its in zip(described[0].patches.descriptors, other.patches.descriptors, strict=True):
            torch.testing.assert_close(mine, its)
    assert described[0].global_.shape == (8 * 128,)
    assert [len(patches) for patches in described[0].patches.descriptors] == [6 * 9, 5 * 8]


def test_batches_are_several_pictures(recognizer):
    arrays = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in (SAME, OTHER)])
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    separate = recognizer.describe([SAME, OTHER])
    for batch in (arrays, tensors):
        for mine, its in zip(recognizer.describe(batch), separate, strict=True):
            torch.testing.assert_close(mine.global_, its.global_)


def test_grey_arrays_are_pictures(recognizer):
    grey = np.asarray(Image.open(SAME).convert("L"))
    (one,) = recognizer.describe(grey)
    (three,) = recognizer.describe(np.stack([grey] * 3, axis=2))
    torch.testing.assert_close(one.global_, three.global_)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), "uint8 array H×W×3 or H×W, not float32"),
        (np.zeros((8, 8, 4), dtype=np.uint8), r"not uint8 \(8, 8, 4\)"),
        (torch.zeros(1, 8, 8), "3×H×W tensor"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "not torch.uint8"),
        (7, "expected a path, a Pillow picture, a uint8 array or a float tensor, or several of them, not int"),
        ([SAME, None], "picture 1: expected a path, a Pillow picture, a uint8 array or a float tensor, not NoneType"),
    ],
)
def test_wrong_arrays_are_refused(recognizer, picture, words):
    with pytest.raises(ValueError, match=words):
        recognizer.describe(picture)


def test_unreadable_files_are_refused(recognizer):
    with pytest.raises(UserError, match=r"absent\.jpg"):
        recognizer.describe("absent.jpg")


def test_all_bad_files_are_named_before_the_first_is_described(recognizer, tmp_path, monkeypatch):
    (tmp_path / "cut.jpg").write_bytes(SAME.read_bytes()[:2000])
    monkeypatch.setattr(recognizer.model, "describe", lambda pictures: pytest.fail("described too early"))
    for given in ([SAME, tmp_path / "cut.jpg", "absent.jpg"], iter([str(tmp_path / "cut.jpg"), SAME, "absent.jpg"])):
        with pytest.raises(UserError, match=r"cut\.jpg: cannot be decoded \(.*\); absent\.jpg: no such file"):
            recognizer.describe(given)


def test_pictures_that_are_open_are_read_as_files_are(recognizer, tmp_path):
    """16 bits, transparency, and a file that breaks off."""
    grey = np.asarray(Image.open(SAME).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.open(SAME).convert("RGBA").save(tmp_path / "alpha.png")
    Image.open(SAME).quantize(16).save(tmp_path / "palette.png", transparency=b"\x00" * 4)
    for name in ("deep.png", "alpha.png", "palette.png"):
        with Image.open(tmp_path / name) as opened:
            from_file, from_picture = recognizer.describe([tmp_path / name, opened])
            assert ("transparency" in opened.info) == (name == "palette.png")
        torch.testing.assert_close(from_file.global_, from_picture.global_, rtol=0, atol=0)
    (tmp_path / "cut.jpg").write_bytes(SAME.read_bytes()[:2000])
    with Image.open(tmp_path / "cut.jpg") as opened, pytest.raises(UserError, match=r"cut\.jpg: cannot be decoded"):
        recognizer.describe(opened)


def test_an_open_picture_is_turned_as_its_file_is(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(SAME).save(tmp_path / "turned.jpg", exif=turned)
    options = [*overrides(tmp_path), "feature_extract.exif_rotation=True"]
    upright = PlaceRecognizer.load("rootsift.ini", overrides=options)
    with Image.open(tmp_path / "turned.jpg") as opened:
        from_file, from_picture = upright.describe([tmp_path / "turned.jpg", opened])
    torch.testing.assert_close(from_file.global_, from_picture.global_, rtol=0, atol=0)


def test_pictures_that_are_stretched_are_counted_once(tmp_path, caplog):
    recognizer = PlaceRecognizer.load("rootsift.ini", overrides=overrides(tmp_path))
    caplog.set_level(logging.INFO)
    square = np.zeros((96, 96, 3), dtype=np.uint8)
    recognizer.describe(SAME)
    assert "stretched" not in caplog.text
    recognizer.describe([SAME, square, square])
    recognizer.describe(square)
    assert [record.message.partition(":")[0] for record in caplog.records if "stretched" in record.message] == [
        "2 of 3 pictures of other proportions than 160×120"
    ]


def test_a_picture_smaller_than_a_patch_is_named(tmp_path):
    own_size = [f"feature_{part}.imageresize{side}=0" for part in ("extract", "match") for side in "wh"]
    recognizer = PlaceRecognizer.load("rootsift.ini", overrides=[*overrides(tmp_path), *own_size])
    Image.new("RGB", (40, 40)).save(tmp_path / "tiny.png")
    with pytest.raises(UserError, match=r"tiny\.png: a patch of size 3 is larger than the feature map"):
        recognizer.describe([SAME, tmp_path / "tiny.png"])


def test_compare(recognizer):
    query, same, other = recognizer.describe([QUERY, SAME, OTHER])
    comparison = recognizer.compare(query, same)
    assert comparison.score > recognizer.compare(query, other).score
    values = [score.value for score in comparison.pair.scores]
    assert comparison.score == pytest.approx(0.6 * values[0] + 0.4 * values[1])


def test_results_are_said_in_one_line(recognizer):
    query, array = recognizer.describe([QUERY, np.asarray(Image.open(SAME).convert("RGB"))])
    assert repr(query) == f"{QUERY}: 1024 numbers, 54 + 40 patches"
    assert repr(array) == "picture 1: 1024 numbers, 54 + 40 patches"
    assert repr(recognizer).endswith("rootsift.ini: rootsift, 1024 numbers, patches of 2,3, on cpu")
    database = recognizer.database([SAME], positions=np.zeros((1, 2)))
    assert repr(database) == f"1 picture in memory, with positions; {recognizer}"
    assert re.fullmatch(
        rf"{QUERY} and picture 1: score [\d.]+, \d+ of \d+ matches agree", repr(recognizer.compare(query, array))
    )


def test_a_comparison_draws_itself(recognizer):
    drawn = recognizer.compare(*recognizer.describe([QUERY, SAME])).figure(width=4)
    texts = [text.get_text() for text in drawn.texts]
    assert drawn.get_figwidth() == 4 and any("query03_0.jpg" in text for text in texts)
    assert recognizer.compare(*recognizer.describe([Image.open(QUERY), SAME])).figure().axes
    unkept = replace(recognizer.describe(QUERY)[0], source=None)
    with pytest.raises(UserError, match="without keeping the picture"):
        recognizer.compare(unkept, unkept).figure()


def test_features_of_the_script_are_a_database(tmp_path):
    options = tiny_model(tmp_path)
    names = [f"database/place{number:02d}_0.jpg" for number in range(5)]
    results = run(options, EXAMPLES, tmp_path, ["queries/query03_0.jpg"], names)
    write_ground_truth(tmp_path / "truth.npz", ["queries/query03_0.jpg"], names)
    recognizer = PlaceRecognizer.load("rootsift.ini", overrides=options[3::2])
    files = (tmp_path / "database", tmp_path / "database.txt", EXAMPLES)
    with recognizer.open_database(*files, ground_truth=tmp_path / "truth.npz") as database:
        answers = database.query(QUERY, top=3)
        assert len(database) == 5 and database.pictures[2].name == names[2]
        comparison = recognizer.compare(recognizer.describe(QUERY)[0], database.pictures[answers[0].index])
        assert comparison.figure().axes
    (ranking,) = read_pairs(results / "PatchNetVLAD_predictions.txt")
    assert [answer.name for answer in answers] == list(ranking.database[:3])
    with np.load(tmp_path / "truth.npz") as truth:
        assert answers[0].position == tuple(truth["utmDb"][answers[0].index])
    in_memory = recognizer.database([EXAMPLES / name for name in names], positions=np.zeros((5, 2)))
    assert [answer.index for answer in in_memory.query(QUERY, top=3)] == [answer.index for answer in answers]
    with pytest.raises(UserError, match="the list has 1"):
        recognizer.open_database(tmp_path / "database", tmp_path / "queries.txt", EXAMPLES)


def test_database(recognizer):
    paths = [EXAMPLES / "database" / f"place{number:02d}_0.jpg" for number in range(5)]
    database = recognizer.database(paths)
    answers = database.query(paths[3], top=3)
    assert len(database) == 5 and len(answers) == 3
    assert answers[0].index == 3 and answers[0].name == str(paths[3]) and answers[0].position is None
    assert answers[0].score >= answers[1].score >= answers[2].score
    assert database.query(recognizer.describe(paths[3])[0], top=3) == answers
    with pytest.raises(ValueError, match="at least one picture"):
        recognizer.database([])
    with pytest.raises(ValueError, match="top = 0: expected 1 or more"):
        database.query(QUERY, top=0)


def test_a_stored_database_is_held_against_its_pictures(tmp_path, caplog):
    options = tiny_model(tmp_path)
    names = [f"database/place{number:02d}_0.jpg" for number in range(3)]
    run(options, EXAMPLES, tmp_path, ["queries/query03_0.jpg"], names)
    recognizer = PlaceRecognizer.load("rootsift.ini", overrides=options[3::2])
    files = tmp_path / "database", tmp_path / "database.txt"
    with recognizer.open_database(*files, EXAMPLES) as database:
        assert repr(database).startswith("3 pictures on disk, without positions; ") and "\n" not in repr(database)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with recognizer.open_database(*files, tmp_path) as database:
        assert database.query(QUERY, top=1)[0].name in names
    assert "place00_0.jpg is not there, nor are others" in caplog.text
    other = tmp_path / "other" / "database"
    other.mkdir(parents=True)
    for number in range(3):
        (other / f"place{number:02d}_0.jpg").symlink_to(EXAMPLES / "queries" / f"query{number + 5:02d}_0.jpg")
    with pytest.raises(UserError, match=r"is not the picture that was described as database/place00_0\.jpg \(cosine"):
        recognizer.open_database(*files, tmp_path / "other")


def test_a_global_model_answers_by_its_descriptors(tmp_path):
    recognizer = PlaceRecognizer.load("rootsift.ini", overrides=[*overrides(tmp_path), "global_params.pooling=netvlad"])
    database = recognizer.database([OTHER, SAME])
    assert database.query(SAME, top=1)[0].index == 1
    assert database.query(SAME, top=1)[0].score == pytest.approx(0, abs=1e-5)  # minus the squared distance


def test_torch_hub(tmp_path):
    program = (
        "import sys, torch\n"
        "root, picture, *overrides = sys.argv[1:]\n"
        "sys.path.insert(0, root); import hubconf\n"
        "print([name for name, some in vars(hubconf).items() if callable(some) and name[0] != '_'])\n"
        "chosen = {'source': 'local', 'config': 'rootsift.ini', 'overrides': overrides}\n"
        "recognizer = torch.hub.load(root, 'place_recognizer', **chosen)\n"
        "model = torch.hub.load(root, 'place_model', **chosen)\n"
        "print(len(recognizer.describe(picture)), model(torch.zeros(2, 3, 120, 160)).shape)\n"
    )
    environment = {**os.environ, "TORCH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), str(QUERY), *overrides(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "['place_recognizer', 'place_model']" in done.stdout
    assert "1 torch.Size([2, 1024])" in done.stdout


def test_8_bit_products_give_the_same_answers(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    answers = []
    for similarity in ("float32", "int8"):
        chosen = [*overrides(tmp_path), f"feature_match.similarity={similarity}"]
        places = PlaceRecognizer.load("rootsift.ini", overrides=chosen)
        database = places.database([OTHER, SAME])
        answers.append(database.query(QUERY, top=2))
        assert ("8-bit products" in caplog.text) == (similarity == "int8")
    assert answers[0] == answers[1]


def test_pictures_of_an_iterator_stay_in_order(recognizer):
    paths = [SAME, OTHER, QUERY, OTHER, SAME, QUERY, SAME]
    described = recognizer.describe(path for path in paths)
    for path, found in zip(paths, described, strict=True):
        torch.testing.assert_close(found.global_, recognizer.describe(path)[0].global_)
    with pytest.raises(UserError, match=r"nowhere\.jpg: no such file"):
        recognizer.describe([SAME, Path("nowhere.jpg"), OTHER])


def test_what_is_no_description_is_named(recognizer):
    (described,) = recognizer.describe([SAME])
    with pytest.raises(ValueError, match="expected descriptions, which `describe` makes, not str"):
        recognizer.compare(described, "a.jpg")


def test_a_device_that_is_not_there(recognizer):
    with pytest.raises(UserError, match=r"^device cuda:99: this machine offers \d+ CUDA devices$"):
        PlaceRecognizer.load("rootsift.ini", device="cuda:99")
