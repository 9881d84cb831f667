"""The habits of the published code: its quick start, weights asked for on a terminal, Pittsburgh to train on."""

import hashlib
import io
import json
import os
import pty
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import ROOT
from PIL import Image
from test_downloads import Hub, hub  # noqa: F401 - the hub is a fixture
from tiny_run import tiny_model

from patchnetvlad import paths
from patchnetvlad.commands.datasets import make_dataset
from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.commands.models import download_models
from patchnetvlad.commands.pairs import match_two
from patchnetvlad.commands.training import add_pca, make_training_csv, train
from patchnetvlad.datasets.matlab import FIELDS

EXAMPLES = ROOT / "example_images"
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "feature_extract.py": feature_extract,
    "feature_match.py": feature_match,
    "match_two.py": match_two,
    "train.py": train,
    "add_pca.py": add_pca,
    "tools/make_dataset.py": make_dataset,
    "tools/make_training_csv.py": make_training_csv,
}
QUICK_START = {  # of the published code, by what each command does; PITTS for its /path/to/your/pitts/dataset
    "index": "python feature_extract.py --config_path patchnetvlad/configs/performance.ini "
    "--dataset_file_path=pitts30k_imageNames_index.txt --dataset_root_dir=PITTS "
    "--output_features_dir patchnetvlad/output_features/pitts30k_index",
    "query": "python feature_extract.py --config_path patchnetvlad/configs/performance.ini "
    "--dataset_file_path=pitts30k_imageNames_query.txt --dataset_root_dir=PITTS "
    "--output_features_dir patchnetvlad/output_features/pitts30k_query",
    "match": "python feature_match.py --config_path patchnetvlad/configs/performance.ini --dataset_root_dir=PITTS "
    "--query_file_path=pitts30k_imageNames_query.txt --index_file_path=pitts30k_imageNames_index.txt "
    "--query_input_features_dir patchnetvlad/output_features/pitts30k_query "
    "--index_input_features_dir patchnetvlad/output_features/pitts30k_index "
    "--ground_truth_path patchnetvlad/dataset_gt_files/pitts30k_test.npz "
    "--result_save_folder patchnetvlad/results/pitts30k",
    "pair": "python match_two.py --config_path patchnetvlad/configs/performance.ini "
    "--first_im_path=patchnetvlad/example_images/tokyo_query.jpg "
    "--second_im_path=patchnetvlad/example_images/tokyo_db.png",
    "train": "python train.py --config_path patchnetvlad/configs/train.ini --cache_path=cache --save_path=saved "
    "--dataset_root_dir=MSLS",
    "pca": "python add_pca.py --config_path patchnetvlad/configs/train.ini --resume_path=SAVED --dataset_root_dir=MSLS",
}


def typed(command: str, *more: str, **places: object) -> int:
    """The exit status of a command as it is typed, with places in capitals put in."""
    for name, place in places.items():
        command = command.replace(name, str(place))
    _, script, *arguments = shlex.split(command)
    return COMMANDS[script]([*arguments, *more])


