"""Files are found as given, beside the configuration, among shipped files and in the older layout."""

from pathlib import Path

import pytest

from patchnetvlad import paths
from patchnetvlad.errors import UserError
from patchnetvlad.paths import Kind, download_folder, find_file, require_file, shipped_folder


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the package in it; the current folder is another one."""
    root = tmp_path / "checkout"
    touch(root / "pyproject.toml")
    touch(root / "configs" / "speed.ini")
    (root / "patchnetvlad").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(paths, "_PACKAGE", root / "patchnetvlad")
    monkeypatch.setattr(paths.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return root


@pytest.fixture
def wheel(checkout: Path) -> Path:
    """The package folder of an installation, with shipped files inside."""
    (checkout / "pyproject.toml").unlink()
    touch(checkout / "patchnetvlad" / "configs" / "speed.ini")
    return checkout / "patchnetvlad"


def test_this_checkout_has_its_files() -> None:
    assert (shipped_folder("configs") / "performance.ini").is_file()
    assert find_file("performance", "configs") == shipped_folder("configs") / "performance.ini"


@pytest.mark.parametrize(
    "name", ["speed.ini", "speed", "configs/speed.ini", "./configs/speed", "patchnetvlad/configs/speed.ini"]
)
def test_configuration_names(checkout: Path, name: str) -> None:
    assert find_file(name, "configs") == checkout / "configs" / "speed.ini"


def test_configuration_names_in_a_wheel(wheel: Path) -> None:
    for name in ("speed", "configs/speed.ini", "patchnetvlad/configs/speed.ini"):
        assert find_file(name, "configs") == wheel / "configs" / "speed.ini"


def test_as_given_comes_first_then_beside_the_ini(checkout: Path, tmp_path: Path) -> None:
    shipped = touch(checkout / "dataset_imagenames" / "list.txt")
    assert find_file("list.txt", "dataset_imagenames") == shipped
    ini = touch(tmp_path / "project" / "my.ini")
    beside = touch(tmp_path / "project" / "list.txt")
    assert find_file("list.txt", "dataset_imagenames", ini) == beside
    assert find_file("list.txt", "dataset_imagenames", ini.parent) == beside
    given = touch(tmp_path / "elsewhere" / "list.txt")
    assert find_file("list.txt", "dataset_imagenames", ini) == given
    assert find_file(str(shipped), "dataset_imagenames", ini) == shipped


def test_current_folder_named_like_a_configuration(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "speed").mkdir()
    assert find_file("speed", "configs") == checkout / "configs" / "speed.ini"


def test_checkpoints_of_both_layouts(checkout: Path, tmp_path: Path) -> None:
    names = [
        "./pretrained_models/m512.pth.tar",
        "pretrained_models/m512.pth.tar",
        "patchnetvlad/pretrained_models/m512.pth.tar",
        "./patchnetvlad/pretrained_models/m512.pth.tar",
        "m512.pth.tar",
    ]
    places = [  # from the last searched to the first
        checkout / "patchnetvlad" / "pretrained_models",
        tmp_path / "elsewhere" / "patchnetvlad" / "pretrained_models",
        checkout / "pretrained_models",
    ]
    for place in places:
        checkpoint = touch(place / "m512.pth.tar")
        assert [find_file(name, "pretrained_models") for name in (names[0], names[4])] == [checkpoint] * 2
    for name in names:
        assert find_file(name, "pretrained_models") is not None


def test_a_name_that_begins_with_another_kind(checkout: Path) -> None:
    picture = touch(checkout / "example_images" / "a.jpg")
    assert find_file("patchnetvlad/example_images/a.jpg", "dataset_imagenames") == picture


def test_downloads(checkout: Path) -> None:
    assert download_folder() == checkout / "pretrained_models"
    assert not download_folder().exists()


def test_downloads_of_a_wheel(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "patchnetvlad" / "pretrained_models"
    assert download_folder() == folder
    checkpoint = touch(folder / "m512.pth.tar")
    assert find_file("./pretrained_models/m512.pth.tar", "pretrained_models") == checkpoint


@pytest.mark.parametrize(
    ("platform", "place"), [("win32", ("local",)), ("darwin", ("Library", "Caches")), ("linux", (".cache",))]
)
def test_user_cache_of_each_system(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, place: tuple[str, ...]
) -> None:
    monkeypatch.setattr(paths.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download_folder() == tmp_path.joinpath(*place, "patchnetvlad", "pretrained_models")


def test_missing_files_name_the_places(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        require_file("pretrained_models/none.pth.tar", "pretrained_models", tmp_path / "project" / "my.ini")
    message = str(caught.value)
    assert message.startswith("pretrained_models/none.pth.tar: no such file")
    for folder in ("elsewhere/pretrained_models", "project/pretrained_models", "checkout/pretrained_models"):
        assert str(tmp_path / folder) in message
    assert "download_models" in message
    with pytest.raises(UserError, match="shipped: speed"):
        require_file("sped", "configs")


@pytest.mark.parametrize("kind", ["configs", "dataset_gt_files", "pretrained_models", "example_images"])
@pytest.mark.parametrize("name", ["", ".", "/", "~", "a" * 5000, "nul\0", "patchnetvlad", "configs"])
def test_odd_names_are_not_found(checkout: Path, kind: Kind, name: str) -> None:
    assert find_file(name, kind) is None
    with pytest.raises(UserError):
        require_file(name, kind)
