"""The same bytes on one processor, whatever the number of threads and the size of batches.

What follows the number of threads does so at some sizes only: products of few rows or of columns that are cut into odd
parts, and angles of pictures whose pixels are no whole number of vectors. Pictures of 61×83 and 333×501 have them all.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_training import command_line, scalars
from threadpoolctl import threadpool_limits
from tiny_run import EXAMPLES, example_names, run, tiny_model, write_ground_truth

from patchnetvlad.checkpoints import read_checkpoint, write_checkpoint
from patchnetvlad.commands.training import train
from patchnetvlad.descriptors import Descriptors
from patchnetvlad.ini import load_config
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.paths import require_file
from patchnetvlad.products import row_products
from patchnetvlad.reranking import similarities
from patchnetvlad.weights import load_model
from patchnetvlad.whitening import WPCA

RUNS = [(1, 1), (1, 3), (2, 4), (3, 2), (4, 7)]  # threads of torch, pictures in a batch


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def hashes(folder: Path) -> dict[str, str]:
    """Of features, predictions, scores and recalls."""
    wanted = [*folder.rglob("*.npy"), *folder.rglob("*.npz"), *folder.rglob("*.txt"), *folder.rglob("recalls.json")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in wanted}


def vgg16_model(folder: Path) -> list[str]:
    """A model with an untrained VGG16 in place of RootSIFT."""
    options = tiny_model(folder)
    torch.manual_seed(5)
    model = PlaceModel("vgg16", "patchnetvlad", 8, 0, (2, 3), (1, 1))
    samples = torch.nn.functional.normalize(torch.rand(40, 512), dim=1)
    assert isinstance(model.pool, NetVLAD)
    model.pool.initialise(samples[:8], samples)
    write_checkpoint(folder / "tiny.pth.tar", model)
    return [*options, "--set", "global_params.backbone=vgg16"]


@pytest.mark.parametrize("make", [tiny_model, vgg16_model], ids=["rootsift", "vgg16"])
def test_threads_and_batches_change_no_byte(make, tmp_path: Path) -> None:
    expected: dict[str, str] = {}
    queries, database = example_names("queries")[:4], example_names("database")[:9]
    options = make(tmp_path)
    for threads, batch in RUNS:
        torch.set_num_threads(threads)
        folder = tmp_path / f"{threads}-{batch}"
        folder.mkdir()
        write_ground_truth(folder / "truth.npz", queries, database)
        changes = ["--set", f"feature_extract.cachebatchsize={batch}"]
        run([*options, *changes], EXAMPLES, folder, queries, database)
        found = hashes(folder)
        expected = expected or found
        assert len(found) > 30
        assert {name for name in found if found[name] != expected.get(name)} == set(), f"{threads} threads, {batch}"


@lru_cache(maxsize=1)
def model_of(name: str) -> PlaceModel:
    """A bundled model with small patches, or an untrained VGG16 with WPCA."""
    if name != "vgg16":
        sizes = ["global_params.patch_sizes=2,3", "global_params.strides=1,1", "feature_match.patchweights2use=0.5,0.5"]
        return load_model(load_config(require_file(f"{name}.ini", "configs"), sizes))[0].eval()
    torch.manual_seed(5)
    model = PlaceModel("vgg16", "patchnetvlad", 16, 128, (2, 3), (1, 1)).eval()
    samples = torch.nn.functional.normalize(torch.rand(40, 512), dim=1)
    assert isinstance(model.pool, NetVLAD)
    model.pool.initialise(samples[:16], samples)
    return model


def numbers(described: Descriptors) -> list[torch.Tensor]:
    return [described.global_, *described.patches]


def differing(compute: Callable[[], list[torch.Tensor]], threads: int) -> list[int]:
    """Which of the tensors that are computed are not, bit for bit, those of one thread."""
    torch.set_num_threads(1)
    expected = compute()
    torch.set_num_threads(threads)
    return [place for place, pair in enumerate(zip(compute(), expected, strict=True)) if not torch.equal(*pair)]


@pytest.mark.parametrize("name", ["rootsift", "builtin", "vgg16"])
@settings(max_examples=8, deadline=None)
@given(height=st.integers(48, 150), width=st.integers(64, 200), threads=st.integers(2, 4), seed=st.integers(0, 99))
@example(height=48, width=64, threads=2, seed=0)
@example(height=61, width=83, threads=3, seed=0)
@example(height=120, width=160, threads=4, seed=0)
def test_pictures_of_any_size_are_described_alike_by_any_number_of_threads(
    name: str, height: int, width: int, threads: int, seed: int
) -> None:
    picture = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    model = model_of(name)
    assert differing(lambda: numbers(model.describe(picture)), threads) == []


@pytest.mark.parametrize("name", ["rootsift", "builtin", "vgg16"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (61, 83), (120, 160)])
def test_bfloat16_describes_alike_with_any_number_of_threads(name: str, height: int, width: int) -> None:
    picture = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    model = model_of(name)
    exact = numbers(model.describe(picture))
    model.precision = "bfloat16"
    try:
        assert [differing(lambda: numbers(model.describe(picture)), threads) for threads in (2, 3, 4)] == [[], [], []]
        assert not any(map(torch.equal, exact, numbers(model.describe(picture))))
    finally:
        model.precision = "float32"


@pytest.mark.parametrize(("height", "width"), [(333, 501), (480, 640)])
@pytest.mark.parametrize("name", ["rootsift", "builtin"])
def test_large_pictures_are_described_alike_by_any_number_of_threads(name: str, height: int, width: int) -> None:
    picture = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    model = model_of(name)
    assert [differing(lambda: numbers(model.describe(picture)), threads) for threads in (2, 3)] == [[], []]


@torch.inference_mode()
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 7),
    map_size=st.tuples(st.integers(1, 12), st.integers(1, 20)),
    channels=st.sampled_from([96, 144, 240, 480]),
    outputs=st.sampled_from([1, 16, 24, 40, 80]),
    threads=st.integers(2, 4),
)
@example(batch=1, map_size=(1, 7), channels=144, outputs=40, threads=3)
def test_products_of_rows_are_those_of_float64_whatever_threads_and_batch(
    batch: int, map_size: tuple[int, int], channels: int, outputs: int, threads: int
) -> None:
    random = torch.Generator().manual_seed(batch)
    maps = torch.rand(batch, *map_size, channels, generator=random)
    weight = torch.rand(outputs, channels, generator=random)
    assert differing(lambda: [row_products(maps, weight)], threads) == []
    together = row_products(maps, weight)
    assert torch.equal(together[-1:], row_products(maps[-1:], weight))
    torch.testing.assert_close(together, (maps.double() @ weight.double().T).float())


@torch.inference_mode()
@settings(max_examples=20, deadline=None)
@given(patches=st.integers(1, 40), dims=st.sampled_from([16, 64, 128]), threads=st.integers(2, 4))
@example(patches=6, dims=128, threads=2)
def test_few_patches_are_whitened_alike_by_any_number_of_threads(patches: int, dims: int, threads: int) -> None:
    torch.manual_seed(patches)
    projection, rows = WPCA(1024, dims), torch.rand(1, patches, 1024)
    assert differing(lambda: [projection(rows)], threads) == []
    expected = rows.double() @ projection.weight.double().T + projection.bias.double()
    torch.testing.assert_close(projection(rows), torch.nn.functional.normalize(expected, dim=-1).float())


@pytest.mark.parametrize("count", [35, 100, 300])
def test_similarities_are_the_same_for_any_number_of_threads(count: int) -> None:
    random = np.random.default_rng(0)
    candidates, query = (random.random(shape, np.float32) for shape in ((count, 4096), (4096,)))
    found = []
    for threads in (1, 2, 4):
        with threadpool_limits(threads, user_api="blas"):
            found.append(similarities(candidates, query).tobytes())
    assert found == found[:1] * 3


@pytest.mark.parametrize("backbone", ["rootsift", "vgg16"])
def test_losses_and_weights_are_the_same_for_any_number_of_threads(backbone: str, msls: Path, tmp_path: Path) -> None:
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)  # of the untrained VGG16
        more = ["--nEpochs", "1", "--set", f"global_params.backbone={backbone}", "--set", "train.pretrained=none"]
        assert train(command_line(msls, tmp_path / str(threads), *more)) == 0
        (folder,) = (tmp_path / str(threads)).iterdir()
        state = read_checkpoint(folder / "checkpoints" / "checkpoint.pth.tar").state
        found.append((scalars(folder, "Train/Loss"), {key: value.numpy().tobytes() for key, value in state.items()}))
    assert len(found[0][0]) > 1
    for losses, weights in found[1:]:
        assert losses == found[0][0]
        assert {key for key in weights if weights[key] != found[0][1][key]} == set()