def write_pittsburgh(root: Path, part: str, places: Sequence[int]) -> None:
    """Example places as pictures and a .mat file of NetVLAD's form: two views of each place, one of them a query."""
    known = json.loads((EXAMPLES / "geometry.json").read_text())["pictures"]
    sides: dict[str, list[tuple[str, float, float]]] = {"queries": [], "database": []}
    for side, folder, beginning in (("queries", "queries_real/000", "query"), ("database", "000", "place")):
        for place in places:
            source = f"{side}/{beginning}{place:02}_0.jpg"
            name = f"000/{part}{place:02}.jpg"
            (root / "Pittsburgh250k" / folder).mkdir(parents=True, exist_ok=True)
            with Image.open(EXAMPLES / source) as picture:
                picture.resize((160, 120)).save(root / "Pittsburgh250k" / folder / Path(name).name)
            sides[side].append((name, known[source]["east"], known[source]["north"]))
    struct: dict[str, object] = {"whichSet": part, "posDistThr": 25.0, "posDistSqThr": 625.0}
    struct["nonTrivPosDistSqThr"] = 100.0
    for side, names_key, utm_key, count_key in (
        ("queries", "qImageFns", "utmQ", "numQueries"),
        ("database", "dbImageFns", "utmDb", "numImages"),
    ):
        cells = np.empty((len(sides[side]), 1), dtype=object)
        cells[:, 0] = [name for name, _, _ in sides[side]]
        struct |= {names_key: cells, utm_key: np.array([row[1:] for row in sides[side]]).T}
        struct[count_key] = float(len(sides[side]))
    (root / "datasets").mkdir(exist_ok=True)
    scipy.io.savemat(root / "datasets" / f"pitts30k_{part}.mat", {"dbStruct": {key: struct[key] for key in FIELDS}})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the published layout's configurations are small, and lists and ground truth are made."""
    shipped = paths._shipped

    def own(kind: str) -> Path:
        return tmp_path / kind if kind.startswith("dataset_") else shipped(kind)

    monkeypatch.setattr(paths, "_shipped", own)
    monkeypatch.chdir(tmp_path)
    settings = dict(option.split("=") for option in tiny_model(tmp_path) if "=" in option)
    text = "[global_params]\nbackbone = rootsift\n"
    for section in ("global_params", "feature_extract", "feature_match"):
        text += f"[{section}]\n" if section != "global_params" else ""
        text += "".join(f"{key.partition('.')[2]} = {settings[key]}\n" for key in settings if key.startswith(section))
    (tmp_path / "patchnetvlad/configs").mkdir(parents=True)
    (tmp_path / "patchnetvlad/configs/performance.ini").write_text(text)
    return tmp_path


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_quick_start_runs_as_typed_or_names_what_is_missing(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pitts = checkout / "pitts"
    write_pittsburgh(pitts, "test", range(4))
    for step in ("index", "query"):
        assert typed(QUICK_START[step], "-q", PITTS=pitts) == 2
        line = failure(capsys)
        assert f"pitts30k_imageNames_{step}.txt: no such file" in line
        maker = re.search(r"made by: (python tools/make_dataset\.py pitts30k PICTURES)\)$", line)
        assert maker
    assert typed(QUICK_START["match"], "-q", PITTS=pitts) == 2
    assert "pitts30k_query: no such folder (python feature_extract.py makes it)" in failure(capsys)
    where = ["--lists_dir", "dataset_imagenames", "--ground_truth_dir", "dataset_gt_files"]
    assert typed(maker[1], *where, PICTURES=pitts) == 0, capsys.readouterr().err
    for step in ("index", "query", "match"):
        assert typed(QUICK_START[step], "-q", PITTS=pitts) == 0
    recalls = Path("patchnetvlad/results/pitts30k/recalls.txt").read_text()
    assert recalls.startswith("Recall NetVLAD@1: ") and "Recall PatchNetVLAD@1: " in recalls
    capsys.readouterr()
    assert typed(QUICK_START["pair"], "-q") == 2
    line = failure(capsys)
    assert "tokyo_query.jpg: no such file" in line and "python match_two.py without pictures compares two" in line
    assert match_two(["--config_path", "patchnetvlad/configs/performance.ini", "-q"]) == 0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tokyo247_imageNames_query.txt", "tokyo247 PICTURES"),
        ("nordland_imageNames_index.txt", "nordland PICTURES"),
        ("mapillarysf_imageNames_query.txt", "msls PICTURES --cities sf"),
        ("pitts250k_train_imageNames_query.txt", "pitts250k PICTURES --split train"),
        ("mine.txt", "makes lists and ground truth"),
        ("search_index.json", "build_index.py makes search indices"),
    ],
)
def test_a_list_that_is_missing_names_its_maker(
    checkout: Path, capsys: pytest.CaptureFixture[str], name: str, arguments: str
) -> None:
    assert typed(QUICK_START["index"].replace("pitts30k_imageNames_index.txt", name), PITTS=".") == 2
    line = failure(capsys)
    assert arguments in line
    found = re.search(r"made by: python tools/make_dataset\.py (.*)\)$", line)
    if found:  # what is named is understood: it then misses the pictures alone
        assert make_dataset(found[1].replace("PICTURES", str(checkout / "absent")).split()) == 2
        assert "ROOT" in failure(capsys)


SMALL = """[global_params]
backbone = rootsift
num_pcs = 4
[train]
cities = trondheim
num_clusters = 4
imageresizew = 64
imageresizeh = 48
lr = 0.01
"""


def test_training_runs_as_typed(checkout: Path, msls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "patchnetvlad/configs/train.ini").write_text(SMALL)
    assert typed(QUICK_START["train"], "-q", "--nEpochs", "1", MSLS=msls) == 0
    (saved,) = Path("saved").glob("*/checkpoints/model_best.pth.tar")
    assert typed(QUICK_START["pca"], "-q", MSLS=msls, SAVED=saved) == 0
    assert saved.with_name("model_best_WPCA4.pth.tar").exists()


