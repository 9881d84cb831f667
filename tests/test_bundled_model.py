"""The recipe of the bundled learned model: its table of frames, its settings, and the order of its steps."""

from pathlib import Path

import pytest

from patchnetvlad.checkpoints import read_checkpoint
from patchnetvlad.commands import bundled_model
from patchnetvlad.commands.bundled_model import FITTED, METRES_A_FRAME, frames_table, make_bundled_model
from patchnetvlad.csv_table import write_table
from patchnetvlad.errors import UserError
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.ini import load_config
from patchnetvlad.paths import require_checkpoint, require_file
from patchnetvlad.training_csv import COLUMNS, read_training_csv
from patchnetvlad.training_data import triplet_places

FRAMES = [("a", 1, 3, "floor10"), ("b", 1, 4, "floor10"), ("c", 1, 7, "floor10"), ("d", 1, 8, "floor10")]
FRAMES += [("e", 2, 3, "floor11"), ("f", 2, 4, "floor11"), ("g", 3, 1, "floor3"), ("h", 3, 2, "floor3")]


@pytest.fixture
def floors(tmp_path: Path) -> Path:
    lines = [",".join(map(str, (f"frames/{name}.jpg", *rest))) for name, *rest in FRAMES]
    (tmp_path / "images.csv").write_text("\n".join(["image_path,video_id,frame,label", *lines, ""]))
    return tmp_path


def test_frames_become_places(floors: Path) -> None:
    """Frames side by side are positives; the three next ones are none, but no negatives; other videos are."""
    write_table(floors / "frames.csv", COLUMNS, frames_table(floors / "images.csv"))
    data = read_training_csv(floors / "frames.csv", floors)
    train = load_config(require_file("learn_builtin.ini", "configs")).train
    places = triplet_places(data.train, train.positive_radius, train.negative_radius)
    names = [path.stem for path in places.paths]
    found = {
        names[query]: ([names[row] for row in places.positives[query]], [names[row] for row in places.near[query]])
        for query in range(places.num_queries)
    }
    assert found == {"a": (["b"], ["b"]), "c": (["d"], ["b", "d"]), "e": (["f"], ["f"])}
    assert [city.name for city in data.validation] == ["floor3"]
    assert train.positive_radius / METRES_A_FRAME == pytest.approx(1.5, abs=0.49)


def test_a_table_without_videos_is_refused(floors: Path) -> None:
    (floors / "images.csv").write_text("image_path,frame,label\na.jpg,1,floor10\n")
    with pytest.raises(UserError, match="video_id"):
        frames_table(floors / "images.csv")
    folders = ["--dataset_root_dir", f"{floors}", "--work_dir", f"{floors / 'work'}"]
    assert make_bundled_model([*folders, "--output_path", f"{floors / 'made_WPCA768.pth.tar'}"]) == 2
    assert not (floors / "work").exists()


def test_the_steps_come_in_order_and_a_failure_ends_them(
    floors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is one of the package's commands, and finds what the one before it wrote."""
    calls: list[tuple[str, list[str]]] = []
    fails = ""

    def step(name: str, *written: str) -> None:
        def command(arguments: list[str]) -> int:
            calls.append((name, list(arguments)))
            for path in written:
                target = tmp_path / "work" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
            return int(name == fails)

        monkeypatch.setattr(bundled_model, name, command)

    step("render_msls", "cities/train_val/sf/made")
    step("train", "Nov25_10-00-00_seed3/checkpoints/checkpoint.pth.tar")
    step("fit_model")
    monkeypatch.setattr(bundled_model, "_database_pictures", lambda *_: [floors / "a.jpg", floors / "b.jpg"])
    arguments = ["--dataset_root_dir", f"{floors}", "--work_dir", f"{tmp_path / 'work'}", "--seed", "3"]
    arguments += ["--output_path", f"{tmp_path / 'model_WPCA768.pth.tar'}"]
    assert make_bundled_model(arguments) == 0
    assert [name for name, _ in calls] == ["render_msls", "train", "fit_model"]
    fitting = calls[2][1]
    assert "train.seed=3" in calls[1][1] and {"train.seed=3", *FITTED} < set(fitting)
    (trained,) = (Path(word.partition("=")[2]) for word in fitting if word.startswith("train.pretrained="))
    assert trained.parts[-3:] == ("Nov25_10-00-00_seed3", "checkpoints", "checkpoint.pth.tar") and trained.exists()
    listed = read_image_list(Path(fitting[fitting.index("--dataset_file_path") + 1]), tmp_path)
    assert [path.name for path in listed.paths] == ["a.jpg", "b.jpg"] and listed.paths[0].is_absolute()
    calls.clear()
    fails = "train"
    with pytest.raises(SystemExit) as ended:
        make_bundled_model(arguments)
    assert ended.value.code == 1 and [name for name, _ in calls] == ["train"]  # the cities are there


def test_what_is_learned_from_is_fitted_to(floors: Path, msls: Path) -> None:
    """Database pictures of both sources, none of the places that training is judged by."""
    write_table(floors / "frames.csv", COLUMNS, frames_table(floors / "images.csv"))
    changes = ["train.cities=trondheim,london", "train.val_cities=sf"]
    config = load_config(require_file("learn_builtin.ini", "configs"), changes)
    paths = bundled_model._database_pictures(config, floors, floors / "frames.csv", msls)
    assert [path.stem for path in paths if path.is_relative_to(floors / "frames")] == ["b", "d", "f"]
    of_cities = [path.relative_to(msls).parts for path in paths[3:]]
    assert {parts[:3] for parts in of_cities} == {("train_val", city, "database") for city in ("trondheim", "london")}


def test_the_settings_fit_together() -> None:
    """What is trained and fitted is what builtin.ini describes, which keeps patches of the same WPCA."""
    offline = ["train.pretrained=none"]  # the package that learning starts from need not be installed
    config, fitted, bundled = (
        load_config(require_file(f"{name}.ini", "configs"), changes)
        for name, changes in (("learn_builtin", []), ("learn_builtin", [*FITTED, *offline]), ("builtin", []))
    )
    config.check_training()
    fitted.check_fitting()
    assert config.global_params.backbone == f"half:{fitted.global_params.backbone}"
    for key in ("backbone", "num_pcs", "vladv2"):
        assert getattr(fitted.global_params, key) == getattr(bundled.global_params, key)
    for key in ("imageresizew", "imageresizeh"):
        assert getattr(fitted.feature_extract, key) == getattr(bundled.feature_extract, key)
    checkpoint = read_checkpoint(require_checkpoint(bundled.global_params.resumepath, fitted.global_params.num_pcs))
    assert checkpoint.num_clusters == fitted.train.num_clusters
    assert checkpoint.path.stat().st_size < 10_000_000
