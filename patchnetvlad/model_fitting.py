"""What is fitted on pictures, without training: NetVLAD's clusters by k-means, WPCA on sampled descriptors."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.checkpoints import build_model, read_checkpoint, without_projection, write_checkpoint
from patchnetvlad.clustering import Clusters, find_clusters
from patchnetvlad.config import Config
from patchnetvlad.errors import UserError
from patchnetvlad.images import ChangePicture, image_batches, require_readable
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.picture_changes import Picture, changed, check_changes
from patchnetvlad.weights import initialise_encoder
from patchnetvlad.whitening import WPCAFit, check_num_pcs, fit_place_whitening, fit_wpca, whiteness_error

logger = logging.getLogger(__name__)

WPCA_SAMPLES = 10_000  # descriptors that WPCA is fitted on, at most


def fit_model(
    config: Config, paths: Sequence[Path], device: torch.device, progress: bool = False
) -> tuple[PlaceModel, WPCAFit | None]:
    """Fit clusters and WPCA on pictures, for any encoder; the configuration says everything else.

    [train] num_clusters, whitening, augmentation, seed and pretrained are used, and [global_params] backbone, pooling,
    num_pcs, patch_sizes, strides, vladv2. Patch-NetVLAD's WPCA is fitted on patches sampled evenly from all pictures
    and patch sizes, since they are what it is applied to most; a global model's on global descriptors.
    Raises UserError when the pictures are too few for num_clusters or num_pcs.
    """
    params = config.global_params
    _check_fit(config)
    torch.manual_seed(config.train.seed)
    model = PlaceModel(
        params.backbone,
        params.pooling,
        config.train.num_clusters,
        0,
        params.patch_sizes,
        params.strides,
        params.vladv2,
    )
    initialise_encoder(model, config)
    model.eval().to(device)
    if isinstance(model.pool, NetVLAD):
        batches = picture_batches(config, paths, device, progress, "Sampling local descriptors")
        initialise_pool(model.pool, find_clusters(model.encoder, batches, config.train.num_clusters, config.train.seed))
    if not params.num_pcs:
        return model, None
    return model, add_projection(model, paths, config, progress)


def _check_fit(config: Config) -> None:
    params, train = config.global_params, config.train
    check_changes(train.augmentation)
    if train.augmentation and params.pooling == "patchnetvlad":
        raise UserError(
            "[train] augmentation: WPCA learns from changed pictures for a global model alone, since a changed "
            "picture's patches lie elsewhere (set [global_params] pooling = netvlad, or augmentation = None)"
        )
    if params.patch_backbone is not None:
        raise UserError(
            f"[global_params] patch_backbone = {params.patch_backbone}: global descriptors and patches are fitted one "
            "by one, and joined by tools/combine_models.py (set it to None)"
        )


def add_wpca(
    config: Config, resume_path: Path, paths: list[Path], source: Path, device: torch.device, progress: bool = False
) -> Path:
    """Fit WPCA on global descriptors of up to 10,000 of the pictures and write the trained checkpoint with it.

    source: where the pictures are listed, for messages. As published, the sample is of global descriptors (paper,
    section 4.1). A projection that the checkpoint has already is dropped. Needs about 1.5 GB for 10,000 descriptors of
    8,192 numbers beside the model. Returns the new file, its name that of the checkpoint with _WPCA{num_pcs}.
    Raises UserError when num_pcs is not below the number of pictures, or above the descriptors' length, and when one
    of the sample's pictures cannot be read.
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
    require_readable(paths, source, config.global_params.loading_threads, progress)
    config = replace(config, global_params=replace(config.global_params, num_pcs=num_pcs))
    fit = add_projection(model, paths, config, progress)
    path = resume_path.with_name(resume_path.name.removesuffix(".pth.tar") + f"_WPCA{num_pcs}.pth.tar")
    epoch = {"epoch": checkpoint.extras["epoch"]} if isinstance(checkpoint.extras.get("epoch"), int) else {}
    write_checkpoint(path, model, explained_variance=fit.explained_variance, **epoch)
    return path


