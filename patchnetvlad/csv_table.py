"""CSV files of datasets: named columns, checked values, and errors that say file, line and column."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import UserError

T = TypeVar("T")


class Table:
    """Columns of a CSV file as text, by name; a column without a name (an index) is ignored."""

    def __init__(self, path: Path, columns: dict[str, list[str]]) -> None:
        self.path = path
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), []))

    def has(self, column: str) -> bool:
        return column in self._columns

    def text(self, column: str) -> list[str]:
        """A column as it is; raises UserError when there is none of that name."""
        if column not in self._columns:
            known = ", ".join(self._columns) or "none"
            raise UserError(f"{self.path}: has no column {column} (its columns: {known})")
        return self._columns[column]

    def numbers(self, column: str) -> NDArray[np.float64]:
        """A column of finite numbers."""
        return np.array(self._parsed(column, _finite, "a number"), dtype=np.float64)

    def whole_numbers(self, column: str) -> NDArray[np.int64]:
        return np.array(self._parsed(column, int, "a whole number"), dtype=np.int64)

    def flags(self, column: str) -> NDArray[np.bool_]:
        """A column of True and False, or 1 and 0."""
        return np.array(self._parsed(column, _flag, "True or False"), dtype=bool)

    def choices(self, column: str, known: Sequence[str]) -> list[str]:
        """A column of known words."""

        def parse(text: str) -> str:
            if text not in known:
                raise ValueError
            return text

        return self._parsed(column, parse, f"one of {', '.join(known)}")

    def _parsed(self, column: str, parse: Callable[[str], T], expected: str) -> list[T]:
        values = []
        for row, text in enumerate(self.text(column)):
            try:
                values.append(parse(text.strip()))
            except (KeyError, ValueError) as error:
                line = row + 2  # the header is line 1
                raise UserError(f"{self.path}: line {line}: {column} = {text!r}: expected {expected}") from error
        return values


def read_table(path: Path) -> Table:
    """Read a CSV file with a header line; raises UserError when it cannot be read or a line has other columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{path}: line {reader.line_num}: {len(row)} values for {len(header)} columns (cut off?)"
                    )
                rows.append(row)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (dataset incomplete, or another root?)") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8") from error
    if not header:
        raise UserError(f"{path}: is empty (expected a header line)")
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    return Table(path, {name: list(column) for name, column in zip(header, columns, strict=True) if name})


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}[text.lower()]
