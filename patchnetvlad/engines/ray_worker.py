"""What a worker does: prepare itself once for a run, then answer one part of the work after the other."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import ray
import ray.cloudpickle

from patchnetvlad.errors import UserError

logger = logging.getLogger("patchnetvlad")


class Job(Protocol):
    """What all parts of a run share; it goes to every machine once."""

    def prepare(self) -> Callable[[Any], Any]:
        """Load and open what the parts need, in a worker; returns what answers a part."""
        ...


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a part: its result, or the line of a UserError; told: warnings on the way."""

    result: Any
    refused: str | None
    told: tuple[str, ...]


def answer(job: ray.ObjectRef, part: bytes) -> Answer:
    """Work on a part, which comes pickled."""
    with _listening() as told:
        try:
            result, refused = _prepared(job)(ray.cloudpickle.loads(part)), None
        except UserError as error:
            result, refused = None, str(error)
    return Answer(result, refused, tuple(told))


@lru_cache(maxsize=1)
def _prepared(job: ray.ObjectRef) -> Callable[[Any], Any]:
    """The job made ready in this process, which works for one run."""
    shared: Job = ray.get(job)
    return shared.prepare()


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Warnings of the package, which would go to a file of the worker's that nobody reads."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)
