"""The benchmarks that can be repeated: what each takes, where its data are from, and its known results."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from patchnetvlad.datasets.dataset import Dataset
from patchnetvlad.datasets.makers import MAKERS
from patchnetvlad.result_files import RERANKING, RETRIEVAL

_NETVLAD_SPECIFICATIONS = "the .mat files are NetVLAD's dataset specifications, on its project page at the WILLOW team"


@dataclass(frozen=True)
class Known:
    """A known result: Recall@N in % by N of one stage; source: whose; band: how many points lower and higher pass,
    None where it is shown beside ours only."""

    stage: str
    recalls: dict[int, float]
    source: str
    band: tuple[float, float] | None = None


@dataclass(frozen=True)
class ListPair:
    """Lists of queries and database: the names of both and of their ground truth."""

    lists: str
    ground_truth: str


@dataclass(frozen=True)
class Benchmark:
    """How a known result was made. where: to get the data from; make: its lists from the root, where they are not at
    hand; overrides: of the configuration."""

    config: str
    list_pairs: tuple[ListPair, ...]
    known: tuple[Known, ...]
    where: str
    overrides: tuple[str, ...] = ()
    make: Callable[[Path], list[Dataset]] | None = None


_TEST_SETS = "a folder with its lists, its .npz and its pictures, as distributed"
BENCHMARKS: dict[str, Benchmark] = {
    "pitts30k": Benchmark(
        "speed.ini",
        (ListPair("pitts30k", "pitts30k_test"),),
        (
            Known(RERANKING, {1: 87.09, 5: 94.05, 10: 95.67}, "users, pittsburgh_WPCA512, spatial", (1.0, 1.0)),
            Known(RERANKING, {1: 88.0}, "paper, spatial, 4096 dimensions"),
        ),
        f"the authors of NetVLAD give it on request (Pittsburgh250k); {_NETVLAD_SPECIFICATIONS}",
        ("global_params.resumepath=./pretrained_models/pittsburgh_WPCA",),
        lambda root: MAKERS["pitts30k"].make(root, mat=None, split="test"),
    ),
    "tokyo247": Benchmark(
        "performance.ini",
        (ListPair("tokyo247", "tokyo247"),),
        (Known(RERANKING, {1: 86.0, 5: 88.6, 10: 90.5}, "paper, multi-scale RANSAC", (2.0, 3.0)),),
        f"the authors of Tokyo 24/7 give it on request; {_NETVLAD_SPECIFICATIONS}",
        ("global_params.resumepath=./pretrained_models/pittsburgh_WPCA", "feature_match.panorama_cutouts=12"),
        lambda root: MAKERS["tokyo247"].make(root, mat=None),
    ),
    "msls_val": Benchmark(
        "performance.ini",
        (ListPair("mapillarycph", "mapillarycph"), ListPair("mapillarysf", "mapillarysf")),
        (
            Known(RETRIEVAL, {1: 71.1, 5: 81.5, 10: 84.3}, "users, Mapillary weights", (1.5, 1.5)),
            Known(RERANKING, {1: 80.8, 5: 86.5, 10: 88.4}, "users, Mapillary weights", (1.5, 1.5)),
            Known(RETRIEVAL, {1: 60.8}, "paper"),
            Known(RERANKING, {1: 79.5}, "paper, multi-scale RANSAC"),
        ),
        "www.mapillary.com/dataset/places",
        (),
        lambda root: MAKERS["msls"].make(root, cities=["val"]),
    ),
    "nordland": Benchmark(
        "performance.ini",
        (ListPair("nordland", "nordland"),),
        (),
        "nrkbeta.no has the journeys; frames cut from them are on the pages of several groups, such as QUT's",
        (),
        lambda root: MAKERS["nordland"].make(root),
    ),
    "corridor": Benchmark(
        "builtin.ini",
        (ListPair("corridor", "corridor"),),
        (
            Known(RETRIEVAL, {1: 73.9, 5: 89.2, 10: 94.6}, "dense RootSIFT + VLAD-64", (5.0, math.inf)),
            Known(RETRIEVAL, {1: 67.6, 5: 93.7, 10: 99.1}, "another NetVLAD, stored run"),
            Known(RERANKING, {1: 90.1, 5: 99.1, 10: 100.0}, "HybridNet, stored run"),
            Known(RERANKING, {1: 92.8, 5: 100.0, 10: 100.0}, "the bundled model as it was measured", (2.5, math.inf)),
        ),
        _TEST_SETS,
    ),
    "ietower_small": Benchmark(
        "builtin.ini",
        (ListPair("ietower_small", "ietower_small"),),
        (
            Known(RETRIEVAL, {1: 54.9, 5: 86.6, 10: 92.7}, "dense RootSIFT + VLAD-64"),
            Known(RETRIEVAL, {1: 13.4, 5: 29.3, 10: 35.4}, "HOG"),
            Known(RERANKING, {1: 62.2, 5: 90.2, 10: 93.9}, "the bundled model as it was measured", (2.5, math.inf)),
        ),
        _TEST_SETS,
    ),
    "sf_toy": Benchmark(
        "builtin.ini",
        (ListPair("sf_toy", "sf_toy"),),
        (Known(RETRIEVAL, {1: 50.0, 5: 100.0, 10: 100.0}, "dense RootSIFT + VLAD-64; 4 queries prove nothing"),),
        _TEST_SETS,
    ),
}
