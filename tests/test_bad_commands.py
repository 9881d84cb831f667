"""Bad files given to whole commands: each ends in one line that names the file and the rule, and writes nothing."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from refusals import assert_refused
from test_bad_inputs import CASES, Bad, picture
from test_training import command_line as train_options
from tiny_run import EXAMPLES, example_names, run, tiny_model, write_ground_truth

from patchnetvlad.commands.datasets import make_dataset
from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.commands.models import fit_model
from patchnetvlad.commands.pairs import match_two
from patchnetvlad.commands.places import locate
from patchnetvlad.commands.training import add_pca, train

QUIET = ["-q", "--nocuda"]


class Finished(NamedTuple):
    """A run whose files may be copied: the options of its model, and its folder."""

    options: list[str]
    folder: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    options = tiny_model(folder)
    queries, database = example_names("queries")[:2], example_names("database")[:3]
    write_ground_truth(folder / "truth.npz", queries, database)
    run(options, EXAMPLES, folder, queries, database)
    return Finished(options, folder)


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the run that may be damaged."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copied", ignore=shutil.ignore_patterns("results")))


def some(prefix: str, *labels: str) -> list[Bad]:
    found = [case for case in CASES if case.label.removeprefix(prefix) in labels and case.label.startswith(prefix)]
    assert len(found) == len(labels), (prefix, labels, [case.label for case in found])
    return found


def matching(options: list[str], folder: Path) -> list[str]:
    """feature_match on a copied run."""
    arguments = [*options, "--dataset_root_dir", str(EXAMPLES), "--ground_truth_path", str(folder / "truth.npz")]
    for kind, name in (("queries", "query"), ("database", "index")):
        arguments += [f"--{name}_file_path", str(folder / f"{kind}.txt")]
        arguments += [f"--{name}_input_features_dir", str(folder / kind)]
    return [*arguments, "--result_save_folder", str(folder / "out"), *QUIET]


def extracting(options: list[str], listed: Path, folder: Path) -> list[str]:
    places = ["--dataset_root_dir", str(listed.parent), "--dataset_file_path", str(listed)]
    return [*options, *places, "--output_features_dir", str(folder), *QUIET]


def fitting(options: list[str], folder: Path, written: Path) -> list[str]:
    return [*options, "--dataset_root_dir", str(folder), "--output_path", str(written), *QUIET]


def pair(options: list[str], first: Path, second: Path, folder: Path) -> list[str]:
    pictures = ["--first_im_path", str(first), "--second_im_path", str(second)]
    return [*options, *pictures, "--plot_save_path", str(folder), *QUIET]


def picture_cases() -> list[Bad]:
    def float_tiff() -> bytes:
        import io

        file = io.BytesIO()
        Image.fromarray(np.zeros((9, 9), np.float32)).save(file, "TIFF")
        return file.getvalue()

    def read(path: Path) -> None:
        raise AssertionError("read by commands")

    mine = [Bad("float", "bad.tiff", float_tiff(), read), Bad("trailing", "bad.png", picture("PNG")[:-40], read)]
    kinds = ("JPEG-cut-4", "PNG-cut-4", "WEBP-cut-4", "GIF-cut-2", "bomb-60000", "heic", "text", "zero")
    return [*some("picture-", *kinds), *mine]


@pytest.mark.parametrize("case", picture_cases(), ids=lambda case: case.label)
@pytest.mark.parametrize("command", ["extract", "first", "second", "fit", "locate"])
def test_bad_pictures(
    command: str, case: Bad, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    bad, good = pictures / case.name, EXAMPLES / example_names("database")[0]
    bad.write_bytes(case.content)
    out, options = tmp_path / "out", finished.options
    if command == "extract":
        (pictures / "list.txt").write_text(f"{case.name}\n")
        status = feature_extract(extracting(options, pictures / "list.txt", out))
    elif command == "fit":
        if bad.suffix not in (".jpg", ".jpeg", ".png"):
            bad = bad.rename(bad.with_suffix(".png"))
        out = tmp_path / "out.pth.tar"
        status = fit_model(fitting(options, pictures, out))
    elif command == "locate":
        index = ["--index_file_path", str(finished.folder / "database.txt"), "--dataset_root_dir", str(EXAMPLES)]
        index += ["--index_input_features_dir", str(finished.folder / "database")]
        index += ["--ground_truth_path", str(finished.folder / "truth.npz"), "--positions", str(out)]
        status = locate([*options, *QUIET, "--picture", str(bad), *index])
    else:
        status = match_two(pair(options, *((bad, good) if command == "first" else (good, bad)), out))
    assert_refused(status, capsys.readouterr().err, bad.name)
    assert not out.exists()


def checkpoint_cases() -> list[Bad]:
    return some("checkpoint-", "cut-3", "cut-9", "list", "path", "empty", "text", "html")


@pytest.mark.parametrize("case", checkpoint_cases(), ids=lambda case: case.label)
@pytest.mark.parametrize("command", ["extract", "pair", "train", "add_pca"])
def test_bad_checkpoints(
    command: str, case: Bad, finished: Finished, msls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = tmp_path / "bad.pth.tar", tmp_path / "out"
    bad.write_bytes(case.content)
    options = [*finished.options, "--set", f"global_params.resumepath={tmp_path / 'bad'}"]
    pictures = [EXAMPLES / name for name in example_names("database")[:2]]
    if command == "extract":
        (tmp_path / "list.txt").write_text(f"{pictures[0]}\n")
        status = feature_extract(extracting(options, tmp_path / "list.txt", out))
    elif command == "pair":
        status = match_two(pair(options, *pictures, out))
    elif command == "train":
        status = train(train_options(msls, out, "--resume_path", str(bad)))
    else:
        resumed = ["--resume_path", str(bad), "--dataset_root_dir", str(msls), "--set", "global_params.num_pcs=4"]
        resumed += ["--set", "train.cities=trondheim,london", "--set", "train.val_cities=cph,sf"]
        status = add_pca([*resumed, "--set", "global_params.backbone=rootsift", *QUIET])
    assert_refused(status, capsys.readouterr().err, "bad.pth.tar")
    assert not out.exists()


def features_cases() -> Iterator[tuple[str, str, bytes]]:
    """A label, the file of a run that is replaced, and by what."""
    for case in some("list-", "empty", "utf16", "latin", "nul", "picture"):
        yield case.label, "database.txt", case.content
    truths = ("rows", "flat", "nan", "text", "objects", "negative", "no-utmDb", "pickle", "cut-5", "array")
    for case in some("truth-", *truths):
        yield case.label, "truth.npz", case.content
    manifests = ("no-geometry", "list", "text", "empty", "nested", "line-index", "line-text", "num_pictures-inf")
    for case in some("manifest-", *manifests):
        yield case.label, "database/manifest.jsonl", case.content
    arrays = ("flat", "text", "objects", "complex", "cut-0", "cut-5", "header-petabytes", "header-code", "nan")
    for case in some("npy-", *arrays):
        yield case.label, "database/globalfeats.npy", case.content
        yield f"patch-{case.label}", "database/patch", case.content


@pytest.mark.parametrize(
    ("name", "content"), [case[1:] for case in features_cases()], ids=[c[0] for c in features_cases()]
)
def test_bad_files_of_a_run(
    name: str, content: bytes, finished: Finished, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / name if name != "database/patch" else min((copied / "database").glob("patch*.npy"))
    path.write_bytes(content)
    status = feature_match(matching(finished.options, copied))
    assert_refused(status, capsys.readouterr().err, path.name)


def ini_cases() -> list[Bad]:
    return some("ini-", "twice", "unknown-section", "unknown-key", "utf16", "binary", "nul", "huge")


@pytest.mark.parametrize("case", ini_cases(), ids=lambda case: case.label)
def test_bad_configurations(
    case: Bad, copied: Path, msls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = tmp_path / "bad.ini", tmp_path / "out"
    bad.write_bytes(case.content)
    (tmp_path / "a.txt").write_text("a.jpg\n")
    config = ["--config_path", str(bad)]
    picture_path = EXAMPLES / example_names("database")[0]
    training = ["--dataset_root_dir", str(msls), *QUIET]
    index = ["--index_file_path", str(tmp_path / "a.txt"), "--index_input_features_dir", str(tmp_path)]
    commands: dict[str, Callable[[], int]] = {
        "extract": lambda: feature_extract(extracting(config, tmp_path / "a.txt", out)),
        "match": lambda: feature_match(matching(config, copied)),
        "pair": lambda: match_two(pair(config, picture_path, picture_path, out)),
        "fit": lambda: fit_model(fitting(config, tmp_path, out)),
        "train": lambda: train([*config, *training, "--save_path", str(out)]),
        "add_pca": lambda: add_pca([*config, *training, "--resume_path", str(tmp_path / "a.txt")]),
        "locate": lambda: locate(
            [*config, *QUIET, *index, "--picture", str(picture_path), "--ground_truth_path", "example.npz"]
        ),
    }
    for command in commands.values():
        assert_refused(command(), capsys.readouterr().err, "bad.ini")
    assert not out.exists()


TABLES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "utf16": "key,pano\na,False\n".encode("utf-16"),
    "no column": b"name\na\n",
    "no row": b"key,pano,easting,northing,view_direction,night,all\n",
    "one row": b"key,pano,easting,northing,view_direction,night,all\na,False,1,2,Forward,False,True\n",
    "short": b"key,pano,easting,northing,view_direction,night,all\na,False\n",
    "word": b"key,pano,easting,northing,view_direction,night,all\na,perhaps,here,there,Forward,?,?\n",
}


@pytest.mark.parametrize("content", TABLES.values(), ids=list(TABLES))
@pytest.mark.parametrize("name", ["raw.csv", "postprocessed.csv"])
def test_bad_tables_of_msls(
    name: str, content: bytes, msls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for city in ("trondheim", "london", "cph", "sf"):
        shutil.copytree(msls / "train_val" / city, tmp_path / "msls/train_val" / city)
    for city in ("trondheim", "cph"):
        (tmp_path / "msls/train_val" / city / "query" / name).write_bytes(content)
    out, root = tmp_path / "out", tmp_path / "msls"
    assert_refused(train(train_options(root, out)), capsys.readouterr().err, name)
    lists = ["--lists_dir", str(out), "--ground_truth_dir", str(out)]
    assert_refused(make_dataset(["-q", "msls", str(root), "--cities", "cph", *lists]), capsys.readouterr().err, name)
    assert not out.exists()


@pytest.mark.parametrize("label", ["no-utmDb", "count", "nan", "names", "other", "hdf5", "cut-0", "cut-9", "cut-19"])
def test_bad_structs(label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (case,) = some("mat-", label)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "pitts30k_test.mat").write_bytes(case.content)
    out = tmp_path / "out"
    lists = ["--lists_dir", str(out), "--ground_truth_dir", str(out)]
    assert_refused(
        make_dataset(["-q", "pitts30k", str(tmp_path), *lists]), capsys.readouterr().err, "pitts30k_test.mat"
    )
    assert not out.exists()


def test_an_animation_gives_its_first_frame(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from patchnetvlad.images import read_image

    frames = [Image.new("RGB", (40, 30), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert read_image(tmp_path / name).getpixel((3, 3)) == (200, 0, 0), name
