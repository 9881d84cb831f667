"""The README's architecture is what the imports say, and the checks find what would break it."""

import re
from pathlib import Path

import pytest

from patchnetvlad.architecture.imports import House, Row, circles, read_house, read_imports, violations
from patchnetvlad.commands.architecture import draw_architecture

ROOT = Path(__file__).parent.parent
MOST_MODULES = 60  # that a reader can hold in the flat folder


def test_the_code_is_as_the_readme_says() -> None:
    house, imports = read_house(ROOT / "README.md"), read_imports(ROOT / "patchnetvlad")
    assert violations(house, imports) == []
    assert len(list((ROOT / "patchnetvlad").glob("*.py"))) <= MOST_MODULES


def test_every_module_of_the_method_is_named() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Architecture\n")[2].partition("\n## ")[0]
    house = read_house(ROOT / "README.md")
    for module in read_imports(ROOT / "patchnetvlad"):
        folder, _, name = module.partition(".")
        if folder and folder not in house.annexes:
            assert f"`{name.rpartition('.')[2] or folder}`" in section or f"`{module.rpartition('.')[2]}/`" in section


def test_every_annex_and_row_has_its_sentence() -> None:
    house = read_house(ROOT / "README.md")
    assert [row.name for row in house.rows][:2] == ["ground", "pictures"]
    assert all(len(sentence) > 20 for sentence in (*house.annexes.values(), *(row.sentence for row in house.rows)))
    for annex in house.annexes:
        text = (ROOT / "patchnetvlad" / annex / "__init__.py").read_text(encoding="utf-8")
        assert text.startswith('"""')
        assert text.count("\n") == 1


HOUSE = House(
    (
        Row("ground", ("errors", "config"), "what everything stands on"),
        Row("features", ("netvlad", "encoders/", "model"), "pictures to descriptors"),
    ),
    frozenset({"netvlad"}),
    {"report": "a page"},
)
SOUND = {
    "": frozenset(),
    "errors": frozenset(),
    "config": frozenset({"errors"}),
    "netvlad": frozenset({"errors"}),
    "encoders": frozenset(),
    "encoders.vgg16": frozenset({"errors"}),
    "model": frozenset({"netvlad", "config", "encoders.vgg16"}),
    "report": frozenset(),
    "report.page": frozenset({"model"}),
}


@pytest.mark.parametrize(
    ("module", "imported", "told"),
    [
        ("config", "model", "config: imports model, a later row"),
        ("model", "report.page", "model: imports report.page, which is an annex"),
        ("netvlad", "config", "netvlad: a formula that imports config"),
        ("netvlad", "encoders.vgg16", "netvlad: a formula that imports encoders.vgg16"),
        ("netvlad", "model", "circle: model -> netvlad -> model"),
        ("forgotten", "errors", "forgotten: not in the README's table"),
        ("export.onnx", "model", "export/: not in the README's table"),
        ("encoders.vgg16", "report.page", "encoders.vgg16: imports report.page, which is an annex"),
        ("errors", "encoders.vgg16", "errors: imports encoders.vgg16, a later row"),
    ],
)
def test_what_breaks_the_house_is_told(module: str, imported: str, told: str) -> None:
    assert violations(HOUSE, SOUND) == []
    broken = {**SOUND, module: SOUND.get(module, frozenset()) | {imported}}
    assert told in violations(HOUSE, broken)


def test_a_module_that_is_gone_is_told() -> None:
    rest = {module: imported - {"netvlad"} for module, imported in SOUND.items() if module != "netvlad"}
    assert violations(HOUSE, rest) == ["netvlad: in the README's table, but there is no such module"]


def test_a_circle_is_found_once() -> None:
    ring = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"a"}), "d": frozenset({"a"})}
    assert circles(ring) == [("a", "b", "c", "a")]


def test_imports_are_read_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "annex").mkdir()
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "annex" / "__init__.py").write_text("")
    (tmp_path / "ground.py").write_text("import os\nfrom patchnetvlad import __version__\n")
    (tmp_path / "annex" / "late.py").write_text(
        "def f():\n    from patchnetvlad.ground import g\n    import patchnetvlad.top\n"
    )
    (tmp_path / "top.py").write_text("from patchnetvlad.annex import late\nfrom patchnetvlad import ground\n")
    imports = read_imports(tmp_path)
    assert imports["ground"] == frozenset()
    assert imports["annex.late"] == {"ground", "top"}
    assert imports["top"] == {"annex.late", "ground"}


def test_the_picture_shows_every_module_and_the_one_in_docs_is_new(tmp_path: Path) -> None:
    assert draw_architecture(["--root", str(ROOT), "--output_path", str(tmp_path / "house.svg")]) == 0
    house = read_house(ROOT / "README.md")
    names = [*(module for row in house.rows for module in row.modules), *(f"{annex}/" for annex in house.annexes)]
    for path in (tmp_path / "house.svg", ROOT / "docs" / "architecture.svg"):
        shown = re.findall(r">([a-z0-9_]+/?)</text>", path.read_text(encoding="utf-8"))
        assert sorted(shown) == sorted([*names, *(row.name for row in house.rows), "annexes"]), f"{path}: draw it again"


def test_a_readme_without_the_section_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("# Another project\n")
    assert draw_architecture(["--root", str(tmp_path)]) == 2
    assert "has no section Architecture" in capsys.readouterr().err
