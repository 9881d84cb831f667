"""The scripts end to end on the example places with a small model, and what they say of bad input."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from patchnetvlad.checkpoints import write_checkpoint
from patchnetvlad.commands.datasets import convert_kapture_to_msls, gen_image_file_list
from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.commands.models import download_models, fit_model
from patchnetvlad.commands.pairs import match_two
from patchnetvlad.config import ENCODERS
from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.errors import UserError
from patchnetvlad.model import PlaceModel
from patchnetvlad.patch_grid import EncoderGeometry
from patchnetvlad.paths import require_file
from patchnetvlad.recognizer import PlaceRecognizer
from patchnetvlad.result_files import read_pairs

EXAMPLES = ROOT / "example_images"
QUERY_LIST, INDEX_LIST = "example_imageNames_query.txt", "example_imageNames_index.txt"


@pytest.fixture(scope="module")
def features(small_model, tmp_path_factory):
    """Folder with `query` and `index` features of the example places."""
    folder = tmp_path_factory.mktemp("example")
    for name, listed in (("query", QUERY_LIST), ("index", INDEX_LIST)):
        assert extract(small_model, listed, folder / name) == 0
    return folder


def extract(options, listed, folder, root=EXAMPLES, *more):
    return feature_extract(
        [*options, "--dataset_file_path", str(listed), "--dataset_root_dir", str(root)]
        + ["--output_features_dir", str(folder), *more]
    )


def match(options, features, results, *more, truth="example.npz", query_list=QUERY_LIST, index_list=INDEX_LIST):
    ground_truth = ["--ground_truth_path", str(truth)] if truth else []
    return feature_match(
        [*options, "--dataset_root_dir", str(EXAMPLES), *ground_truth, "--result_save_folder", str(results)]
        + ["--query_file_path", str(query_list), "--index_file_path", str(index_list)]
        + ["--query_input_features_dir", str(features / "query")]
        + ["--index_input_features_dir", str(features / "index"), *more]
    )


def recalls(results):
    return json.loads((results / "recalls.json").read_text())["recalls"]


def failure(capsys) -> str:
    """The one line that a failed command wrote."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_extract_then_match(small_model, features, tmp_path, capsys):
    assert match(small_model, features, tmp_path, "--formats", "kapture", "hloc", "msls") == 0
    lines = (tmp_path / "recalls.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"Recall {stage}@{n}" for stage in ("NetVLAD", "PatchNetVLAD") for n in (1, 5, 10)
    ]
    found, before = (recalls(tmp_path)[stage]["all_queries"] for stage in ("PatchNetVLAD", "NetVLAD"))
    assert found["1"] >= 0.5 and found["1"] > before["1"] and found["10"] >= found["5"] >= found["1"]
    pairs = read_pairs(tmp_path / "PatchNetVLAD_predictions.txt")
    assert len(pairs) == 18 and pairs[0].query == "queries/query00_0.jpg" and len(pairs[0].database) == 10
    assert len((tmp_path / "PatchNetVLAD_predictions_msls.txt").read_text().splitlines()) == 18
    assert (tmp_path / "NetVLAD_pairs_hloc.txt").exists() and (tmp_path / "match.log").exists()
    assert "Recall@N" in capsys.readouterr().out


def test_predictions_as_the_published_code_writes_them(small_model, features, tmp_path, capsys):
    assert match(small_model, features, tmp_path, "--formats", "published") == 0
    lines = (tmp_path / "PatchNetVLAD_predictions.txt").read_text().splitlines()
    query, best = lines[2].split(", ")
    assert lines[0] == "# kapture format: 1.0" and Path(query) == EXAMPLES / "queries/query00_0.jpg"
    assert Path(best).is_file()
    capsys.readouterr()
    assert match(small_model, features, tmp_path, "--formats", "kapture", "published") == 2
    assert "both write files of one name" in failure(capsys)


@pytest.mark.parametrize(
    ("form", "name", "said"),
    [
        ("kapture", "a,b.jpg", "holds no comma"),
        ("published", "a,b.jpg", "holds no comma"),
        ("hloc", "a b.jpg", "holds no white space"),
        ("msls", "a b.jpg", "no white space"),
    ],
)
@pytest.mark.parametrize("side", ["query", "index"])
def test_names_that_a_format_cannot_hold_are_refused_before_the_run(
    small_model, tmp_path, capsys, monkeypatch, form, name, said, side
):
    shutil.copy(EXAMPLES / "database/place00_0.jpg", tmp_path / name)
    (tmp_path / "plain.txt").write_text(f"{EXAMPLES}/queries/query00_0.jpg\n")
    (tmp_path / "odd.txt").write_text(f"{name}\n")
    lists = {"query": tmp_path / "plain.txt", "index": tmp_path / "plain.txt", side: tmp_path / "odd.txt"}
    monkeypatch.setattr("patchnetvlad.evaluation.FeatureStore", None)  # nothing is opened
    for folder in lists:
        (tmp_path / folder).mkdir()
    options = ["--formats", form, "--dataset_root_dir", str(tmp_path)]
    chosen = {"truth": None, "query_list": lists["query"], "index_list": lists["index"]}
    assert match(small_model, tmp_path, tmp_path / "results", *options, **chosen) == 2
    line = failure(capsys)
    assert f"{tmp_path / 'odd.txt'}: picture" in line and name in line and said in line
    assert not (tmp_path / "results").exists()


