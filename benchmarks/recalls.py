#!/usr/bin/env python3
"""Recall of the bundled model by how patches are stored and how they are scored, on folders of real pictures.

    python benchmarks/recalls.py --dataset_root_dir ROOT --datasets corridor ietower_small --output benchmarks

ROOT holds a folder for each data set, with {name}_imageNames_index.txt, {name}_imageNames_query.txt and {name}.npz;
writes recalls.json and recalls.md. Pictures are described in float32, from which float16 and int8 files are made, and
once more with the encoder and the WPCA product in bfloat16. --forms and --no_ransac leave something out; with --work
the features stay, so that a run that was ended goes on.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from patchnetvlad.config import MATCHERS, Config
from patchnetvlad.evaluation import Evaluation, Sources, evaluate, open_run
from patchnetvlad.extraction import describe_list, store_header
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.ini import load_config
from patchnetvlad.matching import Matcher, Matches, Score
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.paths import require_file
from patchnetvlad.ransac import TOLERANCE
from patchnetvlad.result_files import RERANKING, RETRIEVAL
from patchnetvlad.store.reading.feature_store import FeatureStore
from patchnetvlad.store.writing.feature_writer import FeatureWriter
from patchnetvlad.weights import load_model

SIDES = ("query", "index")
DTYPES = ("float32", "float16", "int8")
ROUGH = "bfloat16"
N_VALUES = (1, 5, 10)


def opencv_score(matches: Matches, query_grid: PatchGrid, reference_grid: PatchGrid) -> Score:
    """RANSAC as OpenCV does it, one pair at a time."""
    nothing = Score(0.0, torch.zeros(len(matches), dtype=torch.bool))
    if len(matches) < 4:
        return nothing
    points = (reference_grid.centers()[matches.reference].numpy(), query_grid.centers()[matches.query].numpy())
    homography, mask = cv2.findHomography(*points, cv2.RANSAC, TOLERANCE * query_grid.pitch_pixels)
    if homography is None:
        return nothing
    return Score(int(mask.sum()) / len(query_grid), torch.from_numpy(mask[:, 0].astype(bool)))


def described_as(config: Config, form: str) -> Config:
    """With files of a dtype, or described in bfloat16."""
    options = config.feature_extract
    options = replace(options, precision=ROUGH) if form == ROUGH else replace(options, feature_dtype=form)
    return replace(config, feature_extract=options)


def extract_all(config: Config, root: Path, work: Path, forms: Sequence[str]) -> dict[str, float]:
    """Write the features of both lists in every form; returns MB of patch descriptors a picture."""
    model, checkpoint = load_model(config)
    megabytes = {}
    for side in SIDES:
        pictures = read_image_list(root / f"{root.name}_imageNames_{side}.txt", root)
        describe_list(
            model, checkpoint, described_as(config, "float32"), pictures, work / "float32" / side, progress=True
        )
        for dtype in filter(forms.__contains__, DTYPES):
            folder = work / dtype / side
            if dtype != "float32":
                with FeatureStore.open(work / "float32" / side, pictures) as store:
                    header = store_header(model, checkpoint, described_as(config, dtype))
                    with FeatureWriter(folder, pictures, header) as writer:
                        for index in writer.missing:
                            writer.write(index, torch.from_numpy(store.global_[index]), store.patches(index))
                        writer.finish()
            size = sum(path.stat().st_size for path in folder.glob("patchfeats_*"))
            megabytes[dtype] = size / len(pictures) / 1e6
        if ROUGH in forms:
            rough = described_as(config, ROUGH)
            describe_list(*load_model(rough), rough, pictures, work / ROUGH / side, progress=True)
    return megabytes


def least_cosine(root: Path, work: Path) -> float:
    """Of the patch sizes' median cosines between database patches described in bfloat16 and in float32."""
    pictures = read_image_list(root / f"{root.name}_imageNames_index.txt", root)
    medians = []
    with (
        FeatureStore.open(work / "float32" / "index", pictures) as exact,
        FeatureStore.open(work / ROUGH / "index", pictures) as rough,
    ):
        for index in range(len(pictures)):
            rows = zip(exact.patches(index).descriptors, rough.patches(index).descriptors, strict=True)
            medians.append([float(F.cosine_similarity(*of_size, dim=1).median()) for of_size in rows])
    return float(np.median(medians, axis=0).min())


def run(config: Config, root: Path, work: Path, dtype: str, matcher: str) -> Evaluation:
    config = replace(config, feature_match=replace(config.feature_match, matcher=matcher))
    lists = [root / f"{root.name}_imageNames_{side}.txt" for side in SIDES]
    folders = [work / dtype / side for side in SIDES]
    sources = Sources(root, lists[0], lists[1], folders[0], folders[1], root / f"{root.name}.npz")
    with open_run(described_as(config, dtype), sources, torch.device("cpu")) as opened:
        return evaluate(opened, progress=True)


