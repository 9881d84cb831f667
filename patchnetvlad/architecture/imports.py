"""What the README says of the package's structure, and what the code's imports say."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchnetvlad.errors import UserError
from patchnetvlad.files import read_text

PACKAGE = "patchnetvlad"

_ROW = re.compile(r"^\| (\w[\w ]*) \| ((?:\*?`\w+/?`\*?(?:, )?)+) \| (.+) \|$", re.MULTILINE)
_MODULE = re.compile(r"(\*?)`(\w+/?)`")
_ANNEX = re.compile(r"^\| `(\w+)/` \| (.+) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One row of the method: its name, its modules from left to right, and its sentence.

    A folder whose modules all belong to the row stands as one, such as `encoders/`.
    """

    name: str
    modules: tuple[str, ...]
    sentence: str


@dataclass(frozen=True)
class House:
    """The structure as the README tells it.

    rows: of the method, in the order in which data passes them; formulas: modules that the README sets in italics;
    annexes: folders of the package that are not the method, with their sentences.
    """

    rows: tuple[Row, ...]
    formulas: frozenset[str]
    annexes: Mapping[str, str]

    def row_of(self) -> dict[str, int]:
        """The number of every module's row."""
        return {module: number for number, row in enumerate(self.rows) for module in row.modules}


def read_house(readme: Path) -> House:
    """The rows and annexes in the README's section Architecture; raises UserError when there is none."""
    text = read_text(readme, "the README")
    _, heading, section = text.partition("\n## Architecture\n")
    if not heading:
        raise UserError(f"{readme}: has no section Architecture (not the README of a checkout?)")
    section = section.partition("\n## ")[0]
    rows, formulas = [], set()
    for name, cell, sentence in _ROW.findall(section):
        modules = _MODULE.findall(cell)
        rows.append(Row(name, tuple(module for _, module in modules), sentence))
        formulas |= {module for italics, module in modules if italics}
    return House(tuple(rows), frozenset(formulas), dict(_ANNEX.findall(section)))


def read_imports(package: Path) -> dict[str, frozenset[str]]:
    """The modules that each module of the package imports, anywhere in its text: dotted names below the package.

    `netvlad` is a module of the flat folder, `report.page` one of an annex, `report` an annex itself.
    """
    files = {_dotted(path.relative_to(package)): path for path in sorted(package.rglob("*.py"))}
    return {
        module: frozenset(_imported(ast.parse(path.read_text(encoding="utf-8")), files))
        for module, path in files.items()
    }


def violations(house: House, imports: Mapping[str, frozenset[str]]) -> list[str]:
    """Where the code is not as the README says, a line each; empty when it is."""
    row_of = house.row_of()
    rooms = {module: _room(module, row_of) for module in imports if module and module not in _folders(imports)}
    method = [module for module, room in rooms.items() if room in row_of]
    strangers = {room for room in rooms.values() if room not in row_of and room.rstrip("/") not in house.annexes}
    differences = [f"{room}: not in the README's table" for room in sorted(strangers)]
    gone = [room for room in (*row_of, *(f"{annex}/" for annex in house.annexes)) if room not in rooms.values()]
    differences += [f"{room}: in the README's table, but there is no such module" for room in gone]
    for module in method:
        for other in sorted(imports[module]):
            room = _room(other, row_of)
            if room.rstrip("/") in house.annexes:
                differences.append(f"{module}: imports {other}, which is an annex")
            elif row_of.get(room, -1) > row_of[rooms[module]]:
                differences.append(f"{module}: imports {other}, a later row")
    pure = house.formulas | {"errors"}
    for module in sorted(house.formulas & set(method)):
        differences += [f"{module}: a formula that imports {other}" for other in sorted(imports[module] - pure)]
    return differences + [f"circle: {' -> '.join(circle)}" for circle in circles(imports)]


def _room(module: str, row_of: Mapping[str, int]) -> str:
    """What stands for a module in the table: itself, or the folder that it is in."""
    folder = module.partition(".")[0]
    return f"{folder}/" if "." in module or f"{folder}/" in row_of else module


def _folders(imports: Mapping[str, frozenset[str]]) -> set[str]:
    return {module.partition(".")[0] for module in imports if "." in module}


def circles(imports: Mapping[str, frozenset[str]]) -> list[Sequence[str]]:
    """Modules that import each other in a circle, each circle once, from its first module round to it."""
    done: set[str] = set()
    closed: list[Sequence[str]] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            closed.append((*path[path.index(module) :], module))
        elif module not in done:
            for other in sorted(imports.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(imports):
        visit(module, ())
    return closed


def _dotted(path: Path) -> str:
    segments = path.with_suffix("").parts
    return ".".join(segments[:-1] if segments[-1] == "__init__" else segments)


def _imported(tree: ast.Module, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE:
            base = node.module.partition(".")[2]
            for alias in node.names:
                whole = f"{base}.{alias.name}".removeprefix(".")
                if whole in modules:
                    yield whole
                elif base:
                    yield base
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(f"{PACKAGE}."))