def test_pittsburgh_is_trained_on_as_the_page_says(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pitts = checkout / "pitts"
    write_pittsburgh(pitts, "train", range(8))
    write_pittsburgh(pitts, "val", range(8, 12))
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(for part in train val;.*?)^```", page, re.MULTILINE | re.DOTALL)
    within, after = block.replace("\\\n", " ").split("done\n")
    making = [line.strip() for line in within.splitlines()[1:]]
    small = ["--set", "global_params.backbone=rootsift", "--set", "train.num_clusters=4", "--set", "train.lr=0.01"]
    small += ["--set", "train.imageresizew=160", "--set", "train.imageresizeh=120", "-q"]
    for part in ("train", "val"):
        make, convert = (line.replace("${part}", part).replace("$part", part) for line in making)
        where = ["--lists_dir", "dataset_imagenames", "--ground_truth_dir", "dataset_gt_files"]
        assert typed(make, *where, PITTS=pitts) == 0, capsys.readouterr().err
        assert typed(convert) == 0
        rows = Path(f"pitts30k_{part}.csv").read_text().splitlines()
        assert rows[0] == "image,easting,northing,role,city"
        assert rows[1].startswith("Pittsburgh250k/queries_real/000/") and f",{part}_query,pitts30k_{part}" in rows[1]
    training, projecting = after.strip().splitlines()
    assert typed(training, *small, "--nEpochs", "1", PITTS=pitts) == 0
    (best,) = Path("runs").glob("*_pitts/checkpoints/model_best.pth.tar")
    projecting = re.sub(r'"\$\(.*?\)"', str(best), projecting)
    assert typed(projecting, *small, "--set", "global_params.num_pcs=4", PITTS=pitts) == 0
    assert best.with_name("model_best_WPCA4.pth.tar").exists()


def test_frames_are_no_metres(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "frames.npz", utmQ=np.zeros((1, 2)), utmDb=np.zeros((1, 2)), posDistThr=2.0, unit="frames")
    (tmp_path / "list.txt").write_text("a.jpg\n")
    lists = ["--query_file_path", str(tmp_path / "list.txt"), "--index_file_path", str(tmp_path / "list.txt")]
    made = ["--ground_truth_path", str(tmp_path / "frames.npz"), "--part", "val", "--out_file", str(tmp_path / "a.csv")]
    assert make_training_csv([*lists, *made]) == 2
    assert "coordinates in frames" in failure(capsys)
    assert not (tmp_path / "a.csv").exists()


class Terminal:
    """A terminal in place of the process's own, on which somebody has typed an answer already."""

    def __init__(self, patch: pytest.MonkeyPatch, answer: str) -> None:
        self._person, terminal = pty.openpty()
        os.write(self._person, answer.encode())
        self._reading, self.shown = os.fdopen(terminal, "r"), io.StringIO()
        self.shown.isatty = lambda: True  # type: ignore[method-assign]
        patch.setattr(sys, "stdin", self._reading)
        patch.setattr(sys, "stderr", self.shown)

    def __enter__(self) -> io.StringIO:
        return self.shown

    def __exit__(self, *error: object) -> None:
        self._reading.close()
        os.close(self._person)


@pytest.fixture
def offered(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """Where published weights go, which the hub has: 3 MB that are none."""
    hub.files["/TobiasRobotics/Patch-NetVLAD/mapillary_WPCA128.pth.tar"] = b"weights" * 428_571
    monkeypatch.setattr(paths, "_shipped", lambda kind: tmp_path if kind == "pretrained_models" else ROOT / kind)
    monkeypatch.setattr(paths, "download_folder", lambda: tmp_path / "fetched")
    monkeypatch.setattr("patchnetvlad.commands.models.download_folder", lambda: tmp_path / "fetched")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "fetched"


NAME = "mapillary_WPCA128.pth.tar"


@pytest.mark.parametrize(("answer", "fetched"), [("\n", True), ("y\n", True), ("n\n", False), ("\x04", False)])
def test_a_terminal_is_asked_once_with_the_size(
    offered: Path, monkeypatch: pytest.MonkeyPatch, answer: str, fetched: bool
) -> None:
    with Terminal(monkeypatch, answer) as terminal:
        assert match_two(["--config_path", "storage.ini", "--nocuda"]) == 2
        again = match_two(["--config_path", "storage.ini", "--nocuda"]) if fetched else 2
    shown = terminal.getvalue()
    assert shown.count(f"{NAME} (3 MB) is not at hand. Fetch it into {offered}? [Y/n]") == 1
    assert shown.count("[Y/n]") == 1 and again == 2
    assert (offered / NAME).exists() == fetched
    if fetched:  # and only then read, which it cannot be
        assert "cannot be read as a checkpoint" in shown or "is not a torch checkpoint" in shown
    elif answer == "n\n":
        assert "not to be fetched; ways out" in shown
    else:
        assert "there is nobody to ask" in shown


def test_without_a_terminal_weights_are_fetched_and_said(
    offered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert match_two(["--config_path", "storage.ini", "--nocuda"]) == 2
    said = capsys.readouterr().err
    assert f"fetching {NAME} (3 MB) from TobiasRobotics/Patch-NetVLAD into {offered}" in said and "[Y/n]" not in said
    digest = hashlib.sha256((offered / NAME).read_bytes()).hexdigest()
    assert (offered / f"{NAME}.sha256").read_text().split() == [digest, NAME]


@pytest.mark.parametrize(("answer", "fetched"), [("y\n", True), ("n\n", False)])
def test_permission_is_asked_for_where_it_is_wished(
    offered: Path, monkeypatch: pytest.MonkeyPatch, answer: str, fetched: bool
) -> None:
    with Terminal(monkeypatch, answer) as terminal:
        assert download_models(["--models", NAME]) == 0  # asks for nothing: to fetch is what it was called for
        assert "[Y/n]" not in terminal.getvalue()
        (offered / NAME).unlink()
        assert download_models(["--ask_for_permission", "--models", NAME]) == 0
    assert terminal.getvalue().count(f"Fetch {NAME}? [Y/n]") == 1
    assert (offered / NAME).exists() == fetched
