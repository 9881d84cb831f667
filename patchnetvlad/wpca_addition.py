"""WPCA added to a trained checkpoint, fitted on global descriptors as published (paper section 4.1)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from patchnetvlad.checkpoints import build_model, read_checkpoint, without_projection, write_checkpoint
from patchnetvlad.config import Config
from patchnetvlad.errors import UserError
from patchnetvlad.model_fitting import WPCA_SAMPLES, add_projection, picture_batches
from patchnetvlad.paths import with_wpca
from patchnetvlad.whitening import check_num_pcs


def add_wpca(
    config: Config, resume_path: Path, paths: list[Path], device: torch.device, progress: bool = False
) -> Path:
    """Fit WPCA on global descriptors of up to 10,000 of the pictures and write the checkpoint with it.

    A projection that the checkpoint has already is dropped. Needs about 1.5 GB for 10,000 descriptors of 8,192
    numbers beside the model. Returns the new file, its name that of the checkpoint with _WPCA{num_pcs}.
    Raises UserError when num_pcs is not below the number of pictures, or above the descriptors' length.
    """
    num_pcs = config.global_params.num_pcs
    if not num_pcs:
        raise UserError("[global_params] num_pcs = 0: expected the number of dimensions to project to")
    checkpoint = read_checkpoint(resume_path)
    config = config.for_training()
    model = build_model(without_projection(checkpoint), config.global_params).to(device)
    rng = np.random.default_rng(config.train.seed)
    if len(paths) > WPCA_SAMPLES:
        paths = [paths[row] for row in sorted(rng.choice(len(paths), WPCA_SAMPLES, replace=False).tolist())]
    check_num_pcs(num_pcs, len(paths), model.output_dims)
    config = replace(config, global_params=replace(config.global_params, num_pcs=num_pcs))
    batches = picture_batches(config, paths, device, progress, "Describing")
    fit = add_projection(model, batches, len(paths), config)
    path = with_wpca(resume_path, num_pcs)
    epoch = {"epoch": checkpoint.extras["epoch"]} if isinstance(checkpoint.extras.get("epoch"), int) else {}
    write_checkpoint(path, model, explained_variance=fit.explained_variance, **epoch)
    return path
