#!/usr/bin/env python3
"""A database of a thousand to a million pictures: time to build, to open and to answer, memory, and bytes on disk.

    python benchmarks/scale.py --work WORK --features WORK/index WORK/query --lists INDEX.txt QUERY.txt

--features and --lists: feature folders of real pictures and their lists, the first stored as codes (feature_dtype =
mapN or pqN), the last being the queries. The database is made of them: global descriptors are walks through streets
(see `city`), patches are the codes of a real picture of which a tenth is replaced at random.
Each answer comes from a process of its own, before which the system is told to forget the files, so that the first
reads come from the disk. --build_only makes the databases and leaves them in WORK for a later run, which measures, and
removes them unless --keep is given. --simulated N: of N pictures the index alone, from descriptors that are drawn as it
is made and never stored. Writes scale.json, scale.md, with what follows for ten and more times as many pictures, and
scale.png.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.config import FeatureMatchConfig
from patchnetvlad.errors import UserError
from patchnetvlad.faiss_library import faiss
from patchnetvlad.image_lists import ImageList, read_image_list, write_image_list
from patchnetvlad.ranking import Ranker
from patchnetvlad.retrieval import DatabaseIndex
from patchnetvlad.search_index import build_index, open_index
from patchnetvlad.store.arrays.array_files import (
    GLOBAL_NAME,
    create_rows_file,
    patch_file_name,
    read_array,
    read_array_info,
)
from patchnetvlad.store.arrays.blocks import PICTURES_IN_BLOCK, Block, BlockWriter, block_name
from patchnetvlad.store.arrays.codecs import read_patch_codec, write_patch_codec
from patchnetvlad.store.manifest import MANIFEST_NAME, Manifest, block_line, header_line, read_manifest
from patchnetvlad.store.reading.feature_store import FeatureStore
from patchnetvlad.store.reading.patch_sources import DescribedPictures, PatchesInMemory

STREET = 40  # pictures of one walk
SHARED = 0.3  # of a picture's squared length that all of its street have in common
KEPT = 0.7  # correlation of what is left between one picture and the next
LIKENESS = 0.55  # of a query to the picture taken at its place
REPLACED = 0.1  # of the codes of a picture
QUERIES = 20  # that are timed
HELD_OUT = 200  # that tell the recall
STREETS_AT_ONCE = 500
READS = 50_000  # a second that an SSD answers
HOUR, MONTH = 1.50, 0.08  # prices of a machine of 32 cores for an hour, and of a GB of SSD for a month
T = TypeVar("T")
REAL_CODES = 64  # pictures whose codes are made over


def city(count: int, real: NDArray[np.float32], seed: int = 0) -> Iterator[NDArray[np.float32]]:
    """Global descriptors of `count` pictures in blocks of rows, of the spectrum of the real ones (R×D, unit rows).

    A street's common part is a random mixture of three real pictures; what its pictures add is noise with the real
    covariance, which changes from picture to picture as an autoregressive process.
    """
    noise = noise_factor(real)
    for first in range(0, count, STREETS_AT_ONCE * STREET):
        rng = np.random.default_rng([seed, first])
        streets = min(STREETS_AT_ONCE, math.ceil((count - first) / STREET))
        weights = rng.dirichlet(np.ones(3), streets).astype(np.float32)
        common = unit((weights[:, :, None] * real[rng.integers(0, len(real), (streets, 3))]).sum(axis=1))
        rows = np.empty((streets, STREET, real.shape[1]), dtype=np.float32)
        own = rng.standard_normal(common.shape, dtype=np.float32) @ noise
        for place in range(STREET):
            rows[:, place] = unit(math.sqrt(SHARED) * common + math.sqrt(1 - SHARED) * own)
            fresh = rng.standard_normal(common.shape, dtype=np.float32) @ noise
            own = KEPT * own + np.float32(math.sqrt(1 - KEPT**2)) * fresh
        yield rows.reshape(-1, real.shape[1])[: count - first]


def city_queries(rows: NDArray[np.float32], real: NDArray[np.float32], seed: int = 1) -> NDArray[np.float32]:
    """Queries at the places of database rows: as like to them as pictures of two walks through one place are."""
    fresh = np.random.default_rng(seed).standard_normal(rows.shape, dtype=np.float32) @ noise_factor(real)
    return unit(LIKENESS * rows + np.float32(math.sqrt(1 - LIKENESS**2)) * fresh)


def noise_factor(real: NDArray[np.float32]) -> NDArray[np.float32]:
    """D×D; normal numbers times it have the covariance of the real descriptors, scaled to a mean square of 1."""
    values, vectors = np.linalg.eigh(np.cov(real.T.astype(np.float64)))
    factor = (vectors * np.sqrt(np.maximum(values, 0))).T
    return (factor / np.sqrt((factor**2).sum())).astype(np.float32)


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def real_codes(folder: Path, manifest: Manifest) -> list[list[NDArray[np.uint8]]]:
    """The codes of some of a folder's pictures, which are of one size: P×N for each grid that is stored."""
    chosen = np.unique(np.linspace(0, manifest.num_pictures - 1, REAL_CODES).astype(int)).tolist()
    pictures = []
    for entry in map(manifest.entries.__getitem__, chosen):
        assert entry.map_size is not None
        grids = manifest.header.stored_grids(entry.map_size)
        paths = [folder / patch_file_name(grid.patch_size, entry.feature_name) for grid in grids]
        pictures.append([read_array(path, lambda info: None).T for path in paths])
    return pictures


