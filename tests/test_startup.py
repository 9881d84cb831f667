"""What a command imports before it works, what it leaves behind when it refuses, what the package imports."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import patchnetvlad
from patchnetvlad.config import CHANGES, ENCODERS, LOSSES, MATCHERS
from patchnetvlad.errors import UserError
from patchnetvlad.ini import load_config

SCRIPTS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in (ROOT, ROOT / "tools")
    for path in folder.glob("*.py")
    if path.name not in ("setup.py", "hubconf.py")
)
ANSWERED_WITHOUT = {"torch", "torchvision", "timm", "sklearn", "matplotlib", "faiss", "h5py", "jinja2", "cv2"}
"""What `--help` and errors about paths and keys are answered without."""
WORKED_WITHOUT = {"torchvision", "timm", "sklearn", "scipy", "h5py", "pyproj", "jinja2", "matplotlib"}
"""What pictures are described and compared without."""

ANSWERS = """
import contextlib, io, json, sys
from importlib import import_module
module, name, calls = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
command = getattr(import_module(module), name)
answers = []
for arguments in calls:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = command(arguments)
        except SystemExit as ended:
            status = ended.code
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps([answers, sorted(sys.modules)]))
"""


def run_python(code: str, *arguments: str, folder: Path = ROOT) -> list[Any]:
    """What a Python process of its own prints last, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


Case = tuple[list[str], str]


def each(beginning: list[str], *cases: Case) -> list[Case]:
    return [([*beginning, *arguments], said) for arguments, said in cases]


EXAMPLES, ABSENT = str(ROOT / "example_images"), "nowhere/absent"
LISTS = ["--query_file_path", "example_imageNames_query.txt", "--index_file_path", "example_imageNames_index.txt"]
BUNDLED = str(ROOT / "pretrained_models/rootsift_WPCA512.pth.tar")
FEATURES = ["--query_input_features_dir", EXAMPLES, "--index_input_features_dir", EXAMPLES]
LISTED = ["--dataset_file_path", "example_imageNames_query.txt"]
CONFIGURED = [
    (["--config_path", ABSENT], f"{ABSENT}: no such file"),
    (["--set", "global_params.num_pc=4"], "unknown key"),
    (["--set", "global_params.threads=-1"], "expected a whole number"),
    (["--device", "gpu"], "--device: gpu"),
]
ONE_GPU = (["--set", "global_params.ngpu=2"], "uses one GPU")
NAMES = [  # of tables whose modules import torch
    (["--set", "feature_match.matcher=ransak"], "expected one of RANSAC, spatialApproximator, spatialSimilarity"),
    (["--set", "feature_match.index=Flatt"], "such as HNSW32"),
    (["--set", "global_params.backbone=vgg17"], "resnet50, dinov2, vgg16, rootsift"),
    (["--set", "global_params.backbone=vgg16:3"], "half:ENCODER"),
    (["--set", "global_params.backbone=half:timm"], "half:ENCODER"),
    (["--set", "global_params.patch_backbone=vgg17"], "None, or one of resnet50"),
    (["--set", "train.loss=hinge"], "expected one of triplet, multi_similarity"),
    (["--set", "train.augmentation=turn,fog"], "some of turn, roll, zoom"),
]
WEIGHTS = [(["--set", f"global_params.resumepath={ABSENT}"], "no such checkpoint")]
PRETRAINED = [
    (["--set", f"train.pretrained={ABSENT}"], f"{ABSENT}: no such file"),
    (["--set", "train.pretrained=package:absent"], "no such package"),
]

