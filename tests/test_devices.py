"""No formula makes a float64 tensor on a device that has none, such as Apple's: a stand-in refuses them.

Tensors on the stand-in call themselves mps; their numbers are on the CPU. What a device without float64 would refuse is
refused in every operation, and so is what would mix its tensors with the CPU's.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from patchnetvlad import ranking
from patchnetvlad.candidates import Candidates
from patchnetvlad.config import LOSSES, FeatureMatchConfig
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.encoders.rootsift import DenseRootSIFT
from patchnetvlad.losses import ViewPair, seen_positions, view_loss
from patchnetvlad.matching import Matches, mutual_matches, mutual_matches_batch
from patchnetvlad.mining import hard_negatives
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.patch_netvlad import chosen_descriptors, patch_descriptors
from patchnetvlad.ranking import Ranker
from patchnetvlad.ransac import consensus, ransac_score, ransac_scores
from patchnetvlad.rapid_spatial import rapid_spatial_score
from patchnetvlad.retrieval import DatabaseIndex
from patchnetvlad.store.arrays.codecs import CODECS, CPU
from patchnetvlad.store.reading.patch_sources import DescribedPictures, PatchesInMemory, PatchesOnDevice
from patchnetvlad.whitening import WPCA, fit_wpca

ROOT = Path(__file__).parent.parent
MPS = torch.device("mps")
CUDA = torch.device("cuda")
_TAKES_OTHERS = ("__getitem__", "__setitem__", "copy_")  # indices and copies may come from the CPU


class StandIn(Tensor):
    """A tensor that is taken for one on the device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Device(TorchFunctionMode):
    """While it is on, tensors asked for on mps are stand-ins too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of torch on the CPU, its result a stand-in if it is asked for, or made of some, on the device."""
    leaves = tree_leaves((args, kwargs))
    on_device = [leaf for leaf in leaves if isinstance(leaf, StandIn)]
    elsewhere = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, StandIn)]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    name = getattr(func, "__name__", str(func))
    if on_device and getattr(func, "__self__", None) is Tensor.device:
        return MPS
    if on_device and any(leaf.ndim for leaf in elsewhere) and name not in _TAKES_OTHERS:
        raise RuntimeError(f"{name}: tensors on mps and on the CPU")
    moved = MPS in devices
    if moved:
        cpu = torch.device("cpu")
        args, kwargs = tree_map(lambda leaf: cpu if isinstance(leaf, torch.device) else leaf, (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    leaves_device = name == "cpu" or torch.device("cpu") in devices
    stays = moved or (on_device and not leaves_device)
    if stays and any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
        raise TypeError(f"{name}: the MPS framework doesn't support float64")
    kind = StandIn if stays else Tensor
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
        return result
    with torch._C.DisableTorchFunctionSubclass():
        return tree_map(lambda leaf: _as(leaf, kind) if isinstance(leaf, Tensor) else leaf, result)


def _as(tensor: Tensor, kind: type[Tensor]) -> Tensor:
    return tensor if type(tensor) in (kind, torch.nn.Parameter) else tensor.as_subclass(kind)


def on_device(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its parameters and buffers as stand-ins."""
    for part in module.modules():
        for key, value in part._parameters.items():
            if value is not None:
                part._parameters[key] = torch.nn.Parameter(value.detach().as_subclass(StandIn), requires_grad=False)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = buffer.as_subclass(StandIn)
    return module


def plain(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.as_subclass(Tensor) for value in values]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.rand(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def netvlad(vladv2: bool = False) -> NetVLAD:
    torch.manual_seed(0)
    return NetVLAD(4, 8, vladv2)


def shifted_matches() -> tuple[Matches, PatchGrid]:
    """Matches of a picture that has moved by three patches, with a few that are wrong."""
    grid = PatchGrid(12, 14, 2)
    query = torch.arange(0, len(grid), 3)
    reference = (query + 3) % len(grid)
    reference[::7] = torch.arange(len(reference[::7])) * 2
    return Matches(query, reference), grid


def initialised(place: Callable[[Any], Any], vladv2: bool) -> list[Tensor]:
    pool = netvlad(vladv2)
    place(pool)
    pool.initialise(place(random(4, 8)), place(random(60, 8, seed=1)))
    return [value.detach() for value in pool.state_dict().values()]


def fitted(place: Callable[[Any], Any]) -> Tensor:
    layer = WPCA(16, 3)
    place(layer)
    layer.set_fit(fit_wpca(random(40, 16).numpy(), 3))
    return layer(place(random(5, 16, seed=2))).detach()


def scored(device: torch.device) -> list[Tensor]:
    matches, grid = shifted_matches()
    (score,) = ransac_scores([matches], [grid], [grid], device)
    assert score.homography is not None
    return [torch.tensor(score.value, dtype=torch.float64), score.inliers, score.homography]


def agreement(place: Callable[[Any], Any]) -> list[Tensor]:
    matches, grid = shifted_matches()
    source, target = (grid.centers()[side][None] / 16 for side in (matches.reference, matches.query))
    return list(consensus(place(source), place(target), place(torch.tensor([len(matches)])), 1.5))


def patches(place: Callable[[Any], Any]) -> list[Tensor]:
    local, assignment, centers = random(1, 6, 7, 8), random(1, 6, 7, 4).softmax(-1), random(4, 8)
    made = patch_descriptors(place(local), place(assignment), place(centers), (2, 3), (1, 2))
    some = chosen_descriptors(
        place(local[0]), place(assignment[0]), place(centers), 2, 1, place(torch.tensor([3, 0, 7]))
    )
    return [*made, some]


def described(place: Callable[[Any], Any], backbone: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = PlaceModel(backbone, "patchnetvlad", 4, 6, (1, 2), (1, 1)).eval()
    place(model)
    found = model.describe(place(torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(1))))
    return [found.global_, *found.patches]


def matched(place: Callable[[Any], Any]) -> list[Tensor]:
    query, reference = place(random(20, 8)), place(random(30, 8, seed=1))
    found = [
        mutual_matches(query, reference),
        *mutual_matches_batch(query, place(random(2, 30, 8, seed=1)), place(torch.tensor([30, 11]))),
    ]
    return [side for matches in found for side in (matches.query, matches.reference)]


def losses(place: Callable[[Any], Any]) -> list[Tensor]:
    rows, maps = place(random(6, 16)), place(torch.randn(3, 8, 6, 8, generator=torch.Generator().manual_seed(0)))
    grid = PatchGrid(6, 8, 1, geometry=EncoderGeometry(stride=16, receptive_field=1, padding=0))
    shift = torch.tensor([[1.0, 0, -32], [0, 1, 16], [0, 0, 1]], dtype=torch.float64)  # as training makes it
    seen = seen_positions(shift, grid)
    pairs = [ViewPair(number, maps[number], maps[2], shift, place(seen)) for number in range(2)]
    triplets = [(0, 1, [2, 3]), (4, 5, [3])]
    return [view_loss(pairs, grid), *(LOSSES.find(name).total(rows, triplets, 0.1) for name in sorted(LOSSES))]


def learning(place: Callable[[Any], Any]) -> list[Tensor]:
    """A step's descriptors, as an encoder makes them that learns, and what is mined with them."""
    torch.manual_seed(0)
    model = PlaceModel("half:efficientnet_lite0", "netvlad", 4, 0, (), ()).eval()
    pictures = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    place(model)
    with torch.enable_grad():
        rows = model.pool(model.encoder(place(pictures)))
    distances = torch.cdist(rows[:1], rows)[0]
    return [rows.detach(), torch.tensor(hard_negatives(1.0, distances.detach(), 0.1, 2))]


FORMULAS: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "netvlad": lambda place: [place(netvlad())(place(random(2, 8, 5, 6))).detach()],
    "initialise": lambda place: initialised(place, False),
    "initialise, v2": lambda place: initialised(place, True),
    "patch_netvlad": patches,
    "wpca": lambda place: [fitted(place)],
    "rootsift": lambda place: [
        place(DenseRootSIFT())(place(torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))))
    ],
    "describe, rootsift": lambda place: described(place, "rootsift"),
    "describe, vgg16": lambda place: described(place, "vgg16"),
    "matching": matched,
    "consensus": agreement,
    "losses": losses,
    "learning": learning,
}