def picture_bytes(source: Path) -> int:
    """Of the codes of a picture in a folder."""
    manifest = read_manifest(source)
    assert manifest is not None and manifest.entries[0].map_size is not None
    header = manifest.header
    return header.codec.width(header.num_dims) * sum(map(len, header.stored_grids(manifest.entries[0].map_size)))


def write_database(folder: Path, count: int, source: Path, real: NDArray[np.float32], distinct: int | None) -> None:
    """A packed folder and its list beside it, as feature_extract would have made them.

    source: a folder of real pictures in codes; distinct: blocks that are written; further whole ones are links to
    these.
    """
    manifest, codec = read_manifest(source), read_patch_codec(source)
    if manifest is None or codec is None:
        raise UserError(f"{source}: holds no codes (extract it with feature_dtype = map40)")
    codes = real_codes(source, manifest)
    header = replace(manifest.header, layout="packed")
    folder.mkdir(parents=True)
    names = [f"city/{index // 1000:05}/{index:08}.jpg" for index in range(count)]
    write_image_list(folder.with_suffix(".txt"), names)
    write_patch_codec(folder, codec)
    create_rows_file(folder / GLOBAL_NAME, (count, header.num_dims))
    with (folder / GLOBAL_NAME).open("r+b") as file:
        file.seek(read_array_info(folder / GLOBAL_NAME).offset)
        for rows in city(count, real):
            file.write(rows.tobytes())
    map_size = manifest.entries[0].map_size
    assert map_size is not None
    rng = np.random.default_rng(2)
    layout = header.block_layout(count)
    finished: list[Block] = []
    with (folder / MANIFEST_NAME).open("wb") as file:
        file.write(header_line(header, names, "city"))
        for number in range(layout.num_blocks):
            if distinct is not None and number >= distinct and len(layout.pictures(number)) == PICTURES_IN_BLOCK:
                os.link(folder / block_name(number % distinct), folder / block_name(number))
                file.write(block_line(replace(finished[number % distinct], number=number)))
                continue
            with BlockWriter(folder, layout, number) as writer:
                for _ in layout.pictures(number):
                    writer.add(
                        map_size, [made_over(patch_codes, rng) for patch_codes in codes[rng.integers(len(codes))]]
                    )
                finished.append(writer.finish())
            file.write(block_line(finished[-1]))