TRAINING = ["--dataset_root_dir", EXAMPLES, "--config_path", "train.ini"]
LOCATED = ["--ground_truth_path", "example.npz", "--index_file_path", LISTS[-1]]
LOCATED += ["--index_input_features_dir", EXAMPLES, "--picture", "queries/query00_0.jpg"]
LOCATED += ["--dataset_root_dir", EXAMPLES]
ROOT_ABSENT = (["--dataset_root_dir", ABSENT], f"{ABSENT}: no such folder")
WRONG_ARGUMENTS = {  # of every command: arguments that it refuses, and what its line must say
    "feature_extract": each(
        [*LISTED, "--dataset_root_dir", EXAMPLES],
        *CONFIGURED,
        *NAMES,
        *WEIGHTS,
        (["--set", "global_params.ngpu=2", "--nocuda"], "ngpu = 2: --device cpu uses no GPU"),
        ROOT_ABSENT,
        (["--dataset_file_path", ABSENT], f"{ABSENT}: no such file"),
        (["--engine", "spark"], "'spark'"),
        (["--address", "auto"], "--address auto: needs --engine ray"),
        (["--worker_cpus", "0"], "--worker_cpus"),
    ),
    "feature_match": each(
        [*LISTS, *FEATURES],
        *CONFIGURED,
        *NAMES,
        (["--set", "global_params.ngpu=2", "--nocuda"], "ngpu = 2: --device cpu uses no GPU"),
        ROOT_ABSENT,
        (["--index_file_path", ABSENT], f"{ABSENT}: no such file"),
        (["--index_input_features_dir", ABSENT], f"{ABSENT}: no such folder"),
        (["--ground_truth_path", ABSENT], f"{ABSENT}: no such file"),
        (["--formats", "odd"], "'odd'"),
        (["--set", f"feature_match.pred_input_path={ABSENT}"], f"{ABSENT}: no such file"),
        (["--set", f"feature_match.index={ABSENT}.json"], f"{ABSENT}.json: no such file"),
        (["--set", "feature_match.imageresizew=32"], "imageresizew = 32"),
        (["--address", "auto"], "--address auto: needs --engine ray"),
    ),
    "tools/build_index": each(
        [*LISTS[2:], *FEATURES[2:]],
        *CONFIGURED[:3],
        ROOT_ABSENT,
        (["--index_file_path", ABSENT], f"{ABSENT}: no such file"),
        (["--index_input_features_dir", ABSENT], f"{ABSENT}: no such folder"),
        (["--output_path", "made/index.faiss"], "ends in .json"),
        (["--shards", "0"], "--shards"),
        (["--recall", "2"], "--recall"),
    ),
    "match_two": each(
        [],
        *CONFIGURED,
        *NAMES,
        *WEIGHTS,
        ONE_GPU,
        (["--first_im_path", ABSENT, "--second_im_path", ABSENT], f"{ABSENT}: no such file"),
        (["--video", ABSENT], f"{ABSENT}: no such file"),
    ),
    "match_realtime": each(
        [], *CONFIGURED, *NAMES, *WEIGHTS, ONE_GPU, (["--video", ABSENT], f"{ABSENT}: no such file")
    ),
    "download_models": each([], (["--models", "odd"], "'odd'")),
    "tools/fit_model": each(
        ["--dataset_root_dir", EXAMPLES, "--output_path", "made/new.pth.tar"],
        *CONFIGURED,
        *NAMES,
        *PRETRAINED,
        ONE_GPU,
        (["--set", "train.augmentation=turn"], "a global model alone"),
        (["--set", "global_params.patch_backbone=vgg16"], "combine_models.py"),
        ROOT_ABSENT,
        (["--dataset_file_path", ABSENT], f"{ABSENT}: no such file"),
    ),
    "train": each(
        TRAINING,
        *CONFIGURED,
        *NAMES,
        *PRETRAINED,
        (["--set", "train.imageresizew=0", "--set", "feature_extract.imageresizew=0"], "above 0"),
        ROOT_ABSENT,
        (["--dataset_csv", ABSENT], f"{ABSENT}: no such file"),
        (["--resume_path", ABSENT], f"{ABSENT}"),
        (["--nEpochs", "0"], "--nEpochs"),
    ),
    "tools/make_training_csv": each(
        [*LISTS, "--ground_truth_path", "example.npz", "--part", "train", "--out_file", "made/table.csv"],
        (["--index_file_path", ABSENT], f"{ABSENT}: no such file"),
        (["--ground_truth_path", "pitts30k_val.npz"], "tools/make_dataset.py pitts30k PICTURES --split val"),
        (["--part", "test"], "'test'"),
    ),
    "add_pca": each(
        [*TRAINING, "--resume_path", str(ROOT / "pretrained_models/rootsift_WPCA512.pth.tar")],
        *CONFIGURED,
        *NAMES,
        ONE_GPU,
        (["--set", "global_params.num_pcs=0"], "expected the number of dimensions"),
        ROOT_ABSENT,
        (["--resume_path", ABSENT], f"{ABSENT}"),
        (["--dataset_file_path", ABSENT], f"{ABSENT}: no such file"),
    ),
    "tools/evaluate_poses": each(
        ["--predictions", ABSENT, "--database_poses", ABSENT, *LISTS],
        ROOT_ABSENT,
        (["--query_file_path", ABSENT], f"{ABSENT}: no such file"),
        ([], f"{ABSENT}: "),
    ),
    "tools/locate": each(
        LOCATED,
        *CONFIGURED,
        *NAMES,
        *WEIGHTS,
        ONE_GPU,
        (["--set", "feature_match.pred_input_path=pairs.txt"], "belongs to a list of queries"),
        ROOT_ABSENT,
        (["--ground_truth_path", ABSENT], f"{ABSENT}: no such file"),
        (["--index_input_features_dir", ABSENT], f"{ABSENT}: no such folder"),
        (["--picture", ABSENT], f"{ABSENT}: no such file"),
    ),
    "tools/make_dataset": [(["nordland", ABSENT], f"{ABSENT}: no such folder"), (["odd", "."], "'odd'")],
    "tools/measure": [([ABSENT], ABSENT), ([], "expected result folders")],
    "tools/reproduce": each(
        ["corridor", "--dataset_root_dir", EXAMPLES], *CONFIGURED[:2], ROOT_ABSENT, ([], "corridor")
    ),
    "tools/gen_image_file_list": each(["--out_file", "made/list.txt"], ROOT_ABSENT),
    "tools/convert_kapture_to_msls": [([ABSENT, "made/msls.txt"], ABSENT)],
    "tools/export_onnx": each(
        ["--output_path", "made/model.onnx"],
        *CONFIGURED[:2],
        *WEIGHTS,
        (["--output_path", "made/model.odd"], "must end in"),
    ),
    "tools/export_hloc": each(
        ["--features_dir", EXAMPLES, *LISTED, "--output_path", "made/features.h5"],
        ROOT_ABSENT,
        (["--features_dir", ABSENT], f"{ABSENT}: no such folder"),
        (["--dataset_file_path", ABSENT], f"{ABSENT}: no such file"),
    ),
    "tools/recognize": each(
        ["--database", f"{EXAMPLES}/database", "--queries", f"{EXAMPLES}/queries"],
        *CONFIGURED,
        *NAMES,
        ONE_GPU,
        *WEIGHTS,
        (["--database", ABSENT], f"{ABSENT}: no such folder"),
        (["--position_csv", ABSENT, ABSENT], f"{ABSENT}: no such file"),
    ),
    "tools/combine_models": each(
        ["--global_path", ABSENT, "--patches_path", ABSENT, "--output_path", "made/both.pth.tar"],
        ([], f"{ABSENT}: no such file"),
        (["--num_pcs", "0"], "--num_pcs"),
        (["--global_path", BUNDLED, "--patches_path", BUNDLED, "--output_path", BUNDLED], "exists already"),
    ),
    "tools/make_bundled_model": each(
        ["--dataset_root_dir", ABSENT, "--work_dir", "made", "--output_path", "made/model.pth.tar"],
        ([], f"{ABSENT}: no such folder"),
        (["--dataset_root_dir", EXAMPLES], "images.csv: no such file"),
    ),
    "tools/draw_architecture": each([], (["--root", ABSENT], "README.md")),
    "tools/demo": each([], (["--device", "gpu"], "--device: gpu")),
    "tools/render_example_places": each([], (["--width", "3"], "--width")),
    "tools/render_msls": each(["--output_dir", "made"], (["--places", "0"], "--places")),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_answers_about_arguments_need_no_torch_and_leave_nothing(script, tmp_path):
    (line,) = re.findall(r"^from (\S+) import (\w+)$", (ROOT / f"{script}.py").read_text(), re.MULTILINE)
    cases = WRONG_ARGUMENTS[script]
    calls = [["--help"], ["--version"], *(arguments for arguments, _ in cases)]
    answers, modules = run_python(ANSWERS, *line, json.dumps(calls), folder=tmp_path)
    assert set(modules) & ANSWERED_WITHOUT == set()
    assert answers[0][0] == 0 and "--help" in answers[0][1]
    assert answers[1][:2] == [0, f"patchnetvlad {patchnetvlad.__version__}\n"]
    for (arguments, said), (status, out, errors) in zip(cases, answers[2:], strict=True):
        assert status == 2 and not out, arguments
        assert said in errors and len(errors.splitlines()) == 1, (arguments, errors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("table", [MATCHERS, ENCODERS, LOSSES, CHANGES])
def test_every_name_of_a_table_stands_for_something(table):
    assert all(table[name] is table.find(name) and not isinstance(table[name], str) for name in table)


@pytest.mark.parametrize("table", [MATCHERS, ENCODERS], ids=["matcher", "encoder"])
def test_what_is_added_to_a_table_may_be_configured(table, tmp_path):
    text = "[feature_match]\nmatcher = Mine" if table is MATCHERS else "[global_params]\nbackbone = Mine"
    (tmp_path / "a.ini").write_text(text)
    with pytest.raises(UserError, match="expected one of"):
        load_config(tmp_path / "a.ini")
    table["Mine"] = table[next(iter(table))]
    try:
        loaded = load_config(tmp_path / "a.ini")
        assert "Mine" in (loaded.feature_match.matcher, loaded.global_params.backbone)
    finally:
        del table["Mine"]


FACTORIES = """
Flat IVF16,Flat HNSW32 PQ8 OPQ8_16,IVF4,PQ8 SQ8 SQfp16 SQbf16 LSH LSHr L2norm,Flat PCA16,Flat PCAR16,SQ8 PCAW8,Flat
IVF16,PQ4x4fs PQ8x4fs,RFlat IDMap,Flat IDMap2,Flat NSG16 NSG16,Flat RR16,Flat ITQ16,LSH RQ4x4 PRQ2x2x4 LSQ4x4
PLSQ2x2x4 Pad128,Flat IMI2x4,Flat IVF16_HNSW8,Flat PQ8np HNSW32_SQ8 ZnLattice2x4_6 Flat,Refine(SQ8) IVF4(HNSW8),Flat
PQ8,Refine(Flat) RaBitQ IVF16,RaBitQ RQ4x4_Nqint8 IVF16,RQ2x4fs_32_Nrq2x4 IVF4,LSQ2x4_Nfloat
"""


def test_every_factory_string_of_faiss_may_be_configured(tmp_path):
    faiss = pytest.importorskip("faiss")
    for text in FACTORIES.split():
        faiss.index_factory(64, text)
        (tmp_path / "a.ini").write_text(f"[feature_match]\nindex = {text}\n")
        assert load_config(tmp_path / "a.ini").feature_match.index == text
    for text in ("flat", "Flatt", "hnsw32", "16", "IVF,Flat", "IVF16,PQ", "PCA,Flat", "SQ", "OPQ,PQ8"):
        with pytest.raises(RuntimeError):
            faiss.index_factory(64, text)
        (tmp_path / "a.ini").write_text(f"[feature_match]\nindex = {text}\n")
        with pytest.raises(UserError, match=r"index = .*: expected Flat, another"):
            load_config(tmp_path / "a.ini")


BUILT = """
import json, sys
from importlib.metadata import packages_distributions
from pathlib import Path
from patchnetvlad.ini import load_config
sizes = [f"feature_{part}.imageresize{side}" for part in ("extract", "match") for side in ("w=160", "h=120")]
config = load_config(Path("configs/builtin.ini"), sizes)
"""


@pytest.mark.parametrize(
    "work",
    [
        "from patchnetvlad import PlaceRecognizer\n"
        "recognizer = PlaceRecognizer.load(config)\n"
        "recognizer.compare(*recognizer.describe(sorted(Path('example_images/queries').iterdir())[:2]))",
        "from patchnetvlad.extraction import extract\n"
        "from patchnetvlad.images import image_batches\n"
        "from patchnetvlad.weights import load_model\n"
        "model, _ = load_model(config)\n"
        "model.describe(next(image_batches(sorted(Path('example_images/queries').iterdir()), 120, 160, 1))[1])",
    ],
    ids=["match_two", "feature_extract"],
)
def test_describing_and_comparing_import_no_more_than_they_use(work):
    modules = set(run_python(BUILT + work + "\nprint(json.dumps(sorted(sys.modules)))"))
    assert "torch" in modules
    assert modules & WORKED_WITHOUT == set()


def test_torch_hub_asks_for_what_is_imported():
    """hubconf names each module of a requirement that describing and comparing imports, and no other."""
    work = (
        "import hubconf\n"
        "places = hubconf.place_recognizer(overrides=sizes)\n"
        "places.compare(*places.describe(sorted(Path('example_images/queries').iterdir())[:2]))\n"
        "print(json.dumps([sorted(sys.modules), hubconf.dependencies]))"
    )
    modules, dependencies = run_python(BUILT + work)
    assert set(dependencies) <= set(modules)
    required = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert required is not None
    names = [name.replace("_", "-") for name in re.findall(r'"([\w-]+)>=', required[1])]
    of_requirement = {name: set() for name in names}
    for module, distributions in packages_distributions().items():
        for name in {name.lower().replace("_", "-") for name in distributions} & set(names):
            of_requirement[name].add(module)
    for name, own in of_requirement.items():
        assert bool(own & set(modules)) == bool(own & set(dependencies)), name


def test_commands_leave_the_log_as_they_found_it(capsys):
    from patchnetvlad.commands.command_line import logger
    from patchnetvlad.commands.examples import render_example_places

    before = logger.level, list(logger.handlers)
    assert render_example_places(["--width", "3", "-v"]) == 2
    assert (logger.level, list(logger.handlers)) == before


def test_the_recognizer_is_the_front_door():
    code = """
import json, os, sys
before = dict(os.environ)
import patchnetvlad
light = "torch" not in sys.modules
from patchnetvlad import PlaceRecognizer
assert PlaceRecognizer.__module__ == "patchnetvlad.recognizer" and light and os.environ == before
assert "PlaceRecognizer" in patchnetvlad.__all__
try:
    patchnetvlad.absent
except AttributeError as error:
    assert "absent" in str(error)
else:
    raise AssertionError
print(json.dumps(["well"]))
"""
    assert run_python(code) == ["well"]


def test_what_is_logged_before_the_folder_is_there_is_not_lost(tmp_path):
    from patchnetvlad.commands.command_line import log_file, logger

    path = tmp_path / "made" / "run.log"
    with pytest.raises(UserError), log_file(path):
        logger.warning("one")
        raise UserError("refused")
    assert not path.parent.exists()
    with log_file(path):
        logger.warning("one")
        path.parent.mkdir()
        logger.warning("two")
    assert [line.rsplit(": ", 1)[1] for line in path.read_text().splitlines()][-2:] == ["one", "two"]
    last = tmp_path / "last" / "run.log"
    with log_file(last):
        logger.warning("before")
        last.parent.mkdir()  # and nothing is logged after it
    assert last.read_text().endswith(": before\n")