def place_on_device(value: Any) -> Any:
    return on_device(value) if isinstance(value, torch.nn.Module) else value.as_subclass(StandIn)


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_make_no_float64_where_there_is_none(name: str) -> None:
    formula = FORMULAS[name]
    expected = formula(lambda value: value)
    with Device():
        found = formula(place_on_device)
    for one, other in zip(plain(found), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("module", ["candidates", "judging", "picture_changes", "recall"])
def test_formulas_of_arrays_leave_devices_alone(module: str) -> None:
    """They know NumPy alone, so that there is nothing of theirs to guard."""
    tree = ast.parse((ROOT / "patchnetvlad" / f"{module}.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [getattr(node, "module", None) or node.names[0].name for node in imported]
    assert "numpy" in names and not [name for name in names if name.split(".")[0] == "torch"]


def test_ransac_of_tensors_on_such_a_device() -> None:
    expected = scored(torch.device("cpu"))
    with Device():
        found = scored(MPS)
    assert float(expected[0]) > 0.2
    for one, other in zip(plain(found), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_retrieval_on_such_a_device() -> None:
    queries, database = random(5, 16).numpy(), random(70, 16, seed=1).numpy()
    expected = DatabaseIndex(database).search(queries, 9)
    with Device():
        found = DatabaseIndex(database, device=MPS).search(queries, 9)
    assert found.indices.tolist() == expected.indices.tolist()


def test_an_encoder_of_timm_on_such_a_device() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    name = "timm:mobilenetv3_small_050"
    expected = described(lambda value: value, name)
    with Device():
        found = described(place_on_device, name)
    for one, other in zip(plain(found), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_pairwise_scores_leave_the_device_alone() -> None:
    matches, grid = shifted_matches()
    with Device():
        assert ransac_score(matches, grid, grid).value == float(scored(torch.device("cpu"))[0])
        assert rapid_spatial_score(matches, grid, grid).value > 0


def test_the_guard_refuses() -> None:
    with Device():
        values = torch.zeros(3, device=MPS)
        assert values.device == MPS and values.cpu().double().dtype == torch.float64
        with pytest.raises(TypeError, match="float64"):
            values.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, dtype=torch.float64, device=MPS)
        with pytest.raises(RuntimeError, match="on mps and on the CPU"):
            values + torch.zeros(3)


@pytest.mark.parametrize("module", ["retrieval", "clustering"])
def test_torch_is_imported_before_faiss(module: str) -> None:
    """Their packages for macOS crash the other way round."""
    code = (
        f"import sys, patchnetvlad.{module}; names = list(sys.modules); "
        "print(names.index('torch') < names.index('faiss'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_faiss_keeps_to_one_thread_on_macos() -> None:
    code = (
        "import os, sys, torch; sys.platform = 'darwin'; from patchnetvlad.faiss_library import faiss; "
        "print(faiss.omp_get_max_threads(), os.environ['KMP_DUPLICATE_LIB_OK'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "KMP_DUPLICATE_LIB_OK"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"OMP_NUM_THREADS": "2"},
    )
    assert done.stdout.split() == ["1", "TRUE"]


def unit_rows(count: int, dims: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dims, generator=generator), dim=1)


class Recording(Device):
    """Notes what travels to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and MPS in tree_leaves((args[1:], kwargs)) and not isinstance(args[0], StandIn):
            self.sent.append(args[0])
        return run(func, args, kwargs or {})


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_descriptors_travel_as_they_are_stored(dtype: str) -> None:
    rows = unit_rows(30, 40, 1)
    stored = CODECS[dtype].encode(rows)
    here = CODECS[dtype].decode(stored)
    with Recording() as recording:
        there = CODECS[dtype].decode(stored, MPS)
    assert [sent.dtype for sent in recording.sent] == [getattr(torch, dtype)]
    assert isinstance(there, StandIn) and there.dtype == torch.float32
    assert torch.equal(there.as_subclass(Tensor), here)


def test_what_goes_to_cuda_goes_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: torch's two calls are noted in place of made."""
    calls: list[str] = []
    convert = Tensor.to

    def pin(rows: Tensor) -> Tensor:
        calls.append("pinned")
        return rows

    def send(rows: Tensor, *to: Any, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        if to != (CUDA,):
            return convert(rows, *to, **kwargs)
        calls.append("sent without waiting" if non_blocking else "sent")
        return rows

    stored = CODECS["float32"].encode(unit_rows(3, 4, 1))
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", send)
    CODECS["float32"].decode(stored, CUDA)
    assert calls == ["pinned", "sent without waiting"]


@pytest.mark.parametrize("room", [0, 10**6])
def test_candidates_that_queries_share_travel_once_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    grid = PatchGrid(6, 7, 2)
    pictures = [PatchFeatures((unit_rows(len(grid), 16, seed),), (grid,)) for seed in range(9)]
    given = np.array([[0, 1, 2, 3], [2, 3, 4, 0], [0, 1, 2, 5]])
    chosen = Candidates(given, np.zeros(given.shape, dtype=np.float32))
    options = FeatureMatchConfig("RANSAC", (4,), patchweights2use=(1.0,), similarity="float32")
    queries = DescribedPictures(np.eye(9, dtype=np.float32)[:3], PatchesInMemory(pictures[:3]))
    database = DescribedPictures(np.eye(9, dtype=np.float32)[:6], PatchesInMemory(pictures[3:]))
    expected = Ranker(options, database, torch.device("cpu")).rank(queries, chosen)
    monkeypatch.setattr(ranking, "device_room", lambda device: room)
    with Recording() as recording:
        found = Ranker(options, database, MPS).rank(queries, chosen)
    pair, asked = 2, 3  # the first pair decides how to compare; every query travels again
    travels = sum(sent.shape == (len(grid), 16) for sent in recording.sent)
    assert travels == pair + asked + (given.size if room == 0 else 6)
    np.testing.assert_array_equal(found.indices, expected.indices)


def test_what_was_asked_for_last_stays_on_the_device() -> None:
    grid = PatchGrid(6, 7, 2)
    pictures = [PatchFeatures((unit_rows(len(grid), 16, seed),), (grid,)) for seed in range(4)]
    asked: list[int] = []
    passed: list[int] = []

    class Counting(PatchesInMemory):
        def patches(self, index: int, device: torch.device = CPU) -> PatchFeatures:
            asked.append(index)
            return super().patches(index, device)

        def pass_over(self, index: int) -> None:
            passed.append(index)

    kept = PatchesOnDevice(Counting(pictures), CPU, 2 * pictures[0].nbytes)
    for index in (0, 1, 0, 2, 0, 1):
        assert kept.patches(index) is pictures[index]
    assert asked == [0, 1, 2, 1]
    assert passed == [0, 0]
