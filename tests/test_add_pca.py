"""add_pca.py writes a checkpoint that projects and whitens as the formulas say, and refuses what cannot be."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import HEIGHT, WIDTH, run, small
from tiny_run import EXAMPLES

from patchnetvlad import model_fitting
from patchnetvlad.checkpoints import build_model, read_checkpoint
from patchnetvlad.commands.pairs import match_two
from patchnetvlad.commands.training import add_pca
from patchnetvlad.config import Config, FeatureExtractConfig, GlobalParams, TrainConfig
from patchnetvlad.images import image_batches
from patchnetvlad.model import PlaceModel
from patchnetvlad.model_fitting import add_projection
from patchnetvlad.training_data import read_cities
from patchnetvlad.whitening import fit_wpca, whiteness_error


@pytest.fixture(scope="module")
def checkpoint(msls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trained = run(msls, tmp_path_factory.mktemp("runs"), small(), epochs=1)
    return trained.folder / "checkpoints/model_best.pth.tar"


@pytest.fixture
def mine(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(checkpoint, tmp_path / "mine.pth.tar"))


def arguments(root: Path, resume: Path, num_pcs: int, *more: str) -> list[str]:
    settings = {
        "global_params.backbone": "rootsift",
        "global_params.num_pcs": str(num_pcs),
        "train.cities": "trondheim,london",
        "train.val_cities": "cph,sf",
        "train.imageresizew": str(WIDTH),
        "train.imageresizeh": str(HEIGHT),
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    paths = ["--dataset_root_dir", str(root), "--resume_path", str(resume)]
    return [*paths, "--threads", "2", "--nocuda", *overrides, *more]


def descriptors(model: PlaceModel, paths: list[Path]) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([model(batch) for _, batch in image_batches(paths, HEIGHT, WIDTH, 8)]).numpy()


def test_wpca_of_the_training_cities(msls: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add_pca(arguments(msls, mine, 12)) == 0
    captured = capsys.readouterr()
    written = mine.with_name("mine_WPCA12.pth.tar")
    first, ini, options = captured.out.splitlines()
    assert first == f"checkpoint in {written}"
    copied = shlex.split(options)[shlex.split(options).index("--config_path") + 1]
    assert ini == f"to use it, in a copy of {copied}, [global_params]: resumepath = {written}; num_pcs = 12"
    pictures = [str(path) for path in sorted(msls.glob("train_val/london/query/images/*.jpg"))[:2]]
    compared = ["--first_im_path", pictures[0], "--second_im_path", pictures[1], "--plot_save_path", str(mine.parent)]
    assert match_two([*shlex.split(options.removeprefix("or as options: ")), *compared, "--nocuda"]) == 0
    assert "WPCA: 12 dimensions of 512" in captured.err and "of the variance of 33 descriptors" in captured.err
    assert "their covariance is within" in captured.err
    before, after = read_checkpoint(mine), read_checkpoint(written)
    assert after.num_pcs == 12 and after.extras["epoch"] == before.extras["epoch"]
    assert all(torch.equal(after.state[key], value) for key, value in before.state.items())
    assert 0 < after.extras["explained_variance"] < 1

    plain = build_model(before, GlobalParams(pooling="netvlad", num_pcs=0, backbone="rootsift"))
    whitened = build_model(after, GlobalParams(pooling="netvlad", num_pcs=12, backbone="rootsift"))
    # Panoramas are in the folders, and must not take part
    cities = read_cities(msls, ["trondheim", "london"])
    paths = [path for city in cities for path in city.database.paths]
    samples = descriptors(plain, paths).astype(np.float64)
    projected = samples @ after.state["WPCA.0.weight"].flatten(1).numpy().T + after.state["WPCA.0.bias"].numpy()
    np.testing.assert_allclose(projected.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(projected.T), np.eye(12), atol=5e-3)
    expected = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(descriptors(whitened, paths), expected, atol=1e-4)


def test_a_projection_is_replaced(msls: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add_pca(arguments(msls, mine, 12)) == 0
    twelve = mine.with_name("mine_WPCA12.pth.tar")
    capsys.readouterr()
    assert add_pca(arguments(msls, twelve, 5)) == 0
    assert "its WPCA of 12 dimensions is dropped" in capsys.readouterr().err
    assert read_checkpoint(mine.with_name("mine_WPCA12_WPCA5.pth.tar")).num_pcs == 5


def test_lists_and_pittsburgh(
    msls: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(path.relative_to(msls).as_posix() for path in msls.glob("train_val/*/database/images/*.jpg"))[:9]
    (tmp_path / "pitts30k_imageNames_index.txt").write_text("\n".join(names))
    monkeypatch.chdir(tmp_path)
    assert add_pca(arguments(msls, mine, 4, "--dataset_choice", "pitts")) == 0
    assert "variance of 9 descriptors" in capsys.readouterr().err
    (tmp_path / "some.txt").write_text("\n".join(names[:6]))
    assert add_pca(arguments(msls, mine, 4, "--dataset_file_path", "some.txt")) == 2
    assert "mine_WPCA4.pth.tar: exists already (--overwrite replaces it)" in capsys.readouterr().err
    prefix = mine.with_name("mine")  # as good as the whole name
    assert add_pca(arguments(msls, prefix, 4, "--dataset_file_path", "some.txt", "--overwrite")) == 0
    assert "variance of 6 descriptors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_pcs", "more", "message"),
    [
        (33, [], "num_pcs = 33 needs more than 33 samples, and there are 33"),
        (4096, [], "num_pcs = 4096 needs more than 4096 samples, and there are 33"),
        (0, [], "num_pcs = 0"),
        (4, ["--dataset_choice", "pitts"], "pitts30k_imageNames_index.txt: no such file"),
        (4, ["--set", "global_params.backbone=vgg16"], "made for backbone = rootsift"),
        (4, ["--set", "global_params.vladv2=True"], "vladv2 must be False"),
        (4, ["--set", "train.cities=boston"], "for city boston"),
    ],
)
def test_mistakes_end_in_one_line(
    num_pcs: int, more: list[str], message: str, msls: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add_pca(arguments(msls, mine, num_pcs, "-q", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in mine.parent.iterdir()] == ["mine.pth.tar"]


def test_vgg16_keys_with_wpca_are_the_published_ones(msls: Path, published_checkpoint: Path, tmp_path: Path) -> None:
    resume = Path(shutil.copy(published_checkpoint, tmp_path / "vgg.pth.tar"))
    size = ["--set", "train.imageresizew=64", "--set", "train.imageresizeh=48", "--set", "train.cities=london"]
    assert add_pca(arguments(msls, resume, 6, "--set", "global_params.backbone=vgg16", *size)) == 0
    written = torch.load(tmp_path / "vgg_WPCA6.pth.tar", weights_only=True)
    published = torch.load(resume, weights_only=True)["state_dict"]
    assert written["state_dict"].keys() == published.keys()
    assert written["state_dict"]["WPCA.0.weight"].shape == (6, 8192, 1, 1)
    assert written["num_pcs"] == 6


def test_whiteness_tells_white_from_other() -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((300, 20)) @ np.diag(np.linspace(0.1, 3, 20))
    assert whiteness_error(samples, fit_wpca(samples, 10)) < 1e-6
    rotated = fit_wpca(samples, 10, whitening=0)
    assert whiteness_error(samples, rotated) == pytest.approx(rotated.eigenvalues[0] - 1, rel=1e-6)


@pytest.mark.parametrize(("whitens", "white"), [("all", True), ("changes", False)])
def test_what_is_whitened(whitens: str, white: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Pictures as they are and changed are white together, or the differences between them are."""
    names = sorted((Path(__file__).parent.parent / "example_images/database").glob("*.jpg"))[:14]
    config = small(augmentation=("noise", "darkness", "turn"), whitens=whitens, whitening=1.0, num_clusters=4)
    config = replace(config, global_params=replace(config.global_params, num_pcs=6))
    torch.manual_seed(0)
    model = PlaceModel("rootsift", "netvlad", 4)
    with caplog.at_level("INFO"):
        fit = add_projection(model, names, config, progress=False)
    assert fit.num_samples == 2 * len(names) and len(fit.weight) == 6
    said = re.search(r"covariance is within (\S+) of the identity", caplog.text)
    assert said is not None and (float(said[1]) < 1e-3) == white


