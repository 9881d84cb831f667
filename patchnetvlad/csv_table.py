"""CSV files of datasets: named columns, checked values, and errors that say file, line and column."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import UserError, counted
from patchnetvlad.files import some_of, write_text

T = TypeVar("T")

# Names that columns go by, in any case; the first that is there counts
PICTURES = ("name", "path", "image", "filename", "file")
LATITUDES, LONGITUDES = ("latitude", "lat"), ("longitude", "lon", "lng")
EASTINGS, NORTHINGS = ("easting", "utm_east", "utm_easting", "x"), ("northing", "utm_north", "utm_northing", "y")

_DELIMITERS = ",;\t"
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


class Positions(NamedTuple):
    """Where the pictures of a table were taken: float64 n×2.

    Latitude and longitude in degrees where ``geographic`` is true, else easting and northing in metres.
    """

    values: NDArray[np.float64]
    geographic: bool


class Table:
    """Columns of a CSV file as text without blanks at its ends, found by name in any case.

    A column is asked for by its name, or by several names of which the first that is there counts; every method
    raises UserError when there is none. A column without a name (an index) is ignored.
    """

    def __init__(
        self, path: Path, columns: dict[str, list[str]], lines: list[int], decimal_commas: bool = False
    ) -> None:
        """lines: of each row, where it stands in the file, counted from 1; decimal_commas: 1,5 is a number too."""
        self.path = path
        self.lines = lines
        self._decimal_commas = decimal_commas
        self._columns = columns

    def __len__(self) -> int:
        return len(self.lines)

    def find(self, names: str | Sequence[str]) -> str | None:
        """The first of the names that is a column."""
        wanted = [names] if isinstance(names, str) else names
        return next((name for name in wanted if name in self._columns), None)

    def text(self, names: str | Sequence[str]) -> list[str]:
        """A column as it is."""
        return self._columns[self._require(names)]

    def unique(self, names: str | Sequence[str]) -> list[str]:
        """A column in which every cell names something else: none is empty."""
        name = self._require(names)
        line_of: dict[str, int] = {}
        for line, cell in zip(self.lines, self._columns[name], strict=True):
            if not cell:
                raise UserError(f"{self.path}: line {line}: {name} is empty, so the row names no picture")
            if cell in line_of:
                raise UserError(
                    f"{self.path}: line {line}: {name} {cell} stands in line {line_of[cell]} too (joined from two "
                    "files?)"
                )
            line_of[cell] = line
        return self._columns[name]

    def numbers(self, names: str | Sequence[str], gaps: bool = False) -> NDArray[np.float64]:
        """A column of finite numbers; with ``gaps`` an empty cell, or nan, is NaN."""

        def parse(text: str) -> float:
            if gaps and text.lower() in ("", "nan"):
                return math.nan
            comma = self._decimal_commas and _DECIMAL_COMMA.fullmatch(text)
            value = float(text.replace(",", ".") if comma else text)
            if not math.isfinite(value):
                raise ValueError
            return value

        return np.array(self._parsed(names, parse, "a number"), dtype=np.float64)

    def whole_numbers(self, names: str | Sequence[str]) -> NDArray[np.int64]:
        return np.array(self._parsed(names, lambda text: int(np.int64(int(text))), "a whole number"), dtype=np.int64)

    def flags(self, names: str | Sequence[str]) -> NDArray[np.bool_]:
        """A column of True and False, or 1 and 0."""
        return np.array(self._parsed(names, lambda text: _TRUTH[text.lower()], "True or False"), dtype=bool)

    def known_flags(
        self, names: str | Sequence[str], words: Mapping[str, bool] = _TRUTH
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """What the words of a column (lower-case words: meaning) mean, False for any other, and which are known."""
        cells = [text.lower() for text in self.text(names)]
        known = np.array([cell in words for cell in cells], dtype=bool)
        return np.array([words.get(cell, False) for cell in cells], dtype=bool), known

    def choices(self, names: str | Sequence[str], known: Sequence[str]) -> list[str]:
        """A column of known words."""

        def parse(text: str) -> str:
            if text not in known:
                raise ValueError
            return text

        return self._parsed(names, parse, f"one of {', '.join(known)}")

    def positions(self, gaps: bool = False) -> Positions:
        """Where each picture was taken; with ``gaps`` a row without a position is NaN.

        Degrees count where the table has metres as well: they mean the same place without a zone.
        """
        for columns, geographic in (((LATITUDES, LONGITUDES), True), ((EASTINGS, NORTHINGS), False)):
            if all(map(self.find, columns)):
                values = np.column_stack([self.numbers(column, gaps) for column in columns])
                if geographic:
                    known = np.flatnonzero(~np.isnan(values).any(axis=1))
                    names = self.text(PICTURES)
                    check_geographic(values[known], [names[row] for row in known], str(self.path))
                return Positions(values, geographic)
        raise UserError(
            f"{self.path}: expected columns latitude and longitude, or easting and northing: found "
            f"{', '.join(self._columns) or 'none'}"
        )

    def _require(self, names: str | Sequence[str]) -> str:
        name = self.find(names)
        if name is None:
            wanted = names if isinstance(names, str) else " or ".join(names)
            raise UserError(f"{self.path}: has no column {wanted}: found {', '.join(self._columns) or 'none'}")
        return name

    def _parsed(self, names: str | Sequence[str], parse: Callable[[str], T], expected: str) -> list[T]:
        name = self._require(names)
        values = []
        for line, text in zip(self.lines, self._columns[name], strict=True):
            try:
                values.append(parse(text))
            except (KeyError, ValueError, OverflowError) as error:
                hint = " with a decimal point" if _DECIMAL_COMMA.fullmatch(text) else ""
                raise UserError(f"{self.path}: line {line}: {name} = {text!r}: expected {expected}{hint}") from error
        return values


def read_table(path: Path) -> Table:
    """Read a CSV file with a header line, its values apart by commas, semicolons or tabs.

    Where they are not apart by commas, numbers may have a decimal comma, as spreadsheets of many countries write them.
    Raises UserError when it cannot be read, a line has another number of values, or a column's name comes twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header_line = file.readline()
            file.seek(0)
            delimiter = max(_DELIMITERS, key=header_line.count)
            reader = csv.reader(file, delimiter=delimiter)
            header = [name.strip().lower() for name in next(reader, [])]
            rows, lines = [], []
            for row in reader:
                if not row:
                    continue
                if any("\0" in cell for cell in row):
                    raise UserError(f"{path}: line {reader.line_num}: holds binary data (damaged, or no CSV file?)")
                if len(row) != len(header):
                    raise UserError(
                        f"{path}: line {reader.line_num}: {len(row)} values for {len(header)} columns (cut off?)"
                    )
                rows.append(row)
                lines.append(reader.line_num)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (dataset incomplete, or another root?)") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 (a spreadsheet is to be saved as one)") from error
    if not any(header):
        raise UserError(f"{path}: has no header line with the columns' names (empty file?)")
    twice = [name for place, name in enumerate(header) if name and name in header[:place]]
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]} (names are taken in any case)")
    cells = zip(*rows, strict=True) if rows else [()] * len(header)
    columns = {name: [cell.strip() for cell in column] for name, column in zip(header, cells, strict=True) if name}
    return Table(path, columns, lines, decimal_commas=delimiter != ",")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file: the columns' names, and a row of as many values each, as they print."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())


