"""Kinds of values in a configuration: how the text of a key is read, checked, and what it is told to expect."""

import configparser
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_CODES = re.compile(r"pq([1-9][0-9]*)")
# Words of faiss's factory strings, between digits and marks
_INDEX_WORD = re.compile(
    "R?Flat|FlatL|Refine|IVF|IMI|HNSW|NSG|NNDescent|O?PQ|x|fsr?|np|PCAW?R?|RR|ITQ|LSHr?t?|L|[Nn]orm|Pad|SQ(fp|bf)?|"
    "bit|direct|signed|P?RQ|P?LSQ|RCQ|Residual|N(qint|cqint|float|none|norm|lsq|rq)|ZnLattice|RaBitQ|IDMap"
)
_INDEX_WITHOUT_NUMBER = re.compile("(IVF|IMI|PQ|SQ|PCAW?R?|RQ|Pad)([,_()]|$)")  # cells, bytes, bits, dimensions


@dataclass(frozen=True)
class Rule(Generic[T]):
    """How the text of a key is read: ``parse`` raises ValueError, ``told`` completes "expected …".

    names: those that go behind ``expected``; a table of names may have grown since the rule was made.
    """

    expected: str
    parse: Callable[[str], T]
    names: Sequence[str] = ()

    @property
    def told(self) -> str:
        """What the text must be."""
        return " ".join([self.expected, ", ".join(self.names)]).strip()


def setting(default: T, rule: Rule[T]) -> T:
    """A dataclass field with its default and the rule that its text in a file must follow."""
    return field(default=default, metadata={"rule": rule})


def whole(minimum: int | None = None) -> Rule[int]:
    def parse(text: str) -> int:
        value = int(text)
        if minimum is not None and value < minimum:
            raise ValueError
        return value

    return Rule("a whole number" + ("" if minimum is None else f" of {minimum} or more"), parse)


def real(minimum: float, maximum: float = math.inf, above: bool = False) -> Rule[float]:
    """Finite numbers of [minimum, maximum], of (minimum, maximum] with ``above``."""

    def parse(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or not minimum <= value <= maximum or (above and value == minimum):
            raise ValueError
        return value

    lower = f"above {minimum:g}" if above else f"of {minimum:g} or more"
    return Rule(f"a number {lower}" + ("" if maximum == math.inf else f", at most {maximum:g}"), parse)


def flag() -> Rule[bool]:
    words = configparser.ConfigParser.BOOLEAN_STATES

    def parse(text: str) -> bool:
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]

    return Rule("True or False", parse)


def choice(*names: str) -> Rule[str]:
    """One of the names, in any case; the value is the name as written here."""
    return named(names)


def named(names: Sequence[str]) -> Rule[str]:
    """The same of a list that may grow."""

    def parse(text: str) -> str:
        for name in names:
            if text.lower() == name.lower():
                return name
        raise ValueError

    return Rule("one of", parse, names)


def encoder_name(plain: Sequence[str], with_arguments: Sequence[str], short: Mapping[str, str]) -> Rule[str]:
    """An encoder by its name, and by what stands behind a colon where one takes arguments.

    short: names that stand for longer ones.
    """

    def check(text: str) -> None:
        kind, colon, arguments = short.get(text, text).partition(":")
        takes = kind in with_arguments
        if not (takes or kind in plain) or bool(colon) != takes or bool(arguments) != takes:
            raise ValueError
        if kind == "half":
            check(arguments)

    def parse(text: str) -> str:
        check(text)
        return text

    return Rule(f"one of timm:NAME, timm:NAME:LAYER, half:ENCODER, {', '.join(short)},", parse, plain)


def index_name(ending: str) -> Rule[str]:
    """Flat, another factory string of faiss, or a file with this ending."""

    def parse(text: str) -> str:
        words = re.findall("[A-Za-z]+", text)
        known = bool(words) and all(map(_INDEX_WORD.fullmatch, words)) and not _INDEX_WITHOUT_NUMBER.search(text)
        if not text.endswith(ending) and not known:
            raise ValueError
        return text

    return Rule(f"Flat, another factory string of faiss such as HNSW32, or a {ending} file of build_index.py", parse)


def code_bytes(dtype: str) -> int | None:
    """N of the storage type pqN, None for another type."""
    named = _CODES.fullmatch(dtype)
    return int(named[1]) if named else None


def storage_type(*names: str) -> Rule[str]:
    """One of the names, or pqN."""
    plain = choice(*names)
    return Rule(
        f"{plain.told} or pqN (codes of N bytes)",
        lambda text: text.lower() if code_bytes(text.lower()) is not None else plain.parse(text),
    )


def some_text() -> Rule[str]:
    def parse(text: str) -> str:
        if not text:
            raise ValueError
        return text

    return Rule("some text", parse)


def optional(rule: Rule[T]) -> Rule[T | None]:
    """None, written so in any case or as nothing at all, or what the rule takes."""
    none = ("", "none")
    return Rule(
        f"None, or {rule.expected}", lambda text: None if text.lower() in none else rule.parse(text), rule.names
    )


def weights_source() -> Rule[str]:
    def parse(text: str) -> str:
        if not text:
            raise ValueError
        return text.lower() if text.lower() in ("imagenet", "none") else text

    return Rule("imagenet, none, package:NAME or the path of a file", parse)


def list_of(rule: Rule[T], expected: str, distinct: bool = False) -> Rule[tuple[T, ...]]:
    def parse(text: str) -> tuple[T, ...]:
        values = tuple(rule.parse(item.strip()) for item in text.split(","))
        if distinct and len(set(values)) < len(values):
            raise ValueError
        return values

    return Rule(f"{expected}, separated by commas", parse)


def some_of_names(names: Sequence[str]) -> Rule[tuple[str, ...]]:
    """Different ones of the names; None, or nothing at all, for no name."""
    rule, none = list_of(named(names), "different names", distinct=True), ("", "none")
    return Rule(
        f"None, or {rule.expected}: some of", lambda text: () if text.lower() in none else rule.parse(text), names
    )


def recall_counts() -> Rule[tuple[int, ...]]:
    counts = list_of(whole(1), "whole numbers of 1 or more")
    return Rule(counts.expected, lambda text: tuple(sorted(set(counts.parse(text)))))


def scale_weights() -> Rule[tuple[float, ...]]:
    numbers = list_of(real(0), "numbers of 0 or more, not all 0")

    def parse(text: str) -> tuple[float, ...]:
        values = numbers.parse(text)
        if not any(values):
            raise ValueError
        return values

    return Rule(numbers.expected, parse)


def value_text(value: object) -> str:
    """A value as the text that its rule reads."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