def made_over(codes: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Codes of which some are those of another patch of the picture."""
    changed = codes.copy()
    places = rng.integers(0, len(codes), int(REPLACED * len(codes)))
    changed[places] = codes[rng.permutation(len(codes))[: len(places)]]
    return changed


def answer(folder: Path, source: Path, listed: Path, started: float) -> dict[str, float]:
    """Open a database and answer queries, in this process that has just begun; times in seconds."""
    imported = time.time()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pictures = read_image_list(folder.with_suffix(".txt"), folder)
    store = FeatureStore.open(folder, pictures, cache_gb=0.5)
    index = open_index(folder / "search_index.json", store.global_, pictures.names)
    opened = time.time()
    own = FeatureStore.open(source, read_image_list(listed, source))
    global_ = np.load(folder.with_suffix(".queries.npy"))
    weights = (1 / len(own.patch_sizes),) * len(own.patch_sizes)
    options = FeatureMatchConfig(matcher="spatialApproximator", rerank_top=100, patchweights2use=weights)
    ranker = Ranker(options, DescribedPictures(store.global_, store, index), torch.device("cpu"))
    times = []
    for row in range(QUERIES):
        began = time.perf_counter()
        patches = PatchesInMemory([own.patches(row % len(own))])
        ranker.rank(DescribedPictures(global_[row : row + 1], patches))
        times.append(time.perf_counter() - began)
        if row == 0:
            first = time.time()
    search = DatabaseIndex(store.global_, index)
    searches = []
    for row in range(QUERIES):
        began = time.perf_counter()
        search.search(global_[row : row + 1], 100)
        searches.append(time.perf_counter() - began)
    memory = anonymous_bytes(), 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exact = DatabaseIndex(store.global_).search(global_, 100).indices
    recall = found_share(search.search(global_, 100).indices, exact)
    return {
        "start": imported - started,
        "open": opened - imported,
        "first answer": first - started,
        "search": float(np.median(searches)),
        **parts_of_a_query(folder, pictures),
        "query": float(np.median(times[1:])),
        "recall@100": recall,
        "memory, bytes": memory[0],
        "peak with mapped files, bytes": memory[1],
    }


def found_share(found: NDArray[np.int64], nearest: NDArray[np.int64]) -> float:
    """Share of the nearest rows (nQ×k) that are among the found ones."""
    return float(np.mean([len(np.intersect1d(*rows)) for rows in zip(found, nearest, strict=True)]) / nearest.shape[1])


def simulate(count: int, real: NDArray[np.float32]) -> dict[str, float]:
    """The default codes of so many pictures, all compared, and the wider look that finds 0.99 of the 100 nearest.

    Descriptors are drawn while the index is filled and compared with the queries exactly at once.
    """
    began = time.perf_counter()
    parts = math.ceil(count / (STREETS_AT_ONCE * STREET))
    asked = city_queries(next(city(count, real))[np.arange(HELD_OUT) * STREET], real)
    index = faiss.index_factory(real.shape[1], f"PQ{real.shape[1] // 2}x4fs")
    best = faiss.ResultHeap(HELD_OUT, 100)
    for number, rows in enumerate(city(count, real)):
        if not index.is_trained:
            index.train(rows)
        index.add(rows)
        distances, nearest = faiss.knn(asked, rows, 100)
        best.add_result(distances, nearest + number * STREETS_AT_ONCE * STREET)
        if number % 50 == 0:
            print(f"part {number} of {parts}", file=sys.stderr, flush=True)
    best.finalize()
    indexed = time.perf_counter()
    found = {"index": indexed - began, "index, bytes": float(len(faiss.serialize_index(index)))}
    for widening in (4, 8, 12, 16, 24, 32):
        rows_found = index.search(asked, 100 * widening)[1]
        found |= {"recall@100": found_share(rows_found, best.I), "widening": float(widening)}
        if found["recall@100"] >= 0.99:
            break
    times = [timed(lambda query: index.search(query, 100 * widening), query[None]) for query in asked[:QUERIES]]
    return {**found, "search": float(np.median(times))}


def parts_of_a_query(folder: Path, pictures: ImageList) -> dict[str, float]:
    """Seconds to read and to decode 100 candidates from the disk, and what reads and products alone would take."""
    forget_files(folder)
    candidates = np.random.default_rng(4).choice(len(pictures), min(500, len(pictures)), replace=False).tolist()
    fresh = FeatureStore.open(folder, pictures, cache_gb=0)
    cold, warm = ([timed(fresh.patches, candidate) for candidate in candidates] for _ in range(2))
    files = [folder / block_name(index // PICTURES_IN_BLOCK) for index in candidates]
    forget_files(folder)
    raw = [timed(read_somewhere, path) for path in files]
    picture = fresh.patches(0).descriptors
    products = [sum(timed(lambda rows: rows @ rows.T, rows) for rows in picture) for _ in range(5)]
    return {
        "decode 100": 100 * float(np.median(warm)),
        "read 100": 100 * float(np.median(np.array(cold) - np.array(warm))),
        "limit: read 100": 100 * float(np.mean(raw)),
        "limit: products": 100 * min(products),
    }


def read_somewhere(path: Path) -> None:
    """Read 16 kB in the middle of a file."""
    with path.open("rb", buffering=0) as file:
        file.seek(path.stat().st_size // 2)
        file.read(1 << 14)


def timed(call: Callable[[T], object], argument: T) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call(argument)
    return time.perf_counter() - began


def forget_files(folder: Path) -> None:
    """Have the system drop what it holds in memory of a folder's files."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes() -> float:
    """Memory of this process that is no file's; what is mapped can be dropped at any time."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024.0 * float(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def build(count: int, args: argparse.Namespace, real: NDArray[np.float32]) -> dict[str, float]:
    """Make a database of that many pictures and index it, unless it is there."""
    folder = args.work / f"city{count}"
    record = folder.with_suffix(".json")
    if record.exists():
        return json.loads(record.read_text())
    began = time.perf_counter()
    write_database(folder, count, args.features[0], real, args.distinct_blocks)
    written = time.perf_counter()
    names = read_image_list(folder.with_suffix(".txt"), folder).names
    info = read_array_info(folder / GLOBAL_NAME)
    rows = np.memmap(folder / GLOBAL_NAME, np.float32, "r", info.offset, info.shape)
    built = build_index(rows, names, folder / "search_index.json").record
    indexed = time.perf_counter()
    asked = np.random.default_rng(3).choice(count, min(HELD_OUT, count), replace=False)
    np.save(folder.with_suffix(".queries.npy"), city_queries(np.asarray(rows[asked]), real))
    measured = {
        "write": written - began,
        "index": indexed - written,
        "index, bytes": float(built.num_bytes),
        "widening": float(built.widening),
        "recall told": built.recall,
        "disk, bytes": float(sum(path.stat().st_size for path in folder.iterdir())),
        "codes of a picture, bytes": float(picture_bytes(args.features[0])),
        "dimensions": float(rows.shape[1]),
    }
    record.write_text(json.dumps(measured))
    return measured


def measure(count: int, args: argparse.Namespace, real: NDArray[np.float32]) -> dict[str, float]:
    """Let a new process answer queries with a database of that many pictures."""
    costs = build(count, args, real)
    folder = args.work / f"city{count}"
    forget_files(folder)
    command = [sys.executable, __file__, "--answer", str(folder), str(args.features[-1]), str(args.lists[-1])]
    done = subprocess.run([*command, str(time.time())], capture_output=True, text=True, check=True, env=os.environ)
    if not args.keep:
        folder.with_suffix(".json").unlink()
        shutil.rmtree(folder)
    return costs | json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as Markdown: seconds, milliseconds a query, MB and GB."""
    columns = [
        ("write", "write, s", 1.0),
        ("index", "index, s", 1.0),
        ("start", "import, s", 1.0),
        ("open", "open, s", 1.0),
        ("first answer", "first answer, s", 1.0),
        ("search", "search, ms", 1e3),
        ("read 100", "read 100 from the disk, ms", 1e3),
        ("decode 100", "decode 100, ms", 1e3),
        ("limit: read 100", "limit: 100 reads of 16 kB, ms", 1e3),
        ("limit: products", "limit: products of 100 candidates in float32, ms", 1e3),
        ("query", "query, 100 re-ranked, ms", 1e3),
        ("widening", "rows looked up for each one wanted", 1.0),
        ("recall told", "Recall@100 told when the index was made", 1.0),
        ("recall@100", "Recall@100 of queries that were held out", 1.0),
        ("memory, bytes", "memory, MB", 1e-6),
        ("peak with mapped files, bytes", "with mapped files, MB", 1e-6),
        ("index, bytes", "index, MB", 1e-6),
        ("disk, bytes", "disk, GB", 1e-9),
    ]
    lines = [
        "| pictures | " + " | ".join(f"{int(count):,}" for count in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for key, title, scale in columns:
        numbers = (f"{values[key] * scale:.4g}" if key in values else "" for values in results.values())
        lines.append(f"| {title} | " + " | ".join(numbers) + " |")
    return "\n".join(lines) + "\n"


def on_paper(measured: dict[str, float], describing: float) -> str:
    """What follows for more pictures, as Markdown; measured: with a million; describing: seconds a picture and core."""
    coded, dims, top = measured["codes of a picture, bytes"], measured["dimensions"], 100
    matching = measured["query"]
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        (f"codes of {coded / 1000:.1f} kB a picture", "b·M", lambda count: size(coded * count)),
        ("global descriptors, float32, on disk", "4·D·M", lambda count: size(4 * dims * count)),
        ("index in memory, D/4 bytes each", "D·M/4", lambda count: size(dims * count / 4)),
        ("names in memory, 114 bytes each", "114·M", lambda count: size(114 * count)),
        ("opening list, folder and index", "M times that of one", lambda count: span(measured["open"] * count / 1e6)),
        (
            "comparing all codes, 1 thread at 10 GB/s",
            "D·M / (4·10¹⁰)",
            lambda count: span(dims * count / 4e10),
        ),
        ("the same in cells, half of them visited", "/2", lambda count: span(dims * count / 8e10)),
        (
            f"exact comparison of {measured['widening']:.0f}·C rows, read from an SSD that answers {READS:,} a second",
            f"{measured['widening']:.0f}·C / {READS:,}",
            lambda count: span(measured["widening"] * top / READS),
        ),
        (f"C = {top} candidates read from that SSD", f"C / {READS:,}", lambda count: span(top / READS)),
        (
            "the candidates decoded, matched and scored on two cores",
            f"{1000 * matching / top:.2g} ms · C",
            lambda count: span(matching),
        ),
        (
            f"describing, {describing:g} s a picture and core",
            f"{describing:g}·M s",
            lambda count: span(describing * count),
        ),
        (
            "machines of 32 cores to describe within a week",
            f"{describing:g}·M / (32 · 604,800)",
            lambda count: f"{describing * count / 32 / 604_800:.2g}",
        ),
        (
            f"money to describe, at {HOUR:.2f} a machine of 32 cores and hour",
            f"{HOUR:.2f}·{describing:g}·M / (32 · 3,600)",
            lambda count: f"{HOUR * describing * count / 32 / 3600:,.0f}",
        ),
        (
            f"money a month for an SSD, at {MONTH:.2f} a GB",
            f"{MONTH:.2f}·(b + 4·D + D/4)·M / 10⁹",
            lambda count: f"{MONTH * (coded + 4.25 * dims) * count / 1e9:,.0f}",
        ),
    ]
    lines = ["| what | formula | 10⁶ | 10⁷ | 10⁸ | 10⁹ |", "|---" * 6 + "|"]
    for title, formula, number in rows:
        lines.append(f"| {title} | {formula} | " + " | ".join(number(10.0**power) for power in (6, 7, 8, 9)) + " |")
    return "\n".join(lines) + "\n"


def size(num_bytes: float) -> str:
    unit, scale = ("TB", 1e12) if num_bytes >= 1e12 else ("GB", 1e9)
    return f"{num_bytes / scale:.3g} {unit}"


def span(seconds: float) -> str:
    """A time in the unit in which people say it."""
    units = (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for unit, length in units:
        if seconds >= (1 if unit == "s" else 2) * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    """Time of a query's parts and of opening over the number of pictures, and bytes with what they cannot go below."""
    # Here, so that the process that answers does not load it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = [int(count) for count in results]
    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    first, second = figure.subplots(1, 2)
    for key in ("search", "read 100", "decode 100", "query", "open", "first answer"):
        first.plot(counts, [values.get(key, math.nan) for values in results.values()], "o-", label=key)
    first.set(xscale="log", yscale="log", xlabel="pictures", ylabel="seconds", title="time")
    for key in ("disk, bytes", "index, bytes", "memory, bytes"):
        numbers = [values.get(key, math.nan) for values in results.values()]
        second.plot(counts, numbers, "o-", label=key.partition(",")[0])
    for limit, what, style in (
        ("limit: read 100", "limit: 100 reads of the disk", "k:"),
        ("limit: products", "limit: products of 100 candidates", "k--"),
    ):
        first.plot(counts, [values.get(limit, math.nan) for values in results.values()], style, label=what)
    each = min(values["disk, bytes"] / int(count) for count, values in results.items() if "disk, bytes" in values)
    second.plot(counts, [each * count for count in counts], "k:", label="codes and global descriptors alone")
    second.set(xscale="log", yscale="log", xlabel="pictures", ylabel="bytes", title="size")
    for axes in (first, second):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its files; with --answer, be the process that answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--features", nargs="+", type=Path)
    parser.add_argument("--lists", nargs="+", type=Path)
    parser.add_argument("--pictures", nargs="*", type=int, default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--distinct_blocks", type=int, help="write so many, and the others as links to them")
    parser.add_argument("--simulated", type=int, nargs="+", default=[], metavar="N", help="index alone, not stored")
    parser.add_argument(
        "--describing", type=float, default=0.2, help="seconds a picture and core, for the table on paper"
    )
    parser.add_argument("--build_only", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    args = parser.parse_args(arguments)
    if args.answer is not None:
        folder, source, listed, started = args.answer
        print(json.dumps(answer(Path(folder), Path(source), Path(listed), float(started))))
        return
    if not args.features or not args.lists or len(args.features) != len(args.lists) or args.work is None:
        parser.error("--work, and as many --features as --lists, are needed")
    real = np.concatenate(
        [
            FeatureStore.open(folder, read_image_list(listed, listed.parent)).global_
            for folder, listed in zip(args.features, args.lists, strict=True)
        ]
    )
    args.output.mkdir(parents=True, exist_ok=True)
    written = args.output / "scale.json"
    results: dict[str, dict[str, float]] = json.loads(written.read_text()) if written.exists() else {}
    for count in args.pictures:
        if args.build_only:
            print(count, json.dumps(build(count, args, real)), flush=True)
            continue
        results[str(count)] = measure(count, args, real)
        print(count, json.dumps(results[str(count)]), flush=True)
        written.write_text(json.dumps(results, indent=1) + "\n")
    if args.build_only:
        return
    for count in args.simulated:
        results[str(count)] = simulate(count, real)
        print(count, json.dumps(results[str(count)]), flush=True)
        written.write_text(json.dumps(results, indent=1) + "\n")
    results = dict(sorted(results.items(), key=lambda item: int(item[0])))
    tables = table(results)
    if "1000000" in results:
        tables += "\n" + on_paper(results["1000000"], args.describing)
    (args.output / "scale.md").write_text(tables)
    plot(results, args.output / "scale.png")
    print(tables)


if __name__ == "__main__":
    main()
