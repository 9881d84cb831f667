"""Kinds of values in a configuration: how the text of a key is read and checked, and what errors say was expected."""

import configparser
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Generic, NamedTuple, TypeVar, cast

from patchnetvlad.errors import UserError

T = TypeVar("T")

_CODES = re.compile(r"(pq|map)([1-9][0-9]*)")
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
    names: Collection[str] = ()

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


class Table(MutableMapping[str, T]):
    """What a key of the configuration names, each as MODULE:NAME of the package or as it is.

    A module is imported when what it holds is asked for: a wrong name is refused without any. key: as [section] name.
    """

    def __init__(self, key: str, entries: Mapping[str, str]) -> None:
        self._key = key
        self._entries: dict[str, str | T] = dict(entries)

    def __getitem__(self, name: str) -> T:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = cast(T, getattr(import_module(f"patchnetvlad.{module}"), attribute))
        return entry

    def __setitem__(self, name: str, value: T) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def find(self, name: str) -> T:
        """What a name stands for. Raises UserError for a name that is not in the table."""
        self.check(name)
        return self[name]

    def check(self, *names: str) -> None:
        """Raises UserError for a name that is not in the table; imports nothing."""
        for name in names:
            if name not in self:
                raise self.unknown(name)

    def unknown(self, name: str) -> UserError:
        """That the table does not have a name."""
        return UserError(f"{self._key} = {name}: expected one of {', '.join(self)}")


def choice(*names: str) -> Rule[str]:
    """One of the names, in any case; the value is the name as written here."""
    return named(names)


def named(names: Collection[str]) -> Rule[str]:
    """The same of a table that may grow."""

    def parse(text: str) -> str:
        for name in names:
            if text.lower() == name.lower():
                return name
        raise ValueError

    return Rule("one of", parse, names)


def encoder_name(forms: Collection[str], short: Mapping[str, str]) -> Rule[str]:
    """An encoder by its name, and by what stands behind a colon where one takes arguments, as KIND:ENCODER does.

    short: names that stand for longer ones.
    """

    def check(text: str) -> None:
        form, arguments = encoder_form(short.get(text, text), forms)
        if form.endswith(":ENCODER"):
            check(":".join(arguments))

    def parse(text: str) -> str:
        check(text)
        return text

    return Rule(f"one of {', '.join(short)},", parse, forms)


def encoder_form(name: str, forms: Collection[str]) -> tuple[str, list[str]]:
    """Which form an encoder's name has, such as half:ENCODER, and its arguments. Raises ValueError for none of them."""
    kind, *arguments = name.split(":", 2)
    for form in forms:
        if form.partition(":")[0] == kind and bool(arguments) == (":" in form) and all(arguments[:1]):
            return form, arguments
    raise ValueError


def index_name(ending: str) -> Rule[str]:
    """Flat, another factory string of faiss, or a file with this ending."""

    def parse(text: str) -> str:
        words = re.findall("[A-Za-z]+", text)
        known = bool(words) and all(map(_INDEX_WORD.fullmatch, words)) and not _INDEX_WITHOUT_NUMBER.search(text)
        if not text.endswith(ending) and not known:
            raise ValueError
        return text

    return Rule(f"Flat, another factory string of faiss such as HNSW32, or a {ending} file of build_index.py", parse)


class CodeForm(NamedTuple):
    """What is coded, "pq" for patches and "map" for the feature map that they are made from, and bytes of a code."""

    kind: str
    num_bytes: int


def code_form(dtype: str) -> CodeForm | None:
    """That of the storage types pqN and mapN, None for another type."""
    named = _CODES.fullmatch(dtype)
    return CodeForm(named[1], int(named[2])) if named else None


def storage_type(*names: str) -> Rule[str]:
    """One of the names, pqN or mapN."""
    plain = choice(*names)
    return Rule(
        f"{plain.told}, pqN or mapN (codes of N bytes)",
        lambda text: text.lower() if code_form(text.lower()) is not None else plain.parse(text),
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


def some_of_names(names: Collection[str]) -> Rule[tuple[str, ...]]:
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
