"""A model from pictures alone, without training: NetVLAD's clusters by k-means, WPCA on sampled descriptors."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.clustering import Clusters, find_clusters
from patchnetvlad.config import Config
from patchnetvlad.images import image_batches
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_netvlad import chosen_descriptors
from patchnetvlad.weights import initialise_encoder
from patchnetvlad.whitening import WPCAFit, fit_wpca, whiteness_error

logger = logging.getLogger(__name__)

WPCA_SAMPLES = 10_000  # descriptors that WPCA is fitted on, at most
SAMPLE_BYTES = 1 << 30  # that they may take, though at least twice as many are used as dimensions are kept
PATCHES_PER_PICTURE = 100  # of one size, since patches of one picture overlap; again more where dimensions need it


def fit_model(
    config: Config, paths: Sequence[Path], device: torch.device, progress: bool = False
) -> tuple[PlaceModel, WPCAFit | None]:
    """Fit clusters and WPCA on pictures, for any encoder; the configuration says everything else.

    [train] num_clusters, whitening, seed and pretrained are used, and [global_params] backbone, pooling, num_pcs,
    patch_sizes, strides, vladv2. Patch-NetVLAD's WPCA is fitted on patches sampled evenly from all pictures and patch
    sizes, since they are what it is applied to most; a global model's on global descriptors.
    Raises UserError when the pictures are too few for num_clusters or num_pcs.
    """
    started = time.perf_counter()
    params = config.global_params
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
    batches = picture_batches(config, paths, device, progress, "Sampling descriptors")
    wpca = add_projection(model, batches, len(paths), config)
    logger.info("model fitted to %d pictures in %.1f s", len(paths), time.perf_counter() - started)
    return model, wpca


def initialise_pool(pool: NetVLAD, clusters: Clusters) -> None:
    """Start NetVLAD from clusters."""
    logger.info("k-means: %d clusters of %d local descriptors", len(clusters.centroids), len(clusters.descriptors))
    alpha = pool.initialise(torch.from_numpy(clusters.centroids), torch.from_numpy(clusters.descriptors))
    logger.info("soft assignment: alpha %.2f", alpha)


def add_projection(model: PlaceModel, pictures: Iterator[Tensor], num_pictures: int, config: Config) -> WPCAFit:
    """Fit WPCA on pictures (batches on the model's device), add it to the model, and say how good it is.

    [global_params] num_pcs and [train] whitening and seed are used. Raises UserError when the pictures are too few.
    """
    num_pcs, started = config.global_params.num_pcs, time.perf_counter()
    descriptors = sample_descriptors(model, pictures, num_pictures, num_pcs, config.train.seed)
    described = time.perf_counter()
    logger.info("WPCA: fitting %d dimensions to %d descriptors of %d numbers", num_pcs, *descriptors.shape)
    fit = fit_wpca(descriptors, num_pcs, config.train.whitening)
    logger.info(
        "WPCA: %d dimensions of %d, %.1f %% of the variance of %d descriptors, eigenvalues %.3g to %.3g; projected, "
        "their covariance is within %.2g of %s (describing %.1f s, fitting %.1f s)",
        len(fit.weight),
        descriptors.shape[1],
        100 * fit.explained_variance,
        len(descriptors),
        fit.eigenvalues[0],
        fit.eigenvalues[-1],
        whiteness_error(descriptors, fit),
        "the identity (0 is white)",
        described - started,
        time.perf_counter() - described,
    )
    model.add_wpca(fit)
    return fit


@torch.inference_mode()
def sample_descriptors(
    model: PlaceModel, pictures: Iterator[Tensor], num_pictures: int, num_pcs: int, seed: int
) -> NDArray[np.float32]:
    """Descriptors before WPCA for num_pcs dimensions to be fitted to: n×dims.

    pictures: batches on the model's device. Random patches of every picture and patch size, or the global
    descriptors of a model without patches. n is at most about WPCA_SAMPLES.
    """
    rng = np.random.default_rng(seed)
    groups = num_pictures * max(1, len(model.patch_sizes))
    each = _patches_of_each(groups, num_pcs, model.output_dims) if model.patch_sizes else 1
    samples = np.empty((groups * each, model.output_dims), dtype=np.float32)
    filled = 0
    for batch in pictures:
        for rows in _sampled_rows(model, batch, each, rng):
            samples[filled : filled + len(rows)] = rows.cpu().numpy()
            filled += len(rows)
    return samples[:filled]


def _sampled_rows(model: PlaceModel, pictures: Tensor, each: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Global descriptors of pictures, or of every patch size and picture some patches'."""
    if not model.patch_sizes:
        yield model.describe(pictures).global_
        return
    assert isinstance(model.pool, NetVLAD)
    assigned = model.pool.assign(model.encoder(pictures))
    for grid in model.grids(*assigned[0].shape[1:3]):
        for local, assignment in zip(*assigned, strict=True):
            chosen = torch.from_numpy(rng.permutation(len(grid))[:each]).to(local.device)
            yield chosen_descriptors(local, assignment, model.pool.centroids, grid.patch_size, grid.stride, chosen)


def _patches_of_each(groups: int, num_pcs: int, dims: int) -> int:
    """Patches to take of each picture and patch size, of which there are so many groups."""
    enough = 2 * num_pcs
    limit = min(WPCA_SAMPLES, max(SAMPLE_BYTES // (4 * dims), enough))
    return max(1, min(limit // groups, max(PATCHES_PER_PICTURE, -(-enough // groups))))


def picture_batches(
    config: Config, paths: Sequence[Path], device: torch.device, progress: bool, label: str
) -> Iterator[Tensor]:
    """Batches of pictures of the size of [feature_extract] on a device, with a progress bar."""
    size = config.feature_extract
    batches = image_batches(
        paths,
        size.imageresizeh,
        size.imageresizew,
        size.cachebatchsize,
        max(1, config.global_params.threads),
        size.exif_rotation,
    )
    with tqdm(total=len(paths), desc=label, unit="img", disable=not progress) as bar:
        for indices, batch in batches:
            yield batch.to(device)
            bar.update(len(indices))
