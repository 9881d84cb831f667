"""What is fitted on pictures, without training: NetVLAD's clusters by k-means, WPCA on sampled descriptors."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.checkpoints import build_model, read_checkpoint, without_projection, write_checkpoint
from patchnetvlad.clustering import LOCALS_PER_PICTURE, Clusters, find_clusters
from patchnetvlad.config import Config
from patchnetvlad.devices import EXTRACTION_MEMORY, memory_errors
from patchnetvlad.errors import counted
from patchnetvlad.images import ChangePicture, image_batches, require_readable, tell_stretched_files
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.patch_netvlad import chosen_descriptors
from patchnetvlad.paths import with_wpca
from patchnetvlad.picture_changes import Change, Picture, changed
from patchnetvlad.weights import initialise_encoder
from patchnetvlad.whitening import WPCAFit, check_num_pcs, fit_place_whitening, fit_wpca, whiteness_error

logger = logging.getLogger(__name__)

WPCA_SAMPLES = 10_000  # descriptors that WPCA is fitted on, at most
SAMPLE_BYTES = 1 << 30  # that they may take, though at least twice as many are used as dimensions are kept
# Pictures whose local descriptors are clustered, at most: 200,000 of those are thousands for each of 64 clusters, and
# more would hardly move a centre, while memory and the time of every iteration grow with them
CLUSTER_PICTURES = 2_000
PATCHES_PER_PICTURE = 100  # of one size, since patches of one picture overlap; again more where dimensions need it


@memory_errors(EXTRACTION_MEMORY)
def fit_model(
    config: Config, paths: Sequence[Path], device: torch.device, progress: bool = False
) -> tuple[PlaceModel, WPCAFit | None]:
    """Fit clusters and WPCA on pictures, for any encoder; the configuration says everything else.

    [train] num_clusters, whitening, augmentation, seed and pretrained are used, and [global_params] backbone, pooling,
    num_pcs, patch_sizes, strides, vladv2. Patch-NetVLAD's WPCA is fitted on patches sampled evenly from pictures and
    patch sizes, since they are what it is applied to most; a global model's on global descriptors. Of many pictures a
    random CLUSTER_PICTURES are clustered, and WPCA is fitted to a random WPCA_SAMPLES.
    Raises UserError when the pictures are too few for num_clusters or num_pcs.
    """
    started = time.perf_counter()
    params = config.global_params
    config.check_fitting()
    config.check_one_process("fitting")
    _tell_stretched(config, paths)
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
        fewer = _random_paths(paths, _pictures_to_cluster(model.pool.channels), config.train.seed)
        batches = picture_batches(config, fewer, device, progress, "Sampling local descriptors")
        initialise_pool(model.pool, find_clusters(model.encoder, batches, config.train.num_clusters, config.train.seed))
    if not params.num_pcs:
        return model, None
    wpca = add_projection(model, _random_paths(paths, WPCA_SAMPLES, config.train.seed), config, progress)
    logger.info("model fitted to %s in %.1f s", counted(len(paths), "picture"), time.perf_counter() - started)
    return model, wpca


@memory_errors(EXTRACTION_MEMORY)
def add_wpca(
    config: Config, resume_path: Path, paths: Sequence[Path], source: Path, device: torch.device, progress: bool = False
) -> Path:
    """Fit WPCA on global descriptors of up to 10,000 of the pictures and write the trained checkpoint with it.

    source: where the pictures are listed, for messages. As published, the sample is of global descriptors (paper,
    section 4.1). A projection that the checkpoint has already is dropped. Needs about 1.5 GB for 10,000 descriptors of
    8,192 numbers beside the model. Returns the new file, its name that of the checkpoint with _WPCA{num_pcs}.
    Raises UserError when num_pcs is not below the number of pictures, or above the descriptors' length, and when one
    of the sample's pictures cannot be read.
    """
    config.check_one_process("fitting")
    config.check_projecting()
    num_pcs = config.global_params.num_pcs
    checkpoint = read_checkpoint(resume_path)
    config = config.for_training()
    model = build_model(without_projection(checkpoint), config.global_params).to(device)
    paths = _random_paths(paths, WPCA_SAMPLES, config.train.seed)
    check_num_pcs(num_pcs, len(paths), model.output_dims)
    require_readable(paths, source, config.global_params.loading_threads, progress)
    _tell_stretched(config, paths)
    config = replace(config, global_params=replace(config.global_params, num_pcs=num_pcs))
    fit = add_projection(model, paths, config, progress)
    path = with_wpca(resume_path, num_pcs)
    epoch = {"epoch": checkpoint.extras["epoch"]} if isinstance(checkpoint.extras.get("epoch"), int) else {}
    write_checkpoint(path, model, explained_variance=fit.explained_variance, **epoch)
    return path


def _tell_stretched(config: Config, paths: Sequence[Path]) -> None:
    size = config.feature_extract
    tell_stretched_files(paths, size.imageresizeh, size.imageresizew, size.exif_rotation)


def _random_paths(paths: Sequence[Path], most: int, seed: int) -> Sequence[Path]:
    """All paths, or so many of them, in their order."""
    if len(paths) <= most:
        return paths
    rows = np.random.default_rng(seed).choice(len(paths), most, replace=False)
    return [paths[row] for row in sorted(rows.tolist())]


def _pictures_to_cluster(channels: int) -> int:
    return min(CLUSTER_PICTURES, max(1, SAMPLE_BYTES // (4 * channels * LOCALS_PER_PICTURE)))


def initialise_pool(pool: NetVLAD, clusters: Clusters) -> None:
    """Start NetVLAD from clusters."""
    logger.info("k-means: %d clusters of %d local descriptors", len(clusters.centroids), len(clusters.descriptors))
    alpha = pool.initialise(torch.from_numpy(clusters.centroids), torch.from_numpy(clusters.descriptors))
    logger.info("soft assignment: alpha %.2f", alpha)


def add_projection(model: PlaceModel, paths: Sequence[Path], config: Config, progress: bool) -> WPCAFit:
    """Fit WPCA on pictures, add it to the model, and say how good it is.

    [global_params] num_pcs and [train] whitening, whitens, augmentation and seed are used: with augmentation every
    picture is described changed as well, and what the changes do is whitened, or with whitens = all the spread of
    all. Raises UserError when the pictures are too few.
    """
    train, num_pcs, started = config.train, config.global_params.num_pcs, time.perf_counter()
    batches = picture_batches(config, paths, model.device, progress, "Sampling descriptors")
    descriptors = sample_descriptors(model, batches, len(paths), num_pcs, train.seed)
    differences = None
    if train.augmentation:
        change = _change(train.changes, train.seed)
        batches = picture_batches(config, paths, model.device, progress, "Describing changed pictures", change)
        changed_ones = sample_descriptors(model, batches, len(paths), num_pcs, train.seed)
        differences = changed_ones - descriptors
        descriptors = np.concatenate([descriptors, changed_ones])
    described = time.perf_counter()
    logger.info("WPCA: fitting %d dimensions to %d descriptors of %d numbers", num_pcs, *descriptors.shape)
    if differences is None or train.whitens == "all":
        fit = fit_wpca(descriptors, num_pcs, train.whitening)
    else:
        fit = fit_place_whitening(descriptors, differences, num_pcs, train.whitening)
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


def _change(changes: Sequence[Change], seed: int) -> ChangePicture:
    def change(number: int, picture: Picture) -> Picture:
        return changed(picture, changes, np.random.default_rng([seed, number]))

    return change


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
    rows_each = _patches_of_each(groups, num_pcs, model.output_dims) if model.patch_sizes else 1
    samples = np.empty((groups * rows_each, model.output_dims), dtype=np.float32)
    filled = 0
    for batch in pictures:
        for rows in _sampled_rows(model, batch, rows_each, rng):
            samples[filled : filled + len(rows)] = rows.cpu().numpy()
            filled += len(rows)
    return samples[:filled]


def _sampled_rows(model: PlaceModel, pictures: Tensor, each: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Global descriptors of pictures, or of every patch size and picture some patches'."""
    if not model.patch_sizes:
        yield model.describe(pictures).global_
        return
    assert isinstance(model.pool, NetVLAD)
    assigned = model.pool.assign(model.feature_map(pictures))
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