def test_a_city_is_not_added_twice_after_hours(small_model, features, tmp_path, capsys):
    (tmp_path / "all.txt").write_text("query00_0 place00_0\n")
    added = ["--msls_predictions", str(tmp_path / "all.txt")]
    assert match(small_model, features, tmp_path / "results", *added) == 2
    assert "query query00_0 appears a second time" in failure(capsys)
    assert not (tmp_path / "results").exists()


@pytest.fixture
def unlabelled(features, tmp_path):
    """The features of the example places as the published code leaves them: without a manifest."""
    shutil.copytree(features, tmp_path / "features")
    for part in ("query", "index"):
        for name in ("manifest.jsonl", "settings.ini"):
            (tmp_path / "features" / part / name).unlink()
    return tmp_path / "features"


def test_features_without_a_manifest_are_held_against_their_pictures(small_model, unlabelled, tmp_path, capsys):
    loud = [option for option in small_model if option != "-q"]
    assert match(loud, unlabelled, tmp_path / "results") == 0
    said = capsys.readouterr().err
    assert said.count("has no manifest.jsonl; described again and found to agree: 2 pictures") == 2
    assert "extract both, or neither" not in said  # both are of one kind
    rows = np.load(unlabelled / "index/globalfeats.npy")
    np.save(unlabelled / "index/globalfeats.npy", np.roll(rows, 1, axis=0))
    assert match(small_model, unlabelled, tmp_path / "results") == 2
    line = failure(capsys)
    assert "is not the descriptor of database/place04_0.jpg, which stands in row 12" in line and "another order" in line
    np.save(unlabelled / "index/globalfeats.npy", np.roll(rows, 1, axis=1))
    assert match(small_model, unlabelled, tmp_path / "results") == 2
    line = failure(capsys)
    assert "index: has no manifest.jsonl" in line and "another model" in line


def test_what_is_not_at_hand_is_not_checked_and_said(small_model, unlabelled, tmp_path, capsys):
    loud = [option for option in small_model if option != "-q"]
    elsewhere = ["--dataset_root_dir", str(tmp_path)]
    assert match(loud, unlabelled, tmp_path / "results", *elsewhere) == 0
    assert capsys.readouterr().err.count("is not checked, since its pictures are not at hand") == 2
    weights = ["--set", f"global_params.resumepath={tmp_path / 'absent'}"]
    assert match([*loud, *weights], unlabelled, tmp_path / "results") == 0
    assert capsys.readouterr().err.count("is not checked, since the weights are not at hand") == 2


def test_features_of_two_programs_are_warned_of(small_model, features, unlabelled, tmp_path, capsys):
    shutil.copytree(features / "query", unlabelled / "query", dirs_exist_ok=True)
    assert match(small_model, unlabelled, tmp_path / "results") == 0
    said = failure(capsys)
    assert said.startswith(f"{unlabelled / 'index'}: has no manifest.jsonl, and {unlabelled / 'query'} has one")
    on_demand = ["--set", "feature_match.local_features=on_demand"]
    assert match(small_model, unlabelled, tmp_path / "results", *on_demand) == 0
    assert not capsys.readouterr().err


def test_a_database_in_python_is_checked_in_the_same_way(small_model, unlabelled, caplog):
    overrides = [small_model[place + 1] for place, option in enumerate(small_model) if option == "--set"]
    places = PlaceRecognizer.load("rootsift.ini", overrides=overrides)
    with places.open_database(unlabelled / "index", INDEX_LIST, EXAMPLES) as database:
        assert len(database) == 30
    assert "it is compared with pictures described now" in caplog.text
    rows = np.load(unlabelled / "index/globalfeats.npy")
    np.save(unlabelled / "index/globalfeats.npy", rows[::-1])
    with pytest.raises(UserError, match="another order"):
        places.open_database(unlabelled / "index", INDEX_LIST, EXAMPLES)


def test_features_know_the_configuration_they_were_made_with(small_model, features, tmp_path, capsys):
    assert match(small_model, features, tmp_path / "told", "--set", "feature_match.rerank_top=7") == 0
    assert match(["--nocuda"], features, tmp_path / "recorded", "--set", "feature_match.rerank_top=7") == 0
    assert f"configuration: {features / 'index/settings.ini'}" in capsys.readouterr().err
    told, recorded = (np.load(tmp_path / name / "scores.npz") for name in ("told", "recorded"))
    assert recorded["indices"].shape == (18, 7)
    np.testing.assert_array_equal(told["per_scale"], recorded["per_scale"])
    shutil.copytree(features, tmp_path / "older")
    (tmp_path / "older/index/settings.ini").unlink()
    assert match(["--nocuda", "-q"], tmp_path / "older", tmp_path / "out") == 2  # performance.ini, as published
    assert "4096" in failure(capsys)