def recalls(evaluation: Evaluation, stage: str) -> list[float]:
    recall = evaluation.recalls[stage]
    return [round(100 * recall.all_queries[recall.n_values.index(n)], 1) for n in N_VALUES]


def agreement(first: Evaluation, second: Evaluation) -> dict[str, float]:
    """Of the same queries and candidates under two ways of scoring: how often the best is the same, in %, and the mean
    rank correlation of the fused scores."""
    assert first.rankings.scores is not None and second.rankings.scores is not None
    same = first.rankings.scores.indices[:, 0] == second.rankings.scores.indices[:, 0]
    correlations = []
    for rows in range(len(same)):
        order = [
            np.argsort(evaluation.rankings.scores.indices[rows])
            for evaluation in (first, second)
            if evaluation.rankings.scores is not None
        ]
        fused = [
            evaluation.rankings.scores.fused[rows]
            for evaluation in (first, second)
            if evaluation.rankings.scores is not None
        ]
        correlations.append(float(spearmanr(fused[0][order[0]], fused[1][order[1]]).statistic))
    return {
        "same_first": round(100 * float(same.mean()), 1),
        "rank_correlation": round(float(np.mean(correlations)), 3),
    }


def measure(config: Config, root: Path, work: Path, forms: Sequence[str], with_ransac: bool) -> dict:
    megabytes = extract_all(config, root, work, forms)
    spatial = {form: run(config, root, work, form, "spatialApproximator") for form in forms}
    rows: list[dict] = [{"stage": "retrieval alone", "recalls": recalls(spatial["float32"], RETRIEVAL)}]
    for form, evaluation in spatial.items():
        how = "described in bfloat16" if form == ROUGH else form
        row = {"stage": f"rapid spatial, {how}", "recalls": recalls(evaluation, RERANKING)}
        rows.append(row | {"megabytes": round(megabytes.get(form, megabytes["float32"]), 2)})
    measured = {"queries": len(spatial["float32"].queries), "rows": rows}
    if ROUGH in forms:
        rows.append({"stage": "retrieval alone, described in bfloat16", "recalls": recalls(spatial[ROUGH], RETRIEVAL)})
        measured["bfloat16_cosine"] = round(least_cosine(root, work), 6)
    if with_ransac:
        MATCHERS["OpenCV"] = Matcher(opencv_score)
        ransac, opencv = (run(config, root, work, "float32", matcher) for matcher in ("RANSAC", "OpenCV"))
        rows.append({"stage": "RANSAC, float32", "recalls": recalls(ransac, RERANKING)})
        rows.append({"stage": "RANSAC of OpenCV, float32", "recalls": recalls(opencv, RERANKING)})
        measured["ransac_agreement"] = agreement(ransac, opencv)
    return measured


def table(results: dict) -> str:
    lines = []
    for name, measured in results.items():
        lines += [f"{name}, {measured['queries']} queries:", ""]
        lines += ["| how | MB a picture | Recall@1 | @5 | @10 |", "|---|---|---|---|---|"]
        for row in measured["rows"]:
            values = " | ".join(f"{value:.1f}" for value in row["recalls"])
            lines.append(f"| {row['stage']} | {row.get('megabytes', '')} | {values} |")
        lines.append("")
        if "ransac_agreement" in measured:
            agree = measured["ransac_agreement"]
            lines += [
                f"RANSAC here and OpenCV's name the same best picture for {agree['same_first']} % of the queries; the "
                f"mean rank correlation of their candidates is {agree['rank_correlation']}.",
                "",
            ]
        if "bfloat16_cosine" in measured:
            lines += [
                f"Patches described in bfloat16 have a cosine of {measured['bfloat16_cosine']} to those in float32, "
                "the least of the patch sizes' medians.",
                "",
            ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_root_dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=["corridor", "ietower_small"])
    parser.add_argument("--config_path", default="builtin.ini")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--forms", nargs="+", choices=[*DTYPES, ROUGH], default=[*DTYPES, ROUGH])
    parser.add_argument("--no_ransac", action="store_true", help="rapid spatial scores alone")
    parser.add_argument("--work", type=Path, help="keep the features here")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    args = parser.parse_args(arguments)
    config = load_config(require_file(args.config_path, "configs"), args.overrides)
    forms = ["float32", *(form for form in args.forms if form != "float32")]
    results = {}
    for name in args.datasets:
        with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as work:
            root = args.dataset_root_dir / name
            results[name] = measure(config, root, Path(work) / name, forms, not args.no_ransac)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "recalls.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "recalls.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
