"""Describe every picture of a list and store the descriptors: one run from configuration to feature folder."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.checkpoints import Checkpoint
from patchnetvlad.config import Config
from patchnetvlad.config_values import CodeForm, code_form
from patchnetvlad.descriptors import Descriptors, PatchFeatures
from patchnetvlad.devices import EXTRACTION_MEMORY, memory_errors, synchronize
from patchnetvlad.encoders.table import encoder_geometry
from patchnetvlad.errors import UserError, counted
from patchnetvlad.files import duration, file_sha256, free_disk
from patchnetvlad.image_lists import ImageList, read_image_list
from patchnetvlad.images import image_batches, require_readable, tell_stretched_files
from patchnetvlad.ini import record_config
from patchnetvlad.model import PlaceModel
from patchnetvlad.patch_codes import SAMPLE_ROWS, rows_to_code, train_codec
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.store.arrays.array_files import array_file_bytes
from patchnetvlad.store.arrays.codecs import Trained, read_patch_codec
from patchnetvlad.store.arrays.map_codes import PatchHead, train_map_codec
from patchnetvlad.store.manifest import ManifestEntry, StoreHeader, entry_line
from patchnetvlad.store.writing.feature_writer import FeatureWriter
from patchnetvlad.weights import load_model
from patchnetvlad.workers import PICTURE_MEMORY, Company, keep_freed_memory

logger = logging.getLogger(__name__)

_SAME_PICTURE = 0.99  # cosine of two descriptions of it, on whatever device and in whatever precision

_CODEC_PICTURES = 100  # pictures at most that codes of patches are learned from


@dataclass(frozen=True)
class Extraction:
    """What a run did: pictures in the list, those described now (the others were finished before), and the time."""

    folder: Path
    pictures: int
    described: int
    seconds: float


Describe = Callable[[PlaceModel, Config, FeatureWriter, Callable[[int], object]], None]
"""Describes what a writer misses and hands it over; calls the last argument with how many pictures are done now."""


def extract(
    config: Config,
    list_path: Path,
    root: Path,
    folder: Path,
    device: torch.device,
    progress: bool = False,
    overwrite: bool = False,
    describe: Describe | None = None,
) -> Extraction:
    """Describe the pictures of a list and write their features into a folder; finished ones are skipped.

    Every picture is checked before the first is described. describe: shares the pictures out among several processes.
    Raises UserError for unreadable pictures, weights that do not fit, a folder with other features, too little disk.
    """
    if describe is None:
        config.check_one_process("extraction")
    model, checkpoint = load_model(config)
    model.to(device)
    pictures = read_image_list(list_path, root)
    require_readable(pictures.paths, pictures.source, config.global_params.loading_threads, progress)
    return describe_list(model, checkpoint, config, pictures, folder, progress, overwrite, describe)


@memory_errors(EXTRACTION_MEMORY)
def describe_list(
    model: PlaceModel,
    checkpoint: Checkpoint,
    config: Config,
    pictures: ImageList,
    folder: Path,
    progress: bool = False,
    overwrite: bool = False,
    describe: Describe | None = None,
) -> Extraction:
    """The same for a model that is loaded and pictures that have been checked."""
    started = time.perf_counter()
    if config.feature_extract.picture_size is not None:  # refused before there is a folder
        _check_patches_fit(model, *config.feature_extract.picture_size)
    trained = _patch_codec(model, config, pictures, None if overwrite else folder)
    header = store_header(model, checkpoint, config, trained)
    with FeatureWriter(folder, pictures, header, trained=trained, overwrite=overwrite) as writer:
        missing = writer.missing
        _check_kept(writer, model, pictures, config)
        logger.info("%s: %s, %d to describe", pictures.source, counted(len(pictures), "picture"), len(missing))
        record_config(config, folder)
        tell_precision(model)
        size = config.feature_extract
        paths = [pictures.paths[index] for index in missing]
        tell_stretched_files(paths, size.imageresizeh, size.imageresizew, size.exif_rotation)
        with tqdm(total=len(missing), desc="Describing", unit="img", disable=not progress) as bar:
            (describe or _describe_here)(model, config, writer, bar.update)
        writer.finish()
    seconds = time.perf_counter() - started
    logger.info("described %s in %s", counted(len(missing), "picture"), duration(seconds))
    return Extraction(folder, len(pictures), len(missing), seconds)


def _check_patches_fit(model: PlaceModel, height: int, width: int) -> None:
    """Raises UserError when a patch is larger than the feature map of a picture of that size."""
    try:
        model.grids(*model.geometry.map_size(height, width))
    except UserError:  # an encoder of the user's own may give larger maps, which it tells when it runs
        model.describe(torch.zeros(1, 3, height, width, device=model.device))


def _describe_here(model: PlaceModel, config: Config, writer: FeatureWriter, advance: Callable[[int], object]) -> None:
    """Describe everything that is missing in this process."""
    missing, batch_size = writer.missing, config.feature_extract.cachebatchsize
    logger.info("describing on %s", model.device)
    estimate = _Estimate(writer.folder, writer.header, len(missing), batch_size, model.device)
    for described in describe_pictures(model, config, writer.pictures, missing, estimate):
        for index, (global_, patches) in described.items():
            writer.write(index, global_, patches)
        advance(len(described))


def describe_pictures(
    model: PlaceModel,
    config: Config,
    pictures: ImageList,
    indices: Sequence[int],
    estimate: "_Estimate | None" = None,
) -> Iterator[dict[int, tuple[Tensor, PatchFeatures]]]:
    """Descriptors of some pictures of a list by their indices, a few pictures at a time; while they are described
    the next ones are loaded.

    What a picture's descriptors are on a CPU does not depend on the others.
    """
    size = config.feature_extract
    threads = config.global_params.loading_threads
    shape = size.imageresizeh, size.imageresizew
    batches = image_batches(pictures.paths, *shape, size.cachebatchsize, threads, size.exif_rotation, indices)
    form = code_form(size.feature_dtype)
    with_map = form is not None and form.kind == "map"
    company = Company()
    if model.device.type == "cpu":
        keep_freed_memory(*PICTURE_MEMORY)
    for batch_indices, batch in batches:
        # One picture at a time stays in a processor's cache; an accelerator wants them all
        step = 1 if model.device.type == "cpu" else len(batch_indices)
        for first in range(0, len(batch_indices), step):
            together = batch_indices[first : first + step]
            if estimate is not None:
                estimate.start()
            with company.watched():
                described = _describe(model, batch[first : first + step], pictures.names[together[0]])
            if estimate is not None:
                estimate.take(described.grids, step)
            yield {
                index: (described.global_[position], described.picture(position, with_map))
                for position, index in enumerate(together)
            }


def _check_kept(writer: FeatureWriter, model: PlaceModel, pictures: ImageList, config: Config) -> None:
    """Refuse to add pictures to those of another root: one that is kept must look as it did when it was described."""
    kept = writer.kept_row()
    if kept is None:
        return
    index, row = kept
    described = model.describe_file(pictures.paths[index], config.feature_extract)
    similarity = float(described.global_[0].cpu().numpy() @ row)
    if similarity < _SAME_PICTURE:
        raise UserError(
            f"{writer.folder}: {pictures.names[index]} was another picture when it was described (similarity "
            f"{similarity:.3f}; another root folder, or pictures replaced? choose another output "
            "folder, or replace the features with --overwrite)"
        )


def tell_precision(model: PlaceModel) -> None:
    """Say where the precision that was asked for is another one."""
    if model.precision == "tf32" and model.device.type != "cuda":
        logger.info("[feature_extract] precision = tf32: on %s it is float32, only CUDA has TF32", model.device)


def _describe(model: PlaceModel, batch: Tensor, name: str) -> Descriptors:
    """Describe pictures of one size; name: of the first."""
    try:
        return model.describe(batch.to(model.device))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def store_header(
    model: PlaceModel, checkpoint: Checkpoint, config: Config, trained: Trained | None = None
) -> StoreHeader:
    """What decides the features of a model under a configuration; trained: the quantiser of codes."""
    header = _header(config, checkpoint.sha256, model.output_dims, model.patch_sizes, model.geometry)
    return header if trained is None else replace(header, codec_sha256=trained.sha256)


def _patch_codec(model: PlaceModel, config: Config, pictures: ImageList, folder: Path | None) -> Trained | None:
    """The quantiser that feature_dtype asks for: that of the folder, or one trained on some of the pictures.

    None where none is needed. Raises UserError for more bytes than dimensions.
    """
    dtype = config.feature_extract.feature_dtype
    form = code_form(dtype)
    if form is None or not model.patch_sizes:
        return None
    numbers, dims = f"model's {model.output_dims} dimensions", model.output_dims
    if form.kind == "map":
        dims = model.patch_pool.channels
        numbers = f"map's {dims} channels"
    if form.num_bytes > dims:
        raise UserError(f"[feature_extract] feature_dtype = {dtype}: expected at most a byte for each of the {numbers}")
    kept = None if folder is None else read_patch_codec(folder)
    if kept is not None and kept.dtype == dtype:
        return kept
    indices = np.unique(np.linspace(0, len(pictures) - 1, _CODEC_PICTURES).astype(int)).tolist()
    rows = math.ceil(SAMPLE_ROWS / len(indices))
    described = (model.describe_file(pictures.paths[index], config.feature_extract) for index in indices)
    sample = torch.cat(
        [_some_rows(descriptors, form, rows, index) for index, descriptors in zip(indices, described, strict=True)]
    )
    learned_from = counted(len(sample), "descriptor"), counted(len(indices), "picture")
    logger.info("codec of %s from %s of %s", counted(form.num_bytes, "byte"), *learned_from)
    if form.kind == "pq":
        return train_codec(sample, form.num_bytes)
    return train_map_codec(sample, form.num_bytes, PatchHead.of(model.patch_pool, model.patch_whitening))


def _some_rows(described: Descriptors, form: CodeForm, count: int, seed: int) -> Tensor:
    """At most `count` of the descriptors of a picture that are coded, patches or positions, S×D on the CPU."""
    if form.kind == "map":
        assert described.local is not None
        rows = described.local[0].flatten(0, 1)
    else:
        rows = torch.cat(rows_to_code([descriptors[0] for descriptors in described.patches], described.grids))
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].to(rows.device)].cpu()


def expected_header(config: Config) -> StoreHeader:
    """What a feature folder must have been made with to fit a configuration; needs no weights.

    The checkpoint's hash is compared when the checkpoint is at hand, the dimensions when the configuration says them.
    """
    params = config.global_params
    path = config.find_checkpoint()
    return _header(
        config,
        file_sha256(path) if path is not None else None,
        params.num_pcs,
        params.patch_sizes if params.has_patches else (),
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
    return StoreHeader(
        checkpoint_sha256=checkpoint_sha256,
        settings={
            "backbone": config.global_params.backbone,
            "vladv2": config.global_params.vladv2,
            **({"patch_backbone": params.patch_backbone} if params.patch_backbone else {}),
            "picture_size": list(size.picture_size) if size.picture_size else "own",
            "precision": size.precision,
            "exif_rotation": size.exif_rotation,
        },
        num_dims=num_dims,
        patch_sizes=patch_sizes,
        strides=config.global_params.strides if patch_sizes else (),
        geometry=geometry,
        dtype=size.feature_dtype,
        layout=size.layout if patch_sizes else "files",
    )


def estimate_bytes(header: StoreHeader, map_size: tuple[int, int], num_pictures: int) -> int:
    """Bytes on disk for the features of pictures with a feature map of (height, width)."""
    codec = header.codec
    scales = ((1e-5 / 3,) * codec.num_scales(header.num_dims),) * len(header.strides)
    line = entry_line(ManifestEntry(num_pictures, "n" * 64, "n" * 64, map_size, tuple(filter(None, scales))))
    width = codec.width(header.num_dims)
    patches = sum(array_file_bytes((width, len(grid)), codec.dtype) for grid in header.stored_grids(map_size))
    return num_pictures * (patches + 4 * header.num_dims + len(line))


def check_disk(folder: Path, num_bytes: int) -> None:
    """Raise UserError when the disk of a folder, which need not exist yet, has less than num_bytes free."""
    free = free_disk(folder)
    if num_bytes > free:
        raise UserError(
            f"{folder}: the features need about {num_bytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free "
            "(use another disk, feature_dtype = float16, int8 or map40, a configuration with fewer dimensions or patch "
            "sizes, or local_features = on_demand)"
        )


class _Estimate:
    """Says what a run will take, in bytes and time, from its first pictures.

    The disk is checked after the first of them. A process's first batch on an accelerator, or first picture on a CPU,
    takes twice as long as others or longer: the time comes from the second one, unless there is only one.
    """

    def __init__(
        self, folder: Path, header: StoreHeader, num_pictures: int, batch_size: int, device: torch.device
    ) -> None:
        self._folder, self._header, self._device = folder, header, device
        self._num_pictures = num_pictures
        self._to_leave_out = 0 if num_pictures <= (1 if device.type == "cpu" else batch_size) else 1
        self._num_bytes: int | None = None  # until the first pictures tell the feature map's size
        self._told = False
        self._began = 0.0

    def start(self) -> None:
        """Pictures will be described now."""
        if not self._told:
            synchronize(self._device)
            self._began = time.perf_counter()

    def take(self, grids: tuple[PatchGrid, ...], count: int) -> None:
        """So many pictures have been described; raises UserError when the disk has not got room for all."""
        if self._told:
            return
        if self._num_bytes is None:
            map_size = (grids[0].map_height, grids[0].map_width) if grids else (0, 0)
            self._num_bytes = estimate_bytes(self._header, map_size, self._num_pictures)
            check_disk(self._folder, self._num_bytes)
        if self._to_leave_out:
            self._to_leave_out -= 1
            return
        synchronize(self._device)
        seconds = (time.perf_counter() - self._began) / count * self._num_pictures
        logger.info(
            "about %s on disk (%s of descriptors a picture, %s) and %s",
            _amount(self._num_bytes),
            _amount(self._num_bytes / self._num_pictures),
            self._header.dtype,
            duration(seconds),
        )
        self._told = True


def _amount(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
