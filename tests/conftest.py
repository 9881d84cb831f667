"""What the tests share: reference values, a checkpoint of known weights, and the folder of real pictures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / "data"

# Frozen weights that need no download: NumPy's legacy generator gives every machine the same bytes.
VGG16_CONVOLUTIONS = [
    (0, 3, 64),
    (2, 64, 64),
    (5, 64, 128),
    (7, 128, 128),
    (10, 128, 256),
    (12, 256, 256),
    (14, 256, 256),
    (17, 256, 512),
    (19, 512, 512),
    (21, 512, 512),
    (24, 512, 512),
    (26, 512, 512),
    (28, 512, 512),
]


def published_state(
    num_pcs: int = 128, num_clusters: int = 16, seed: int = 7, alpha: float = 100.0
) -> dict[str, torch.Tensor]:
    """A state dict with the published keys, the one that the reference values were made with."""
    rng = np.random.RandomState(seed)
    state = {}
    for layer, inputs, outputs in VGG16_CONVOLUTIONS:
        deviation = np.sqrt(2.0 / (inputs * 9))
        state[f"encoder.{layer}.weight"] = rng.standard_normal((outputs, inputs, 3, 3)) * deviation
        state[f"encoder.{layer}.bias"] = np.zeros(outputs)
    centroids = np.abs(rng.standard_normal((num_clusters, 512))).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    state["pool.centroids"] = centroids
    state["pool.conv.weight"] = (centroids * alpha)[:, :, None, None]
    if num_pcs:
        weight = rng.standard_normal((num_pcs, num_clusters * 512)) / np.sqrt(num_clusters * 512)
        state["WPCA.0.weight"] = weight[:, :, None, None]
        state["WPCA.0.bias"] = rng.standard_normal(num_pcs) * 0.001
    return {key: torch.from_numpy(np.ascontiguousarray(value, np.float32)) for key, value in state.items()}


@pytest.fixture(scope="session")
def reference():
    """Values of the published implementation in float64, for the synthetic pictures."""
    return np.load(DATA / "reference_synthetic.npz")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures; tests that need it skip where it is absent."""
    folder = os.environ.get("PATCHNETVLAD_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PATCHNETVLAD_TEST_DATA names no folder of real pictures")
    return Path(folder)


@pytest.fixture(scope="session")
def published_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file of 128 dimensions in the published format."""
    path = tmp_path_factory.mktemp("pretrained_models") / "mapillary_WPCA128.pth.tar"
    torch.save({"epoch": 0, "state_dict": published_state()}, path)
    return path