def initialise_pool(pool: NetVLAD, clusters: Clusters) -> None:
    """Start NetVLAD from clusters."""
    logger.info("k-means: %d clusters of %d local descriptors", len(clusters.centroids), len(clusters.descriptors))
    alpha = pool.initialise(torch.from_numpy(clusters.centroids), torch.from_numpy(clusters.descriptors))
    logger.info("soft assignment: alpha %.2f", alpha)


def add_projection(model: PlaceModel, paths: Sequence[Path], config: Config, progress: bool) -> WPCAFit:
    """Fit WPCA on pictures, add it to the model, and say how good it is.

    [global_params] num_pcs and [train] whitening, augmentation and seed are used: with augmentation every picture is
    described changed as well, and what the changes do is whitened. Raises UserError when the pictures are too few.
    """
    train, num_pcs = config.train, config.global_params.num_pcs
    batches = picture_batches(config, paths, model.device, progress, "Sampling descriptors")
    descriptors = sample_descriptors(model, batches, len(paths), train.seed)
    if train.augmentation:
        change = _change(train.augmentation, train.seed)
        batches = picture_batches(config, paths, model.device, progress, "Describing changed pictures", change)
        others = sample_descriptors(model, batches, len(paths), train.seed)
        both = np.concatenate([descriptors, others])
        fit = fit_place_whitening(both, others - descriptors, num_pcs, train.whitening)
        descriptors = both
    else:
        fit = fit_wpca(descriptors, num_pcs, train.whitening)
    logger.info(
        "WPCA: %d dimensions of %d, %.1f %% of the variance of %d descriptors, eigenvalues %.3g to %.3g; projected, "
        "their covariance is within %.2g of %s",
        len(fit.weight),
        descriptors.shape[1],
        100 * fit.explained_variance,
        len(descriptors),
        fit.eigenvalues[0],
        fit.eigenvalues[-1],
        whiteness_error(descriptors, fit),
        "the identity (0 is white)",
    )
    model.add_wpca(fit)
    return fit


def _change(names: Sequence[str], seed: int) -> ChangePicture:
    def change(number: int, picture: Picture) -> Picture:
        return changed(picture, names, np.random.default_rng([seed, number]))

    return change


@torch.inference_mode()
def sample_descriptors(
    model: PlaceModel, pictures: Iterator[Tensor], num_pictures: int, seed: int
) -> NDArray[np.float32]:
    """Descriptors before WPCA for WPCA to be fitted on: n×dims, n at most about WPCA_SAMPLES.

    pictures: batches on the model's device. Random patches of every picture and patch size, or the global
    descriptors of a model without patches.
    """
    rng = np.random.default_rng(seed)
    rows: list[NDArray[np.float32]] = []
    scales = max(1, len(model.patch_sizes))
    each = max(1, WPCA_SAMPLES // (num_pictures * scales))
    for batch in pictures:
        described = model.describe(batch)
        if not described.patches:
            rows.append(described.global_.cpu().numpy())
        for patches in described.patches:
            for picture in patches:
                chosen = torch.from_numpy(rng.permutation(len(picture))[:each])
                rows.append(picture[chosen.to(picture.device)].cpu().numpy())
    return np.concatenate(rows)


def picture_batches(
    config: Config,
    paths: Sequence[Path],
    device: torch.device,
    progress: bool,
    label: str,
    change: ChangePicture | None = None,
) -> Iterator[Tensor]:
    """Batches of pictures of the size of [feature_extract] on a device, with a progress bar."""
    size = config.feature_extract
    batches = image_batches(
        paths,
        size.imageresizeh,
        size.imageresizew,
        size.cachebatchsize,
        config.global_params.loading_threads,
        size.exif_rotation,
        change=change,
    )
    with tqdm(total=len(paths), desc=label, unit="img", disable=not progress) as bar:
        for indices, batch in batches:
            yield batch.to(device)
            bar.update(len(indices))