def test_without_ground_truth_there_are_no_recalls(small_model, features, tmp_path):
    assert match(small_model, features, tmp_path, truth=None) == 0
    assert not list(tmp_path.glob("recalls*"))


def test_a_second_extraction_describes_nothing(small_model, features, capsys):
    before = (features / "index/globalfeats.npy").stat().st_mtime_ns
    options = [option for option in small_model if option != "-q"]
    assert extract(options, INDEX_LIST, features / "index") == 0
    assert "0 to describe" in capsys.readouterr().err
    assert (features / "index/globalfeats.npy").stat().st_mtime_ns == before


def test_new_pictures_are_not_added_to_those_of_another_root(small_model, tmp_path, capsys):
    for root, source in (("one", "database/place00_0.jpg"), ("two", "database/place07_0.jpg")):
        (tmp_path / root).mkdir()
        shutil.copy(EXAMPLES / source, tmp_path / root / "a.jpg")
        shutil.copy(EXAMPLES / source, tmp_path / root / "b.jpg")
    shorter, longer = tmp_path / "shorter.txt", tmp_path / "longer.txt"
    shorter.write_text("a.jpg\n")
    longer.write_text("a.jpg\nb.jpg\n")
    assert extract(small_model, shorter, tmp_path / "features", tmp_path / "one") == 0
    assert extract(small_model, longer, tmp_path / "features", tmp_path / "two") == 2
    assert "a.jpg was another picture when it was described" in failure(capsys)
    assert extract(small_model, longer, tmp_path / "features", tmp_path / "one") == 0
    assert "2 pictures described" in capsys.readouterr().out


def test_candidates_beyond_rerank_top_keep_their_place(small_model, features, tmp_path):
    assert match(small_model, features, tmp_path, "--set", "feature_match.rerank_top=3") == 0
    first, second = (read_pairs(tmp_path / f"{stage}_predictions.txt") for stage in ("NetVLAD", "PatchNetVLAD"))
    for before, after in zip(first, second, strict=True):
        assert sorted(before.database[:3]) == sorted(after.database[:3]) and before.database[3:] == after.database[3:]
    assert np.load(tmp_path / "scores.npz")["indices"].shape == (18, 3)


def test_on_demand_equals_stored(small_model, features, tmp_path):
    assert match(small_model, features, tmp_path / "stored") == 0
    assert match(small_model, features, tmp_path / "made", "--set", "feature_match.local_features=on_demand") == 0
    stored, made = (np.load(tmp_path / name / "scores.npz") for name in ("stored", "made"))
    np.testing.assert_array_equal(stored["indices"], made["indices"])
    np.testing.assert_allclose(stored["per_scale"], made["per_scale"])


def test_on_demand_from_a_disk_cache(small_model, features, tmp_path, monkeypatch):
    """A second run describes nothing and finds the same; room for little keeps little."""
    for part in ("query", "index"):
        shutil.copytree(features / part, tmp_path / part, ignore=shutil.ignore_patterns("patchfeats*"))
    options = ["--set", "feature_match.local_features=on_demand", "--set"]
    assert match(small_model, tmp_path, tmp_path / "one", *options, "feature_match.disk_cache_gb=1") == 0
    kept = list(tmp_path.glob("*/described/*.npz"))
    assert len(kept) == 18 + len(np.unique(np.load(tmp_path / "one" / "scores.npz")["indices"]))
    with monkeypatch.context() as patched:
        patched.setattr(PlaceModel, "describe", None)
        assert match(small_model, tmp_path, tmp_path / "two", *options, "feature_match.disk_cache_gb=1") == 0
    one, two = (np.load(tmp_path / name / "scores.npz") for name in ("one", "two"))
    np.testing.assert_array_equal(one["per_scale"], two["per_scale"])
    room = 2.5 * max(path.stat().st_size for path in kept)
    assert match(small_model, tmp_path, tmp_path / "3", *options, f"feature_match.disk_cache_gb={room / 1e9:.12f}") == 0
    for part in ("query", "index"):
        assert 0 < sum(path.stat().st_size for path in (tmp_path / part / "described").iterdir()) <= room


