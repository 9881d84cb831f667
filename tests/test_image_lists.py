"""Lists survive what people write into them; no two pictures share the name of their features."""

import hashlib
import json
import random
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from patchnetvlad.errors import UserError
from patchnetvlad.examples.rendered_city import make_city, write_city
from patchnetvlad.image_lists import (
    SIDES,
    hash_names,
    list_file_name,
    list_folder,
    read_image_list,
    unique_feature_names,
    write_image_list,
)
from patchnetvlad.paths import shipped_folder


def test_one_rule_names_the_lists(tmp_path: Path) -> None:
    """The shipped lists and those written anew, by the published names."""
    assert [list_file_name("pitts30k", side) for side in SIDES] == [
        "pitts30k_imageNames_query.txt",
        "pitts30k_imageNames_index.txt",
    ]
    city = make_city(places=2, look_alikes=0)
    write_city(city, tmp_path, "example", size=(32, 24))
    for side, views in zip(SIDES, (city.queries, city.database), strict=True):
        assert (shipped_folder("dataset_imagenames") / list_file_name("example", side)).is_file()
        written = read_image_list(tmp_path / "dataset_imagenames" / list_file_name("example", side), tmp_path)
        assert written.names == tuple(view.name for view in views)


def test_one_list_of_every_kind_of_line(tmp_path: Path) -> None:
    root = tmp_path / "data"
    lines = [
        "./db/1.jpg",
        "",
        "db//2.jpg  ",
        str(root / "db" / "3.jpg"),
        "/other/4.jpg",
        "my photos, new/ü 5.jpg",
        "   ",
        "# 6.jpg",
    ]
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    pictures = read_image_list(path, root)
    names = ("db/1.jpg", "db/2.jpg", "db/3.jpg", "/other/4.jpg", "my photos, new/ü 5.jpg", "# 6.jpg")
    assert pictures.names == names
    assert pictures.paths == (
        *(root / name for name in names[:3]),
        Path("/other/4.jpg"),
        *(root / n for n in names[4:]),
    )
    assert pictures.feature_names == ("1", "2", "3", "4", "ü 5", "# 6")
    assert pictures.source == path
    assert len(pictures) == 6


def test_first_line_does_not_change_the_others(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("robotcar/a.jpg\nday/b.png\n")
    assert read_image_list(path, tmp_path).names == ("robotcar/a.jpg", "day/b.png")


@given(st.text("ab./-_ \n", max_size=12))
def test_lists_of_plain_names_are_read_as_all_others(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_text(f"first.jpg\n{text}")
        names = read_image_list(path, Path(folder)).names
        path.write_text(f"first.jpg\n{text}\nü.jpg", encoding="utf-8")  # which is looked at line by line
        assert read_image_list(path, Path(folder)).names == (*names, "ü.jpg")


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=5) | st.sampled_from(['a", "b', "\\", "é", "\x7f"])))
def test_the_hash_of_names_is_that_of_their_json(names: list[str]) -> None:
    assert hash_names(names) == hashlib.sha256(json.dumps(names).encode()).hexdigest()


def test_absolute_names_below_a_linked_or_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    path = tmp_path / "list.txt"
    path.write_text(f"{tmp_path}/real/a.jpg\n")
    monkeypatch.chdir(tmp_path)
    for root in (Path("real"), Path("link"), tmp_path / "link"):
        assert read_image_list(path, root).names == ("a.jpg",)


def test_a_picture_listed_twice_shares_its_features(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"a/x.jpg\n./a/x.jpg\n{tmp_path}/a/x.jpg\n")
    assert read_image_list(path, tmp_path).feature_names == ("x", "x", "x")