def check_geographic(geographic: NDArray[np.float64], names: Sequence[str], where: str) -> None:
    """Raises UserError, naming the pictures, for latitudes and longitudes N×2 that cannot be."""
    latitude, longitude = geographic.T
    impossible = ~np.isfinite(geographic).all(axis=1) | (np.abs(latitude) > 90) | (np.abs(longitude) > 180)
    if impossible.any():
        swapped = (np.abs(latitude[impossible]) > 90).all() and (np.abs(longitude[impossible]) <= 90).all()
        cause = "latitude and longitude swapped?" if swapped else "not degrees, or no position?"
        raise UserError(
            f"{where}: {int(impossible.sum())} of {counted(len(names), 'position')} out of range, latitude −90 to 90 "
            f"and longitude −180 to 180 ({cause}): {_examples(names, impossible, geographic)}"
        )
    nowhere = (latitude == 0) & (longitude == 0)
    if nowhere.any():
        raise UserError(
            f"{where}: {int(nowhere.sum())} of {counted(len(names), 'position')} at 0, 0 (written without a GPS fix?): "
            f"{_examples(names, nowhere, geographic)}"
        )


def _examples(names: Sequence[str], chosen: NDArray[np.bool_], positions: NDArray[np.float64]) -> str:
    rows = np.flatnonzero(chosen).tolist()
    return some_of([f"{names[row]} ({positions[row, 0]:g}, {positions[row, 1]:g})" for row in rows], separator="; ")
