"""Describe every picture of a list and store the descriptors: one run from configuration to feature folder."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from patchnetvlad.checkpoints import Checkpoint, file_sha256
from patchnetvlad.config import Config, FeatureExtractConfig
from patchnetvlad.encoders import Encoder, make_encoder
from patchnetvlad.feature_header import read_manifest
from patchnetvlad.feature_store import FeatureWriter, StoreHeader, check_disk, estimate_bytes, stored_dims
from patchnetvlad.image_lists import ImageList, read_image_list
from patchnetvlad.images import count_reshaped, image_batches, require_readable
from patchnetvlad.ini import record_config
from patchnetvlad.model import PlaceModel
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.weights import load_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """What a run did: pictures in the list, those described now (the others were finished before), and the time."""

    folder: Path
    pictures: int
    described: int
    seconds: float


def extract(
    config: Config,
    list_path: Path,
    root: Path,
    folder: Path,
    device: torch.device,
    progress: bool = False,
    overwrite: bool = False,
) -> Extraction:
    """Describe the pictures of a list and write their features into a folder; finished ones are skipped.

    Every picture is checked before the first is described. Raises UserError for unreadable pictures, weights that do
    not fit, a folder with other features, too little disk.
    """
    model, checkpoint = load_model(config)
    model.to(device)
    pictures = read_image_list(list_path, root)
    require_readable(pictures.paths, pictures.source, loading_threads(config), progress)
    return describe_list(model, checkpoint, config, pictures, folder, progress, overwrite)


def describe_list(
    model: PlaceModel,
    checkpoint: Checkpoint,
    config: Config,
    pictures: ImageList,
    folder: Path,
    progress: bool = False,
    overwrite: bool = False,
) -> Extraction:
    """The same for a model that is loaded and pictures that have been checked."""
    header = store_header(model, checkpoint, config, pictures)
    size = config.feature_extract
    started = time.perf_counter()
    with FeatureWriter(folder, header, overwrite=overwrite) as writer:
        missing = writer.missing
        logger.info("%s: %d pictures, %d to describe on %s", pictures.source, len(pictures), len(missing), model.device)
        record_config(config, folder)
        _tell_reshaped([pictures.paths[index] for index in missing], size)
        batches = image_batches(
            pictures.paths,
            size.imageresizeh,
            size.imageresizew,
            size.cachebatchsize,
            loading_threads(config),
            size.exif_rotation,
            missing,
        )
        estimated = False
        with tqdm(total=len(missing), desc="Describing", unit="img", disable=not progress) as bar:
            for indices, batch in batches:
                # One picture at a time stays in a processor's cache; an accelerator wants them all
                step = 1 if model.device.type == "cpu" else len(indices)
                for first in range(0, len(indices), step):
                    began = time.perf_counter()
                    described = model.describe(batch[first : first + step].to(model.device))
                    if not estimated:  # the first ones tell the feature map's size and the speed
                        seconds = (time.perf_counter() - began) / step * len(missing)
                        _announce(folder, header, described.grids, len(missing), seconds)
                        estimated = True
                    for position, index in enumerate(indices[first : first + step]):
                        writer.write(index, described.global_[position], described.picture(position))
                    bar.update(step)
        writer.finish()
    seconds = time.perf_counter() - started
    logger.info("described %d pictures in %s", len(missing), _duration(seconds))
    return Extraction(folder, len(pictures), len(missing), seconds)


def store_header(model: PlaceModel, checkpoint: Checkpoint, config: Config, pictures: ImageList) -> StoreHeader:
    """What decides the features of a list under a configuration."""
    return _header(config, pictures, checkpoint.sha256, model.output_dims, model.patch_sizes, model.geometry)


def expected_header(config: Config, pictures: ImageList, folder: Path) -> StoreHeader:
    """What a feature folder must have been made with to fit a configuration; needs no weights.

    The checkpoint's hash is compared when the checkpoint is at hand, and otherwise taken from the folder.
    """
    params = config.global_params
    path = config.find_checkpoint()
    manifest = read_manifest(folder)
    stored_hash = manifest.header.checkpoint_sha256 if manifest else ""
    return _header(
        config,
        pictures,
        file_sha256(path) if path is not None else stored_hash,
        params.num_pcs or stored_dims(folder),
        params.patch_sizes if params.pooling == "patchnetvlad" else (),
        cast(Encoder, make_encoder(params.backbone)).geometry,
    )


def _header(
    config: Config,
    pictures: ImageList,
    checkpoint_sha256: str,
    num_dims: int,
    patch_sizes: tuple[int, ...],
    geometry: EncoderGeometry,
) -> StoreHeader:
    size = config.feature_extract
    resized = [size.imageresizeh, size.imageresizew] if min(size.imageresizeh, size.imageresizew) > 0 else "own"
    return StoreHeader(
        checkpoint_sha256=checkpoint_sha256,
        settings={
            "backbone": config.global_params.backbone,
            "vladv2": config.global_params.vladv2,
            "picture_size": resized,
            "precision": size.precision,
            "exif_rotation": size.exif_rotation,
        },
        names=pictures.names,
        feature_names=pictures.feature_names,
        num_dims=num_dims,
        patch_sizes=patch_sizes,
        strides=config.global_params.strides if patch_sizes else (),
        geometry=geometry,
        dtype=size.feature_dtype,
        list_name=pictures.source.name,
    )


def loading_threads(config: Config) -> int:
    """Threads that load pictures while others are described; published files say 0, and loading overlaps anyway."""
    return max(1, config.global_params.threads)


def _announce(
    folder: Path, header: StoreHeader, grids: tuple[PatchGrid, ...], num_pictures: int, seconds: float
) -> None:
    """Say what a run will take in bytes and time; raises UserError when the disk has not got that much."""
    map_size = (grids[0].map_height, grids[0].map_width) if grids else (0, 0)
    num_bytes = estimate_bytes(header, map_size, num_pictures)
    logger.info(
        "about %s on disk (%s of descriptors a picture, %s) and %s",
        _amount(num_bytes),
        _amount(num_bytes / num_pictures),
        header.dtype,
        _duration(seconds),
    )
    check_disk(folder, num_bytes)


def _tell_reshaped(paths: Sequence[Path], size: FeatureExtractConfig) -> None:
    reshaped = count_reshaped(paths, size.imageresizeh, size.imageresizew, size.exif_rotation)
    if reshaped:
        logger.info(
            "%d of %d pictures have other proportions than %d×%d and are stretched (imageresizew and imageresizeh; 0 "
            "keeps each picture's own size)",
            reshaped,
            len(set(paths)),
            size.imageresizew,
            size.imageresizeh,
        )


def _amount(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
