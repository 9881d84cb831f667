"""The command that draws the package's structure."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.architecture.imports import read_house, read_imports, violations
from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.errors import UserError


def draw_architecture(arguments: Sequence[str] | None = None) -> int:
    """Draw the README's table of modules with the imports between them."""
    parser = Parser(
        "Draw the modules of the package, in the rows of the README's table, with the imports between them; refused "
        "where code and table disagree.",
        "draw_architecture.py",
    )
    parser.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="the checkout")
    parser.add_argument(
        "--output_path", type=Path, default=Path("docs/architecture.svg"), metavar="FILE", help="picture"
    )

    return command_line.run(parser, _draw, arguments)


def _draw(args: argparse.Namespace) -> None:
    readme = args.root / "README.md"
    house, imports = read_house(readme), read_imports(args.root / "patchnetvlad")
    wrong = violations(house, imports)
    if wrong:
        raise UserError(f"{readme}: {len(wrong)} differences to the code: {'; '.join(wrong)}")
    from patchnetvlad.architecture.picture import draw_house

    draw_house(house, imports, args.output_path)
    print(f"picture in {args.output_path}")
