"""A model and a run small enough for any test: rendered pictures at 160×120, RootSIFT, 8 clusters."""

import json
from pathlib import Path

import numpy as np
import torch

from patchnetvlad.checkpoints import write_checkpoint
from patchnetvlad.commands.features import feature_extract, feature_match
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.paths import shipped_folder

EXAMPLES = shipped_folder("example_images")


def tiny_model(folder: Path) -> list[str]:
    """Write a checkpoint; returns the options that make a script use it."""
    torch.manual_seed(3)
    model = PlaceModel("rootsift", "patchnetvlad", 8, 0, (2, 3), (1, 1))
    samples = torch.rand(400, 128) ** 4
    assert isinstance(model.pool, NetVLAD)
    model.pool.initialise(torch.nn.functional.normalize(samples[:8], dim=1), samples)
    write_checkpoint(folder / "tiny.pth.tar", model)
    overrides = [
        f"global_params.resumepath={folder / 'tiny'}",
        "global_params.num_pcs=0",
        "global_params.patch_sizes=2,3",
        "global_params.strides=1,1",
        "feature_match.patchweights2use=0.6,0.4",
        "feature_match.n_values_all=1,5,10",
    ]
    for section in ("feature_extract", "feature_match"):
        overrides += [f"{section}.imageresizew=160", f"{section}.imageresizeh=120"]
    return ["--config_path", "rootsift.ini", *(part for item in overrides for part in ("--set", item))]


def example_names(kind: str) -> list[str]:
    return sorted(f"{kind}/{path.name}" for path in (EXAMPLES / kind).iterdir())


def write_ground_truth(path: Path, queries: list[str], database: list[str], radius: float = 10.0) -> None:
    """Ground truth of example pictures, by the names they have in geometry.json."""
    pictures = json.loads((EXAMPLES / "geometry.json").read_text())["pictures"]
    utm = [
        np.array([(pictures[name]["east"], pictures[name]["north"]) for name in names]) for names in (queries, database)
    ]
    np.savez(path, utmQ=utm[0], utmDb=utm[1], posDistThr=radius)


def run(
    options: list[str], root: Path, folder: Path, queries: list[str], database: list[str], *match_options: str
) -> Path:
    """Extract and match pictures below a root, with folder/truth.npz if there is one; returns the results' folder."""
    lists = {"queries": queries, "database": database}
    for kind, names in lists.items():
        (folder / f"{kind}.txt").write_text("".join(f"{name}\n" for name in names))
        extract = ["--dataset_root_dir", str(root), "--dataset_file_path", str(folder / f"{kind}.txt")]
        assert feature_extract([*options, *extract, "--output_features_dir", str(folder / kind), "-q", "--nocuda"]) == 0
    match = ["--dataset_root_dir", str(root), "--result_save_folder", str(folder / "results"), "-q", "--nocuda"]
    for kind, name in (("queries", "query"), ("database", "index")):
        match += [
            f"--{name}_file_path",
            str(folder / f"{kind}.txt"),
            f"--{name}_input_features_dir",
            str(folder / kind),
        ]
    if (folder / "truth.npz").exists():
        match += ["--ground_truth_path", str(folder / "truth.npz")]
    assert feature_match([*options, *match, *match_options]) == 0
    return folder / "results"