@pytest.mark.parametrize("source", ["stored", "on_demand"])
def test_8_bit_products_change_nothing(small_model, features, tmp_path, source):
    options = ["--set", f"feature_match.local_features={source}", "--set", "feature_match.similarity=int8"]
    assert match(small_model, features, tmp_path / "rounded", *options) == 0
    assert match(small_model, features, tmp_path / "float", "--set", "feature_match.similarity=float32") == 0
    rounded, exact = (np.load(tmp_path / name / "scores.npz") for name in ("rounded", "float"))
    np.testing.assert_array_equal(rounded["per_scale"], exact["per_scale"])
    assert "8-bit products" in (tmp_path / "rounded/match.log").read_text()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_storage_ranks_the_same_places(small_model, features, tmp_path, dtype):
    options = [*small_model, "--set", f"feature_extract.feature_dtype={dtype}"]
    for name, listed in (("query", QUERY_LIST), ("index", INDEX_LIST)):
        assert extract(options, listed, tmp_path / name) == 0
    assert match(small_model, tmp_path, tmp_path / "small") == 0
    assert match(small_model, features, tmp_path / "full") == 0
    small, full = (recalls(tmp_path / name)["PatchNetVLAD"]["all_queries"] for name in ("small", "full"))
    assert abs(small["1"] - full["1"]) <= 1 / 18 + 1e-9 and small["10"] == full["10"]
    size = (tmp_path / "index/patchfeats_psize2_place00_0.npy").stat().st_size
    whole = (features / "index/patchfeats_psize2_place00_0.npy").stat().st_size
    assert size < whole * (0.51 if dtype == "float16" else 0.27)


@pytest.mark.parametrize(("dtype", "file"), [("pq8", "patchfeats_psize2"), ("map24", "patchfeats_psize1")])
def test_codes_of_patches(small_model, features, tmp_path, capsys, dtype, file):
    """Codes rank nearly as the descriptors do, resume with the folder's own codec, and are bound to it."""
    options = [*small_model, "--set", f"feature_extract.feature_dtype={dtype}"]
    assert extract(options, INDEX_LIST, tmp_path / "index") == 0
    assert extract([*options, "--queries"], QUERY_LIST, tmp_path / "query") == 0
    size = (tmp_path / f"index/{file}_place00_0.npy").stat().st_size
    assert size < 0.3 * (tmp_path / "query/patchfeats_psize2_query00_0.npy").stat().st_size
    for similarity in ("float32", "int8"):
        chosen = ["--set", f"feature_match.similarity={similarity}"]
        assert match(small_model, tmp_path, tmp_path / similarity, *chosen) == 0
    assert match(small_model, features, tmp_path / "full") == 0
    coded, rounded, full = (
        recalls(tmp_path / name)["PatchNetVLAD"]["all_queries"] for name in ("float32", "int8", "full")
    )
    assert coded == rounded
    assert abs(coded["1"] - full["1"]) <= 2 / 18 + 1e-9 and coded["10"] >= full["10"] - 1 / 18 - 1e-9

    codec = (tmp_path / "index/patchcodec.npz").read_bytes()
    kept = (tmp_path / f"index/{file}_place03_0.npy").read_bytes()
    (tmp_path / f"index/{file}_place03_0.npy").unlink()
    assert extract(options, INDEX_LIST, tmp_path / "index") == 0
    assert (tmp_path / f"index/{file}_place03_0.npy").read_bytes() == kept
    assert (tmp_path / "index/patchcodec.npz").read_bytes() == codec

    capsys.readouterr()
    assert extract(options, QUERY_LIST, tmp_path / "other") == 0
    (tmp_path / "index/patchcodec.npz").write_bytes((tmp_path / "other/patchcodec.npz").read_bytes())
    assert match(small_model, tmp_path, tmp_path / "out") == 2
    assert extract(options, INDEX_LIST, tmp_path / "index") == 2
    (tmp_path / "index/patchcodec.npz").write_bytes(codec[:-100])
    assert match(small_model, tmp_path, tmp_path / "out") == 2
    (tmp_path / "index/patchcodec.npz").unlink()
    assert match(small_model, tmp_path, tmp_path / "out") == 2
    messages = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    expected = ("is the codec of another folder", "another one", "is not the codec", "is missing")
    assert len(messages) == 4
    assert all(words in message for words, message in zip(expected, messages, strict=True))


def test_packed_features_rank_as_files_do(small_model, features, tmp_path):
    options = [*small_model, "--set", "feature_extract.layout=packed"]
    for name, listed in (("query", QUERY_LIST), ("index", INDEX_LIST)):
        assert extract(options, listed, tmp_path / name) == 0
    assert len(list((tmp_path / "index").glob("*.npy"))) == 2  # the global descriptors and one block
    assert match(small_model, tmp_path, tmp_path / "packed") == 0
    assert match(small_model, features, tmp_path / "files") == 0
    for name in ("NetVLAD_predictions.txt", "PatchNetVLAD_predictions.txt", "recalls.txt"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()


def test_coded_queries_are_refused(small_model, features, tmp_path, capsys):
    options = [*small_model, "--set", "feature_extract.feature_dtype=map4"]
    assert extract(options, QUERY_LIST, tmp_path / "query") == 0
    (tmp_path / "index").symlink_to(features / "index")
    assert match(small_model, tmp_path, tmp_path / "out") == 2
    assert "holds codes, and queries are compared as they are" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "places"), [("pq33", "model's 32 dimensions"), ("map129", "map's 128 channels")])
