"""Describe every picture of a list and store the descriptors: one run from configuration to feature folder."""

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from patchnetvlad.checkpoints import Checkpoint, file_sha256
from patchnetvlad.config import Config
from patchnetvlad.encoders import encoder_geometry
from patchnetvlad.errors import UserError
from patchnetvlad.feature_files import array_file_bytes
from patchnetvlad.feature_header import ManifestEntry, StoreHeader, entry_line
from patchnetvlad.feature_writer import FeatureWriter
from patchnetvlad.image_lists import ImageList, read_image_list
from patchnetvlad.images import image_batches, require_readable
from patchnetvlad.model import PlaceModel
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.paths import find_file
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
    require_readable(pictures.paths, pictures.source, config.global_params.loading_threads, progress)
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
    header = store_header(model, checkpoint, config)
    size = config.feature_extract
    started = time.perf_counter()
    with FeatureWriter(folder, pictures, header, overwrite=overwrite) as writer:
        missing = writer.missing
        logger.info("%s: %d pictures, %d to describe on %s", pictures.source, len(pictures), len(missing), model.device)
        batches = image_batches(
            pictures.paths,
            size.imageresizeh,
            size.imageresizew,
            size.cachebatchsize,
            config.global_params.loading_threads,
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


def store_header(model: PlaceModel, checkpoint: Checkpoint, config: Config) -> StoreHeader:
    """What decides the features of a model under a configuration."""
    return _header(config, checkpoint.sha256, model.output_dims, model.patch_sizes, model.geometry)


def expected_header(config: Config) -> StoreHeader:
    """What a feature folder must have been made with to fit a configuration; needs no weights.

    The checkpoint's hash is compared when the checkpoint is at hand, the dimensions when the configuration says them.
    """
    params = config.global_params
    path = find_file(config.checkpoint_name(), "pretrained_models", config.path)
    return _header(
        config,
        file_sha256(path) if path is not None else None,
        params.num_pcs,
        params.patch_sizes if params.pooling == "patchnetvlad" else (),
        encoder_geometry(params.patch_backbone or params.backbone),
    )


def _header(
    config: Config,
    checkpoint_sha256: str | None,
    num_dims: int,
    patch_sizes: tuple[int, ...],
    geometry: EncoderGeometry,
) -> StoreHeader:
    size, params = config.feature_extract, config.global_params
    resized = [size.imageresizeh, size.imageresizew] if min(size.imageresizeh, size.imageresizew) > 0 else "own"
    return StoreHeader(
        checkpoint_sha256=checkpoint_sha256,
        settings={
            "backbone": config.global_params.backbone,
            "vladv2": config.global_params.vladv2,
            **({"patch_backbone": params.patch_backbone} if params.patch_backbone else {}),
            "picture_size": resized,
            "precision": size.precision,
            "exif_rotation": size.exif_rotation,
        },
        num_dims=num_dims,
        patch_sizes=patch_sizes,
        strides=config.global_params.strides if patch_sizes else (),
        geometry=geometry,
        dtype=size.feature_dtype,
    )


def estimate_bytes(header: StoreHeader, map_size: tuple[int, int], num_pictures: int) -> int:
    """Bytes on disk for the features of pictures with a feature map of (height, width)."""
    codec = header.codec
    scales = ((1e-5 / 3,) * codec.num_scales(header.num_dims),) * len(header.strides)
    line = entry_line(ManifestEntry(num_pictures, "n" * 64, "n" * 64, map_size, tuple(filter(None, scales))))
    width = codec.width(header.num_dims)
    patches = sum(array_file_bytes((width, len(grid)), codec.dtype) for grid in header.grids(map_size))
    return num_pictures * (patches + 4 * header.num_dims + len(line))


def check_disk(folder: Path, num_bytes: int) -> None:
    """Raise UserError when the disk of a folder, which need not exist yet, has less than num_bytes free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError(
            f"{folder}: the features need about {num_bytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free "
            "(use another disk, feature_dtype = float16 or int8, a configuration with fewer dimensions or patch "
            "sizes, or local_features = on_demand)"
        )


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


def _amount(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
