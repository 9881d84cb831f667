"""Which way of matching is fastest here: measured once, on two pictures of the run."""

import logging
import math
import time

from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.errors import UserError
from patchnetvlad.matching import WAYS, Way
from patchnetvlad.reranking import match_pair

logger = logging.getLogger(__name__)

TRIALS = 3  # of each way; the least time counts


def choose_way(similarity: str, query: PatchFeatures, reference: PatchFeatures) -> str:
    """The name in WAYS to match with, and the log says why: the one that [feature_match] similarity asks for, or for
    "auto" the fastest on these two pictures, which are on one device. All ways give the same matches.

    Raises UserError for a way that this device cannot go.
    """
    on_processor = query.descriptors[0].device.type == "cpu"
    possible = [name for name, way in WAYS.items() if not way.rounds or (on_processor and way.works())]
    if similarity != "auto":
        if similarity not in possible:
            raise UserError(
                f"[feature_match] similarity = {similarity}: this device does not multiply 8-bit numbers exactly (auto "
                "takes what suits it)"
            )
        chosen, reason = similarity, "as configured"
    elif len(possible) == 1:
        chosen, reason = possible[0], "the only way on this device"
    else:
        seconds = _measure(possible, query, reference)
        chosen = min(seconds, key=seconds.__getitem__)
        times = ", ".join(f"{name} {1000 * seconds[name]:.1f} ms" for name in seconds)
        reason = f"the fastest here, a pair of the first pictures: {times}"
    logger.info("similarities %s (%s)", WAYS[chosen].text, reason)
    return chosen


def _measure(names: list[str], query: PatchFeatures, reference: PatchFeatures) -> dict[str, float]:
    """Least seconds to match two pictures in each way, tried in turn."""
    prepared = {name: _prepare(WAYS[name], query, reference) for name in names}
    seconds = dict.fromkeys(names, math.inf)
    for _ in range(TRIALS):
        for name in names:
            started = time.perf_counter()
            match_pair(*prepared[name])
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def _prepare(way: Way, query: PatchFeatures, reference: PatchFeatures) -> tuple[PatchFeatures, PatchFeatures]:
    return (query.round_as("query"), reference.round_as("reference")) if way.rounds else (query, reference)