def test_more_bytes_than_dimensions_are_refused(small_model, tmp_path, capsys, dtype, places):
    options = [*small_model, "--set", f"feature_extract.feature_dtype={dtype}"]
    assert extract(options, QUERY_LIST, tmp_path / "query") == 2
    told = f"feature_dtype = {dtype}: expected at most a byte for each of the {places}"
    assert told in capsys.readouterr().err


def test_predictions_of_another_method(small_model, features, tmp_path):
    given = tmp_path / "pairs.npy"
    np.save(given, np.tile(np.array([7, 3, 5]), (18, 1)))
    options = [*small_model, "--set", f"feature_match.pred_input_path={given}"]
    assert match(options, features, tmp_path / "out") == 0
    (first, *_) = read_pairs(tmp_path / "out/NetVLAD_predictions.txt")
    names = (ROOT / "dataset_imagenames" / INDEX_LIST).read_text().split()
    assert first.database == (names[7], names[3], names[5])


def test_global_models_write_the_first_stage_only(small_model, tmp_path):
    options = [*small_model, "--set", "global_params.pooling=netvlad"]
    for name, listed in (("query", QUERY_LIST), ("index", INDEX_LIST)):
        assert extract(options, listed, tmp_path / name) == 0
    assert not list(tmp_path.glob("*/patchfeats*"))
    assert match(options, tmp_path, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*_predictions.txt")) == ["NetVLAD_predictions.txt"]


def test_pictures_of_their_own_size(small_model, tmp_path):
    sizes = {"a.png": (200, 150), "b.png": (150, 200), "c.png": (200, 150)}
    for name, size in sizes.items():
        Image.open(EXAMPLES / "database/place00_0.jpg").resize(size).save(tmp_path / name)
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(sizes))
    own = [f"--set=feature_{part}.imageresize{side}=0" for part in ("extract", "match") for side in "wh"]
    options = [*small_model, *own]
    for name in ("query", "index"):
        assert extract(options, listed, tmp_path / name, tmp_path) == 0
    assert match(options, tmp_path, tmp_path / "out", truth=None, query_list=listed, index_list=listed) == 0
    assert [row.database[0] for row in read_pairs(tmp_path / "out/PatchNetVLAD_predictions.txt")][1] == "b.png"


def test_match_two_prints_and_draws(small_model, tmp_path, capsys):
    scores = []
    for second in ("place00_0.jpg", "place05_0.jpg"):
        arguments = ["--first_im_path", str(EXAMPLES / "queries/query00_0.jpg")]
        arguments += ["--second_im_path", str(EXAMPLES / "database" / second), "--plot_save_path", str(tmp_path)]
        assert match_two([*small_model, *arguments]) == 0
        line = capsys.readouterr().out.splitlines()[0]
        before, after = "Similarity score between the two images is: ", ". Larger scores indicate better matches."
        assert line.startswith(before) and line.endswith(after)
        scores.append(float(line.removeprefix(before).removesuffix(after)))
    assert scores[0] > scores[1]
    with Image.open(tmp_path / "patchMatchings.png") as figure:
        assert figure.width > 1000


