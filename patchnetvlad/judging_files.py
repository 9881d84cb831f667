"""Measures as one table for people and one JSON for programs; judged rankings on disk, to be joined later."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchnetvlad.errors import UserError
from patchnetvlad.files import write_text, writing
from patchnetvlad.ground_truth import UNKNOWN_UNIT, with_unit
from patchnetvlad.judging import LEVEL, Judged, Measures, join, measure

_CURVE_POINTS = 200  # of precision against recall, in the JSON


@dataclass(frozen=True)
class EvaluationProtocol:
    """What was compared: lengths of the lists, and the distance within which two pictures match, with its unit."""

    queries: int
    database: int
    radius: float
    unit: str = UNKNOWN_UNIT

    def line(self) -> str:
        """For a person."""
        radius = with_unit(self.radius, self.unit)
        return f"{self.queries} queries against {self.database} pictures, a match within {radius}"


def measure_lines(protocol: EvaluationProtocol, measures: Mapping[str, Measures], details: bool = False) -> list[str]:
    """The table: recalls of every method, with the protocol; with details confidence, mAP, AUC as well."""
    first = next(iter(measures.values())).recall
    wide = max(24, *(len(name) + 14 for name in measures))
    lines = [
        f"{protocol.line()}; {first.num_without_match} queries have no match",
        f"{'Recall@N (%)':<{wide}}" + "".join(f"{n:>{13 if details else 7}}" for n in first.n_values),
    ]
    for name, measured in measures.items():
        rows = [(name, measured.recall.all_queries, measured.all_queries_interval)]
        if first.num_without_match:
            rows.append((f"{name}, with a match", measured.recall.with_match, measured.with_match_interval))
        for label, values, intervals in rows:
            lines.append(f"{label:<{wide}}" + "".join(f"{100 * value:{13 if details else 7}.1f}" for value in values))
            if details:
                spans = (f"{100 * low:.1f}–{100 * high:.1f}" for low, high in intervals)
                lines.append(f"{f'  {LEVEL:.0%} interval':<{wide}}" + "".join(f"{span:>13}" for span in spans))
        if details:
            precision = "".join(f"{100 * value:13.1f}" for value in measured.mean_average_precision)
            lines.append(f"{f'  mAP@N (MSLS), {name}':<{wide}}{precision}")
    if details:
        for name, measured in measures.items():
            if curve := measured.precision_recall:
                lines.append(
                    f"{name}, best match by score: area under precision-recall {curve.auc:.3f}, recall at 100 % "
                    f"precision {100 * curve.recall_at_full_precision:.1f} %"
                )
    if first.beyond_candidates:
        beyond = ", ".join(map(str, first.beyond_candidates))
        lines.append(f"(at N = {beyond} the lists hold only {first.num_candidates} candidates)")
    return lines


def measure_record(protocol: EvaluationProtocol, measures: Mapping[str, Measures]) -> dict[str, object]:
    """The same figures for a program, as fractions 0..1; NaN becomes null."""
    first = next(iter(measures.values())).recall
    return {
        "protocol": {
            "queries": protocol.queries,
            "database": protocol.database,
            "radius": protocol.radius,
            "unit": protocol.unit,
            "queries_without_match": first.num_without_match,
        },
        "recalls": {name: _recalls(measured) for name, measured in measures.items()},
        "confidence_level": LEVEL,
        "mean_average_precision": {
            name: _by_n(measured, measured.mean_average_precision) for name, measured in measures.items()
        },
        "precision_recall": {
            name: _curve(measured) for name, measured in measures.items() if measured.precision_recall
        },
    }


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write a record as JSON."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_judged(path: Path, protocol: EvaluationProtocol, judged: Mapping[str, Judged]) -> None:
    """Keep what measures need, for `measure.py` to join cities; an .npz file without pickles."""
    arrays: dict[str, np.ndarray] = {
        "methods": np.array(list(judged), dtype=np.str_),
        "database": np.array(protocol.database),
        "radius": np.array(protocol.radius),
        "unit": np.array(protocol.unit),
    }
    for name, method in judged.items():
        arrays |= {f"{name}/hits": method.hits, f"{name}/num_matches": method.num_matches}
        if method.scores is not None:
            arrays[f"{name}/scores"] = method.scores
    with writing(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # NumPy's stubs take the names for its options


def read_judged(path: Path) -> tuple[EvaluationProtocol, dict[str, Judged]]:
    """What write_judged has written; raises UserError for another file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            judged = {
                name: Judged(
                    arrays[f"{name}/hits"],
                    arrays[f"{name}/num_matches"],
                    arrays[f"{name}/scores"] if f"{name}/scores" in arrays.files else None,
                )
                for name in arrays["methods"].tolist()
            }
            num_queries = len(next(iter(judged.values())).hits)
            unit = str(arrays["unit"]) if "unit" in arrays.files else UNKNOWN_UNIT
            return EvaluationProtocol(num_queries, int(arrays["database"]), float(arrays["radius"]), unit), judged
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error} (a matching run without ground truth?)"
        ) from error
    except (KeyError, ValueError, StopIteration) as error:
        raise UserError(f"{path}: not the judged rankings of a matching run") from error


def joined(results: Sequence[Path], n_values: Sequence[int]) -> tuple[EvaluationProtocol, dict[str, Measures]]:
    """Measures over the queries of several matching runs, each searched in its own database."""
    runs = [read_judged(folder / "judged.npz") for folder in results]
    first, stages = runs[0]
    for (protocol, judged), folder in zip(runs, results, strict=True):
        kinds = [(of_run.radius, of_run.unit, list(by)) for of_run, by in ((protocol, judged), (first, stages))]
        if kinds[0] != kinds[1]:
            descriptions = [
                f"a match within {with_unit(radius, unit)}, by {', '.join(by)}" for radius, unit, by in kinds
            ]
            raise UserError(
                f"{folder}: {descriptions[0]}; {results[0]}: {descriptions[1]}: only runs of one kind can be joined"
            )
    whole = EvaluationProtocol(
        sum(protocol.queries for protocol, _ in runs),
        sum(protocol.database for protocol, _ in runs),
        first.radius,
        first.unit,
    )
    return whole, {stage: measure(join([judged[stage] for _, judged in runs]), n_values) for stage in stages}


def _recalls(measured: Measures) -> dict[str, object]:
    recall = measured.recall
    return {
        "all_queries": _by_n(measured, recall.all_queries),
        "all_queries_interval": _by_n(measured, measured.all_queries_interval),
        "queries_with_match": _by_n(measured, recall.with_match),
        "queries_with_match_interval": _by_n(measured, measured.with_match_interval),
    }


def _by_n(measured: Measures, values: Sequence[float | tuple[float, float]]) -> dict[str, object]:
    named = zip(measured.recall.n_values, values, strict=True)
    return {str(n): _plain(value) for n, value in named}


def _plain(value: float | tuple[float, float]) -> object:
    if isinstance(value, tuple):
        return [_plain(number) for number in value]
    return None if math.isnan(value) else value


def _curve(measured: Measures) -> dict[str, object]:
    curve = measured.precision_recall
    assert curve is not None
    chosen = np.unique(np.linspace(0, len(curve.recall) - 1, _CURVE_POINTS).round().astype(int)).tolist()
    return {
        "auc": curve.auc,
        "recall_at_full_precision": curve.recall_at_full_precision,
        "thresholds": [curve.thresholds[point] for point in chosen],
        "precision": [curve.precision[point] for point in chosen],
        "recall": [curve.recall[point] for point in chosen],
    }