def test_of_many_pictures_some_are_clustered(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Drawn by the seed, so that the model is the same again; WPCA is fitted to as many as it has samples for."""
    monkeypatch.setattr(model_fitting, "CLUSTER_PICTURES", 5)
    monkeypatch.setattr(model_fitting, "WPCA_SAMPLES", 20)
    caplog.set_level("INFO")
    pictures = sorted((EXAMPLES / "database").iterdir())[:24]
    params = GlobalParams(backbone="rootsift", pooling="netvlad", num_pcs=8, threads=2)
    size = FeatureExtractConfig(imageresizew=64, imageresizeh=48)
    config = Config(feature_extract=size, global_params=params, train=TrainConfig(num_clusters=4, seed=3))
    seeded = replace(config, train=replace(config.train, seed=4))
    models = [model_fitting.fit_model(each, pictures, torch.device("cpu"))[0] for each in (config, config, seeded)]
    positions = 5 * 4 * 3  # 16 pixels apart; fewer than the 100 that are taken of a picture
    assert caplog.text.count(f"k-means: 4 clusters of {positions} local descriptors") == 3
    assert caplog.text.count("8 dimensions to 20 descriptors") == 3
    first, again, other = (model.state_dict()["pool.centroids"] for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_fewer_are_clustered_where_local_descriptors_are_long() -> None:
    assert model_fitting._pictures_to_cluster(128) == 2000
    assert model_fitting._pictures_to_cluster(2048) == 2**30 // (4 * 2048 * 100)
