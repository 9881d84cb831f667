"""The same bytes on one processor, whatever the number of threads and the size of batches."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import EXAMPLES, example_names, run, tiny_model, write_ground_truth

from patchnetvlad.checkpoints import write_checkpoint
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD

RUNS = [(1, 1), (1, 3), (1, 8), (2, 3), (4, 8)]  # threads of torch, pictures in a batch


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
