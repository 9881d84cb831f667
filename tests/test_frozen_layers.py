"""The model in two parts equals the model, learns only where it may, and its memory is foreseen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchnetvlad.errors import UserError
from patchnetvlad.frozen_layers import FrozenPart, LearnedPart, freeze
from patchnetvlad.images import image_batches
from patchnetvlad.memory_estimate import estimate_memory
from patchnetvlad.model import PlaceModel

SIZE = (48, 64)


@pytest.fixture(scope="module")
def vgg16() -> PlaceModel:
    torch.manual_seed(0)
    return PlaceModel("vgg16", "netvlad", 4).eval()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    found = []
    for number in range(5):
        found.append(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(found[-1])
    return found


@pytest.mark.parametrize(("backbone", "pooling"), [("vgg16", "netvlad"), ("rootsift", "netvlad"), ("vgg16", "max")])
def test_two_parts_equal_the_model(backbone: str, pooling: str) -> None:
    torch.manual_seed(0)
    model = PlaceModel(backbone, pooling, 4).eval()
    pictures = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        whole = model(pictures)
        parts = LearnedPart(model, False)(FrozenPart(model, False, 0)(pictures))[0]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_only_the_last_three_convolutions_and_the_pooling_learn(vgg16: PlaceModel) -> None:
    freeze(vgg16)
    pictures = torch.randn(2, 3, *SIZE)
    maps = FrozenPart(vgg16, False, 0)(pictures)
    assert not maps.requires_grad
    descriptors, _ = LearnedPart(vgg16, False)(maps)
    (descriptors[0] - descriptors[1]).norm().backward()
    learning = {name for name, parameter in vgg16.named_parameters() if parameter.grad is not None}
    convolutions = {f"encoder.{layer}.{kind}" for layer in (24, 26, 28) for kind in ("weight", "bias")}
    assert learning == convolutions | {"pool.conv.weight", "pool.centroids"}
    vgg16.zero_grad()


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(UserError, match="rootsift with pooling = max has no parameters that learn"):
        freeze(PlaceModel("rootsift", "max"))


@pytest.mark.parametrize("room", [0, 2, 100])
def test_steps_are_the_same_with_and_without_room(vgg16: PlaceModel, paths: list[Path], room: int) -> None:
    one = FrozenPart(vgg16, False, 0)
    with torch.no_grad():
        expected = torch.cat([one(batch) for _, batch in image_batches(paths, *SIZE, 1)])
    size = expected[0].numel() * 4
    frozen = FrozenPart(vgg16, False, room * size)
    for indices, batch in image_batches(paths, *SIZE, 2):
        frozen.keep(indices, frozen(batch))
    steps = [[0, 3], [4, 0, 1], [2]]
    if room == 100:  # all is kept, so the files are not read again
        nowhere = [Path("missing.png")] * 5
        outputs = list(frozen.steps(steps, nowhere, SIZE, 2, 1))
    else:
        outputs = list(frozen.steps(steps, paths, SIZE, 2, 1))
    for step, output in zip(steps, outputs, strict=True):
        torch.testing.assert_close(output, expected[step], atol=1e-5, rtol=1e-4)
    frozen.clear()
    with pytest.raises(UserError, match=r"missing\.png"):
        list(frozen.steps([[0]], [Path("missing.png")], SIZE, 2, 1))


def test_half_precision_leaves_pooling_in_float32(vgg16: PlaceModel) -> None:
    pictures = torch.randn(2, 3, *SIZE)
    maps = FrozenPart(vgg16, True, 0)(pictures)
    assert maps.dtype == torch.bfloat16
    seen = []
    handle = vgg16.pool.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        descriptors, _ = LearnedPart(vgg16, True)(maps)
        exact = vgg16(pictures)
    handle.remove()
    assert seen[0][0].dtype == seen[0][1].dtype == descriptors.dtype == torch.float32
    assert (descriptors * exact).sum(1).min() > 0.99
    torch.testing.assert_close(seen[0][1], vgg16.pool(seen[0][0]), atol=0, rtol=0)


def test_memory_estimate_by_hand(vgg16: PlaceModel) -> None:
    freeze(vgg16)
    estimate = estimate_memory(vgg16, (480, 640), 4, 28, False, False)
    plane = 480 * 640 * 4  # bytes of one channel of one picture
    # conv1_2 has 64 channels in and 64 out; the pictures themselves are there as well
    assert estimate.frozen == pytest.approx(4 * plane * (64 + 64 + 3), rel=0.1)
    assert estimate.output == 512 * 30 * 40 * 4
    # For the gradient, each of three convolutions keeps its input, and the descriptors' maps are kept besides
    assert estimate.learned > 28 * estimate.output * 4
    assert estimate.learned < 28 * estimate.output * 16
    weights = sum(parameter.numel() for parameter in vgg16.parameters()) * 4
    learning = sum(parameter.numel() for parameter in vgg16.parameters() if parameter.requires_grad) * 4
    assert estimate.model == weights + learning
    assert estimate_memory(vgg16, (480, 640), 4, 28, False, True).model == weights + 2 * learning
    assert estimate_memory(vgg16, (480, 640), 8, 28, False, False).frozen == pytest.approx(
        2 * estimate.frozen, rel=0.01
    )
    assert estimate_memory(vgg16, (480, 640), 4, 28, True, False).output == estimate.output / 2