def test_names_that_need_care(small_model, tmp_path):
    """Equal stems, spaces, other alphabets, grey, palette and transparent pictures."""
    source = Image.open(EXAMPLES / "database/place00_0.jpg")
    for name, mode in (("a/1.png", "L"), ("b/1.png", "RGBA"), ("b/Straße 1.png", "P"), ("b/街.jpg", "RGB")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        source.convert(mode).save(tmp_path / name)
    listed = tmp_path / "list.txt"
    assert gen_image_file_list(
        ["--dataset_root_dir", str(tmp_path), "--out_file", str(listed), "--recursive"]
    ) == 0  # fmt: skip
    for name in ("query", "index"):
        assert extract(small_model, listed, tmp_path / name, tmp_path) == 0
    assert match(small_model, tmp_path, tmp_path / "out", truth=None, query_list=listed, index_list=listed) == 0
    rows = read_pairs(tmp_path / "out/PatchNetVLAD_predictions.txt")
    assert {row.query for row in rows} == {"a/1.png", "b/1.png", "b/Straße 1.png", "b/街.jpg"}


def test_all_bad_pictures_are_named_before_anything_is_described(small_model, tmp_path, capsys):
    (tmp_path / "empty.jpg").touch()
    whole = (EXAMPLES / "database/place00_0.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "good.jpg").write_bytes(whole)
    (tmp_path / "list.txt").write_text("good.jpg\nempty.jpg\ntorn.jpg\nabsent.jpg\n")
    assert extract(small_model, tmp_path / "list.txt", tmp_path / "out", tmp_path) == 2
    line = failure(capsys)
    assert "3 of 4 pictures" in line and all(name in line for name in ("empty.jpg", "torn.jpg", "absent.jpg"))
    assert not list((tmp_path / "out").glob("*.npy"))


def test_one_picture_database(small_model, features, tmp_path):
    (tmp_path / "one.txt").write_text("database/place00_0.jpg\n")
    assert extract(small_model, tmp_path / "one.txt", tmp_path / "index") == 0
    (tmp_path / "query").symlink_to(features / "query")
    assert match(small_model, tmp_path, tmp_path / "out", truth=None, index_list=tmp_path / "one.txt") == 0
    assert all(len(row.database) == 1 for row in read_pairs(tmp_path / "out/PatchNetVLAD_predictions.txt"))
    assert np.isfinite(np.load(tmp_path / "out/scores.npz")["fused"]).all()


def test_what_does_not_fit_is_one_line(small_model, features, tmp_path, capsys):
    shuffled = tmp_path / "shuffled.txt"
    listed = require_file(QUERY_LIST, "dataset_imagenames").read_text().splitlines(keepends=True)
    shuffled.write_text("".join(reversed(listed)))
    cases = [
        (["--set", "feature_match.matcher=RANSAK"], {}, "matcher=RANSAK"),
        (["--set", "feature_match.mather=RANSAC"], {}, "mather"),
        (["--set", "global_params.num_pcs=16"], {}, "16"),
        (["--set", "global_params.patch_sizes=2,4"], {}, "patch_sizes"),
        (["--set", "feature_match.imageresizew=320"], {}, "imageresizew = 320"),
        (["--set", "feature_match.index=Fla"], {}, "index=Fla"),
        (["--set", "feature_match.pred_input_path=absent.npy"], {}, "absent.npy"),
        ([], {"query_list": INDEX_LIST}, "utmQ has 18 rows"),
        ([], {"query_list": INDEX_LIST, "truth": None}, "query"),
        ([], {"truth": "absent.npz"}, "absent.npz"),
        ([], {"query_list": shuffled}, "example.npz: was made for another query list"),
        (["--distance_unit", "frames"], {"truth": None}, "--distance_unit: needs --ground_truth_path"),
        (["--device", "gpu"], {}, "--device: gpu"),
        (["--posDistThr", "-1"], {}, "-1"),
    ]
    for more, changes, expected in cases:
        options = [option for option in small_model if not (more[:1] == ["--device"] and option == "--nocuda")]
        assert match([*options, *more], features, tmp_path / "out", **changes) == 2, expected
        line = failure(capsys)
        assert expected in line and "Traceback" not in line


def test_features_of_another_model_are_refused(small_model, features, tmp_path, capsys):
    changed = [*small_model, "--set", "train.seed=5"]
    fitting = [
        "--dataset_root_dir",
        str(EXAMPLES / "database"),
        "--output_path",
        str(tmp_path / "other_WPCA32.pth.tar"),
    ]
    assert fit_model([*changed, *fitting]) == 0
    other = [*changed, "--set", f"global_params.resumepath={tmp_path / 'other_WPCA'}"]
    assert match(other, features, tmp_path / "out") == 2
    assert "checkpoint" in failure(capsys)
    assert extract(other, INDEX_LIST, features / "index") == 2
    assert "--overwrite" in failure(capsys)


def test_a_model_is_fitted_on_several_folders(small_model, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    for number in range(2):
        shutil.copy(EXAMPLES / "queries" / f"query0{number}_0.jpg", tmp_path / "more" / f"new{number}.jpg")
    folders = ["--dataset_root_dir", str(EXAMPLES / "database"), str(tmp_path / "more")]
    output = tmp_path / "both_WPCA32.pth.tar"
    assert fit_model([*small_model, *folders, "--output_path", str(output)]) == 0
    assert torch.load(output, weights_only=True)["fitted_on"] == "32 pictures"
    assert fit_model([*small_model, *folders, "--dataset_file_path", "a.txt", "--output_path", "b.pth.tar"]) == 2
    assert "belongs to one folder" in failure(capsys)
    (tmp_path / "more" / "broken.jpg").write_bytes(b"")
    assert fit_model([*small_model, *folders, "--output_path", str(output), "--overwrite"]) == 2
    assert "1 of 3 pictures cannot be read" in (line := failure(capsys)) and "broken.jpg" in line


def test_models_are_written_under_names_that_load(small_model, tmp_path, capsys):
    source = ["--dataset_root_dir", str(EXAMPLES / "database"), "--output_path"]
    for name, more, said in (
        ("own_WPCA64.pth.tar", [], "own_WPCA64.pth.tar: its name says 64 dimensions, [global_params] num_pcs 32"),
        ("there.pth.tar", [], "there.pth.tar: exists already (--overwrite replaces it)"),
        ("folder", ["--overwrite"], "folder: a folder"),
        ("foo", [], "foo: expected a name that ends in .pth.tar, such as foo.pth.tar"),
    ):
        (tmp_path / "there.pth.tar").touch()
        (tmp_path / "folder").mkdir(exist_ok=True)
        assert fit_model([*small_model, *source, str(tmp_path / name), *more]) == 2
        assert said in failure(capsys)
    odd = tmp_path / "my model.pth"
    assert fit_model([*small_model, *source, str(odd), "--set", "global_params.num_pcs=16"]) == 0
    told, ini, options = capsys.readouterr().out.splitlines()
    assert told == f"model in {odd}" and ini.endswith(f": resumepath = {odd}; num_pcs = 16")
    words = [*shlex.split(options.removeprefix("or as options: ")), "--plot_save_path", str(tmp_path), "--nocuda", "-q"]
    assert match_two(words) == 0
    assert match_two([*words, "--set", "global_params.num_pcs=64"]) == 2
    advice = failure(capsys)
    assert f"resumepath = {odd} and num_pcs = 16" in advice


def test_a_missing_checkpoint_names_the_ways_out(small_model, tmp_path, capsys):
    options = [*small_model, "--set", f"global_params.resumepath={tmp_path / 'none_WPCA'}"]
    assert extract(options, INDEX_LIST, tmp_path / "out") == 2
    assert "none_WPCA32.pth.tar" in (line := failure(capsys)) and "builtin.ini" in line


def test_interrupted_downloads_and_offline(monkeypatch, tmp_path, capsys):
    def unreachable(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("patchnetvlad.downloads.require_answer", unreachable)
    monkeypatch.setattr("patchnetvlad.commands.models.download_folder", lambda: tmp_path)
    assert download_models(["-q", "--models", "mapillary_WPCA512.pth.tar"]) == 2
    line = failure(capsys)
    assert "no network" in line and "builtin.ini" in line and not list(tmp_path.iterdir())


def test_downloads_are_checked_and_renamed(monkeypatch, tmp_path):
    content = b"weights"

    class Metadata:
        etag = "0" * 64
        size = 2_500_000

    def fetch(repository, name, local_dir):
        path = Path(local_dir) / name
        path.write_bytes(content)
        return str(path)

    monkeypatch.setattr("patchnetvlad.downloads.require_answer", lambda url: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: Metadata)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("patchnetvlad.commands.models.download_folder", lambda: tmp_path)
    name = "pittsburgh_WPCA128.pth.tar"
    assert download_models(["-q", "--models", name]) == 2  # another hash
    assert not list(tmp_path.iterdir())
    Metadata.etag = hashlib.sha256(content).hexdigest()
    assert download_models(["-q", "--models", name]) == 0
    assert (tmp_path / name).read_bytes() == content
    assert (tmp_path / f"{name}.sha256").read_text().split() == [Metadata.etag, name]


def test_kapture_to_msls(tmp_path, capsys):
    (tmp_path / "pairs.txt").write_text("# kapture format: 1.1\nq/1.jpg, db/7.jpg, 1\nq/1.jpg, db/8.jpg, 0.5\n")
    assert convert_kapture_to_msls([str(tmp_path / "pairs.txt"), str(tmp_path / "msls.txt")]) == 0
    assert (tmp_path / "msls.txt").read_text() == "1 7 8\n"


@pytest.mark.parametrize(
    "script", ["feature_extract", "feature_match", "match_two", "match_realtime", "download_models", "tools/fit_model"]
)
def test_help_says_the_defaults(script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / f"{script}.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and "default:" in shown.stdout


def test_features_of_another_precision_are_not_mixed_with(small_model, features, tmp_path, capsys):
    rough = [*small_model, "--set", "feature_extract.precision=bfloat16"]
    assert extract(rough, QUERY_LIST, tmp_path / "query") == 0
    rows = [np.load(folder / "query/globalfeats.npy") for folder in (features, tmp_path)]
    assert 0.98 < (rows[0] * rows[1]).sum(axis=1).min() < 1 - 1e-7
    assert match(rough, features, tmp_path / "results") == 2
    assert "precision" in failure(capsys)


class _OddMaps(Encoder):
    """Filters whose maps have more, or fewer, positions than whole strides fit into a picture."""

    channels, extra = 8, 0
    geometry = EncoderGeometry(stride=16, receptive_field=16, padding=0)

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 8, 16, stride=16)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        beyond = 16 * self.extra
        return self.layer(torch.nn.functional.pad(pictures, (0, beyond, 0, beyond), "replicate"))


class _LargerMaps(_OddMaps):
    extra = 1


class _SmallerMaps(_OddMaps):
    extra = -1


@pytest.mark.parametrize(("kind", "side", "fits"), [(_LargerMaps, 64, True), (_SmallerMaps, 80, False)])
def test_maps_of_other_sizes_than_strides_tell(kind, side, fits, tmp_path, monkeypatch, capsys):
    """A stride of 16 tells 4 positions of 64 pixels, where there are 5, and 5 of 80, where there are 4."""
    monkeypatch.setitem(ENCODERS, "odd", kind)
    write_checkpoint(tmp_path / "odd.pth.tar", PlaceModel("odd", "patchnetvlad", 4, 0, (5,), (1,)))
    listed = tmp_path / "list.txt"
    listed.write_text("database/place00_0.jpg\ndatabase/place01_0.jpg\n")
    settings = ["backbone=odd", f"resumepath={tmp_path / 'odd'}", "num_pcs=0", "patch_sizes=5", "strides=1"]
    options = [f"global_params.{one}" for one in settings] + ["feature_match.patchweights2use=1"]
    options += [f"feature_{part}.imageresize{one}={side}" for part in ("extract", "match") for one in "wh"]
    shared = ["--config_path", "rootsift.ini", "--dataset_root_dir", str(EXAMPLES), "-q"]
    shared += [word for option in options for word in ("--set", option)]
    described = ["--dataset_file_path", str(listed), "--output_features_dir", str(tmp_path / "features")]
    status = feature_extract([*shared, *described])
    if not fits:
        assert status == 2
        told = capsys.readouterr().err
        assert "database/place00_0.jpg: a patch of size 5 is larger than the feature map, which has 4×4" in told
        assert len(told.splitlines()) == 1
        return
    assert status == 0
    matched = [f"--{part}_file_path={listed}" for part in ("query", "index")]
    matched += [f"--{part}_input_features_dir={tmp_path / 'features'}" for part in ("query", "index")]
    assert feature_match([*shared, *matched, f"--result_save_folder={tmp_path / 'results'}"]) == 0
    rankings = read_pairs(tmp_path / "results" / "PatchNetVLAD_predictions.txt")
    assert [ranking.database[0] for ranking in rankings] == [ranking.query for ranking in rankings]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_patches_larger_than_the_map_are_refused(small_model, tmp_path, capsys, dtype):
    sizes = ["--set", "global_params.patch_sizes=2,9", "--set", f"feature_extract.feature_dtype={dtype}"]
    assert extract([*small_model, *sizes], INDEX_LIST, tmp_path / "features") == 2
    line = failure(capsys)
    assert "size 9" in line and "7×10 positions" in line
    assert not (tmp_path / "features").exists()


def test_small_pictures_of_their_own_size_are_named(small_model, tmp_path, capsys):
    own = [item for key in ("extract", "match") for item in ("--set", f"feature_{key}.imageresizew=0")]
    for name, size in (("large.png", (96, 96)), ("small.png", (32, 40))):
        Image.new("RGB", size, "orange").save(tmp_path / name)
    (tmp_path / "list.txt").write_text("large.png\nsmall.png\n")
    options = [*small_model, *own]
    assert extract(options, tmp_path / "list.txt", tmp_path / "features", tmp_path) == 2
    line = failure(capsys)
    assert "small.png: a patch of size 3" in line and "2×2 positions" in line


def test_output_folders_that_are_files(small_model, features, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "within"):
        assert extract(small_model, INDEX_LIST, folder) == 2
        assert "a file is in the place of a folder" in failure(capsys)
        assert match(small_model, features, folder) == 2
        assert "a file is in the place of a folder" in failure(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_folders_without_permission(small_model, features, tmp_path, capsys, monkeypatch):
    def refuse(self, *more, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert extract(small_model, INDEX_LIST, tmp_path / "new") == 2
    assert "Permission denied; no permission there" in failure(capsys)
    assert match(small_model, features, tmp_path / "new") == 2
    assert "Permission denied; no permission there" in failure(capsys)


@pytest.mark.parametrize(
    "name", ["NetVLAD_predictions.txt", "scores.npz", "recalls.txt", "recalls.json", "judged.npz", "report.html"]
)
def test_result_files_that_cannot_be_replaced(small_model, features, tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert match(small_model, features, tmp_path, "--report") == 2
    line = failure(capsys)
    assert f"{tmp_path / name}: cannot be written (Is a directory; a folder is in its place)" in line
    assert not list(tmp_path.glob(".writing*"))


def test_feature_files_that_cannot_be_replaced(small_model, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("database/place03_0.jpg\n")
    assert extract(small_model, tmp_path / "list.txt", tmp_path / "features") == 0
    path = tmp_path / "features/patchfeats_psize2_place03_0.npy"
    path.unlink()
    path.mkdir()
    for more in ((), ("--overwrite",)):
        assert extract(small_model, tmp_path / "list.txt", tmp_path / "features", EXAMPLES, *more) == 2
        line = failure(capsys)
        assert str(tmp_path / "features") in line and "a folder is in its place" in line