@pytest.mark.parametrize("content", [b"", b" \n\r\n\t\n", b"\xef\xbb\xbf"])
def test_empty_list(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt: names no picture"):
        read_image_list(path, tmp_path)


def test_what_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(UserError, match="No such file"):
        read_image_list(path, tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_image_list(tmp_path, tmp_path)
    for content in (b"\xff\xfea\0.\0", b"PK\x03\x04\x00\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is it a list of pictures"):
            read_image_list(path, tmp_path)


name_parts = st.text(st.characters(exclude_characters="/\0\n\r", codec="utf-8"), min_size=1, max_size=12).filter(
    lambda part: part == part.strip() and part != "."
)
relative_names = st.lists(name_parts, min_size=1, max_size=3).map("/".join)


@given(st.lists(relative_names, min_size=1, max_size=8))
def test_round_trip(names: list[str]) -> None:
    names = [name.removeprefix("\ufeff") or "x" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lists" / "list.txt"
        write_image_list(path, names)
        assert list(read_image_list(path, Path(folder)).names) == names


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\rb.jpg", " a.jpg", "a.jpg ", "", "caf\udce9.jpg"])
def test_names_that_a_list_cannot_hold(tmp_path: Path, name: str) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(UserError, match="rename the picture"):
        write_image_list(path, ["good.jpg", name])
    assert not path.exists()


def test_known_feature_names() -> None:
    names = ["day/1.jpg", "night/1.jpg", "day/2.jpg", "night/3.JPG", "night/3.png", "/data/2b.jpg"]
    assert unique_feature_names(names) == (
        "day_1.jpg",
        "night_1.jpg",
        "2",
        "night_3.JPG",
        "night_3.png",
        "2b",
    )


def test_stems_as_published() -> None:
    assert unique_feature_names(["q/@001.5@x@.jpg", "q/a.b.c.png"]) == ("@001.5@x@", "a.b.c")


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


# Few letters, so that stems, paths and joined paths meet often.
meeting_names = st.lists(
    st.text("aAb_-.é", min_size=1, max_size=3).filter(lambda part: part not in (".", "..")), min_size=1, max_size=3
).map("/".join)


@given(st.lists(meeting_names | relative_names, max_size=12), st.randoms())
@example(["a/b.jpg", "c/b.jpg", "x/a_b.jpg.png"], random.Random(0))
@example(["a/b_c.jpg", "a_b/c.jpg", "b_c.png", "c.png"], random.Random(0))
@example(["a/X.jpg", "b/x.jpg", "a/é.jpg", "a/e\u0301.jpg"], random.Random(0))
@example(["/a/x.jpg", "a/x.jpg"], random.Random(0))
@example(["a/" + "é" * 150 + "1.jpg", "b/" + "é" * 150 + "1.jpg", "é" * 150 + ".jpg"], random.Random(0))
def test_feature_names_keep_pictures_apart(names: list[str], shuffler: random.Random) -> None:
    chosen = unique_feature_names(names)
    assert len(chosen) == len(names)
    of_picture = dict(zip(names, chosen, strict=True))
    assert len({folded(name) for name in chosen}) == len(of_picture)
    for name, feature_name in zip(names, chosen, strict=True):
        assert of_picture[name] == feature_name
        assert not set(feature_name) & set("/\\\0")
        assert len(feature_name.encode()) <= 200
    shuffled = list(names)
    shuffler.shuffle(shuffled)
    assert unique_feature_names(shuffled) == tuple(of_picture[name] for name in shuffled)


def test_feature_names_can_be_files(tmp_path: Path) -> None:
    names = ["a/" + "ж" * 200 + ".jpg", "b/" + "ж" * 200 + ".jpg", "x\\y.jpg"]
    for feature_name in unique_feature_names(names):
        (tmp_path / f"patchfeats_psize10_{feature_name}.npy.partial").touch()
    assert len(list(tmp_path.iterdir())) == 3


def test_folder_in_natural_order(tmp_path: Path) -> None:
    wanted = ["1.jpg", "2.PNG", "10.jpeg", "10a.webp", "sub/2.tiff", "sub/10.pgm"]
    for name in [*wanted, "notes.txt", ".hidden.jpg", "sub/deep/1.bmp", ".git/1.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert list_folder(tmp_path) == tuple(wanted[:4])
    assert list_folder(tmp_path, recursive=True) == (*wanted, "sub/deep/1.bmp")


def test_linked_folders_are_entered(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.jpg").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "db").symlink_to(tmp_path / "data")
    assert list_folder(tmp_path / "root", recursive=True) == ("db/1.jpg",)


def test_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="entered with --recursive"):
        list_folder(tmp_path)
