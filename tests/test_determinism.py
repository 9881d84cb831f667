"""The same bytes on one processor, whatever the number of threads and the size of batches.

What follows the number of threads does so at some sizes only: products of few rows or of columns that are cut into odd
parts, and angles of pictures whose pixels are no whole number of vectors. Pictures of 61×83 and 333×501 have them all.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_training import ROOT, command_line, scalars
from threadpoolctl import threadpool_limits
from tiny_run import EXAMPLES, example_names, run, tiny_model, write_ground_truth

from patchnetvlad import products
from patchnetvlad.checkpoints import read_checkpoint, write_checkpoint
from patchnetvlad.clustering import kmeans_centers
from patchnetvlad.commands.training import train
from patchnetvlad.config import LOSSES
from patchnetvlad.descriptors import Descriptors
from patchnetvlad.encoders import efficientnet_lite
from patchnetvlad.encoders.efficientnet_lite import EfficientNetLite0
from patchnetvlad.ini import load_config
from patchnetvlad.losses import correspondence_loss
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.paths import require_file
from patchnetvlad.products import convolution, row_products
from patchnetvlad.reranking import similarities
from patchnetvlad.weights import load_model
from patchnetvlad.whitening import WPCA, fit_place_whitening, fit_wpca

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


def test_what_is_fitted_is_the_same_for_any_number_of_threads() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((900, 1024), np.float32)
    local = rows[:, :112] / np.linalg.norm(rows[:, :112], axis=1, keepdims=True)
    found = []
    for threads in (1, 2, 3, 4):
        with threadpool_limits(threads):
            fits = (
                fit_wpca(rows, 64),
                fit_wpca(rows[:, :300], 64),
                fit_place_whitening(rows[:, :64], rows[:, 64:128], 32),
            )
            arrays = [array for fit in fits for array in (fit.weight, fit.bias)]
            found.append([array.tobytes() for array in (*arrays, kmeans_centers(local, 16, 0, 5))])
    assert [[one == other for one, other in zip(found[0], more, strict=True)] for more in found] == [[True] * 7] * 4


def gradients(compute: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """A function that gives the output and the gradients of its random projection to the inputs."""

    def found() -> list[torch.Tensor]:
        learning = [values.clone().requires_grad_() for values in inputs]
        made = compute(*learning)
        random = torch.Generator().manual_seed(1)
        weights = torch.randn(made.shape, generator=random).to(made.dtype)
        return [made.detach(), *torch.autograd.grad(made, learning, weights)]

    return found


@settings(max_examples=40, deadline=None)
@given(
    pictures=st.integers(4, 9),
    map_size=st.tuples(st.integers(12, 30), st.integers(16, 40)),
    channels=st.sampled_from([32, 144, 240]),
    form=st.sampled_from([(3, 1, 1), (3, 2, 0), (5, 1, 2), (5, 2, 0), (3, 2, 1)]),  # kernel, stride, padding
    depthwise=st.booleans(),
    threads=st.integers(2, 4),
)
@example(pictures=6, map_size=(15, 20), channels=480, form=(3, 1, 1), depthwise=True, threads=3)
@example(pictures=6, map_size=(60, 80), channels=3, form=(3, 2, 0), depthwise=False, threads=3)
@example(pictures=6, map_size=(60, 80), channels=64, form=(3, 1, 1), depthwise=False, threads=2)
def test_gradients_of_convolutions_are_those_of_float64_whatever_threads(
    pictures: int,
    map_size: tuple[int, int],
    channels: int,
    form: tuple[int, int, int],
    depthwise: bool,
    threads: int,
) -> None:
    (size, stride, padding), random = form, torch.Generator().manual_seed(pictures)
    maps = torch.randn(pictures, channels, *map_size, generator=random).contiguous(memory_format=torch.channels_last)
    shape = (channels, 1) if depthwise else (48, channels)
    inputs = [maps, torch.randn(*shape, size, size, generator=random)]
    ours = gradients(lambda maps, weight: convolution(maps, weight, stride, padding), inputs)
    assert differing(ours, threads) == []
    groups = channels if depthwise else 1
    theirs = gradients(
        lambda maps, weight: torch.nn.functional.conv2d(maps, weight, stride=stride, padding=padding, groups=groups),
        [values.double() for values in inputs],
    )
    for found, expected in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_rows_of_a_large_convolution_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(2, 4, 17, 9), torch.randn(5, 4, 3, 3)]
    found = gradients(lambda maps, weight: convolution(maps, weight, 2, 1), inputs)
    at_once = found()
    monkeypatch.setattr(products, "WINDOWS", 40)
    for some, whole in zip(found(), at_once, strict=True):
        torch.testing.assert_close(some, whole)


@settings(max_examples=20, deadline=None)
@given(
    pictures=st.integers(1, 5), map_size=st.tuples(st.integers(1, 20), st.integers(1, 30)), threads=st.integers(2, 4)
)
@example(pictures=6, map_size=(6, 8), threads=2)
def test_products_that_learn_do_so_alike_whatever_threads(
    pictures: int, map_size: tuple[int, int], threads: int
) -> None:
    random = torch.Generator().manual_seed(pictures)
    inputs = [torch.randn(pictures, *map_size, 240, generator=random), torch.randn(80, 240, generator=random)]
    found = gradients(row_products, inputs)
    assert differing(found, threads) == []
    expected = gradients(lambda maps, weight: maps @ weight.T, [values.double() for values in inputs])
    for ours, theirs in zip(found(), expected(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_normalisation_inside_convolutions_has_the_gradients_of_layers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = EfficientNetLite0().eval()
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for values in (layer.running_var, layer.weight):
                assert values is not None
                values.data.uniform_(0.5, 2)
            assert layer.running_mean is not None
            layer.running_mean.normal_()
    encoder.double()
    parameters, pictures = list(encoder.parameters()), torch.randn(2, 3, 61, 83, dtype=torch.float64)
    found = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(efficientnet_lite, "rounds_by_threads", lambda maps: False)
        maps = encoder(pictures)
        found.append([maps.detach(), *torch.autograd.grad(maps.square().sum(), parameters)])
    for together, layers_apart in zip(*found, strict=True):
        torch.testing.assert_close(together, layers_apart)


@settings(max_examples=15, deadline=None)
@given(
    points=st.integers(1, 64),
    positions=st.integers(1, 300),
    others=st.integers(0, 500),
    dims=st.sampled_from([16, 112, 512]),
    threads=st.integers(2, 4),
)
@example(points=5, positions=35, others=60, dims=112, threads=3)
@example(points=64, positions=35, others=60, dims=512, threads=3)
def test_losses_of_local_features_are_the_same_for_any_number_of_threads(
    points: int, positions: int, others: int, dims: int, threads: int
) -> None:
    random = torch.Generator().manual_seed(points)
    inputs = [torch.randn(rows, dims, generator=random) for rows in (points, points, positions, others)]
    elsewhere = torch.rand(points, positions, generator=random) > 0.1

    def loss(
        anchors: torch.Tensor, matches: torch.Tensor, candidates: torch.Tensor, rest: torch.Tensor
    ) -> torch.Tensor:
        return correspondence_loss(anchors, matches, candidates, elsewhere, rest)

    assert differing(gradients(loss, inputs), threads) == []


@pytest.mark.parametrize("dims", [3584, 8192, 32768])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_of_descriptors_are_the_same_for_any_number_of_threads(name: str, dims: int) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(24, dims, generator=random), dim=1) + 0.002
    triplets = [(6 * place, 6 * place + 1, list(range(6 * place + 2, 6 * place + 6))) for place in range(4)]
    found = gradients(lambda rows: LOSSES.find(name).total(rows, triplets, 0.1), [rows])
    assert [differing(found, threads) for threads in (2, 3, 4)] == [[], [], []]


def of_training(folder: Path) -> tuple[dict[int, float], dict[str, bytes]]:
    """Losses and weights of the one run in a folder."""
    (run_folder,) = folder.iterdir()
    state = read_checkpoint(run_folder / "checkpoints" / "checkpoint.pth.tar").state
    losses = scalars(run_folder, "Train/Loss")
    assert len(losses) > 1
    return losses, {key: value.numpy().tobytes() for key, value in state.items()}


def as_settings(*changes: str) -> list[str]:
    untrained = ("train.pretrained=none", *changes)
    return ["--nEpochs", "1", *(part for change in untrained for part in ("--set", change))]


@pytest.mark.parametrize(
    ("backbone", "learns", "threads"),
    [
        ("rootsift", "none", 3),
        ("vgg16", "last", 3),
        ("efficientnet_lite0", "last", 4),
        ("efficientnet_lite0", "all", 3),
    ],
)
def test_losses_and_weights_are_the_same_for_any_number_of_threads(
    backbone: str, learns: str, threads: int, msls: Path, tmp_path: Path
) -> None:
    for count in (1, threads):
        torch.set_num_threads(count)
        torch.manual_seed(0)  # of the untrained encoder
        more = as_settings(f"global_params.backbone={backbone}", f"train.encoder_learns={learns}")
        assert train(command_line(msls, tmp_path / str(count), *more)) == 0
    losses, weights = of_training(tmp_path / str(threads))
    expected_losses, expected = of_training(tmp_path / "1")
    assert losses == expected_losses
    assert {key for key in weights if weights[key] != expected[key]} == set()


def test_processes_of_one_to_four_threads_train_the_bundled_encoder_alike(msls: Path, tmp_path: Path) -> None:
    more = as_settings(
        "global_params.backbone=half:efficientnet_lite0",
        "train.loss=multi_similarity",
        "train.optim=ADAMW",
        "train.augmentation=turn,roll,zoom",
        "train.local_weight=0.5",
        "train.cities=trondheim",
        "train.val_cities=sf",
    )
    found = []
    for threads in (1, 2, 3, 4):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        environment["MKL_NUM_THREADS"] = str(threads)
        folder = tmp_path / str(threads)
        command = [sys.executable, str(ROOT / "train.py"), *command_line(msls, folder, *more)]
        subprocess.run(command, env=environment, check=True, timeout=300)
        found.append(of_training(folder))
    assert found == found[:1] * 4
