"""Extraction on several processes: they describe blocks of pictures and write their files, one keeps the manifest."""

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, overload

import torch

from patchnetvlad.config import Config
from patchnetvlad.devices import EXTRACTION_MEMORY, memory_errors
from patchnetvlad.engines.ray_cluster import Cluster
from patchnetvlad.errors import UserError
from patchnetvlad.extraction import Describe, check_disk, describe_pictures, estimate_bytes
from patchnetvlad.image_lists import ImageList
from patchnetvlad.model import PlaceModel
from patchnetvlad.store.arrays.blocks import PICTURES_IN_BLOCK, Block
from patchnetvlad.store.arrays.codecs import Trained
from patchnetvlad.store.manifest import StoreHeader, first_line
from patchnetvlad.store.writing.feature_writer import FeatureWriter
from patchnetvlad.store.writing.picture_writer import PictureWriter, Written

logger = logging.getLogger(__name__)

_PICTURES = 64  # in a part, at most, where pictures have files of their own

T = TypeVar("T")


class SparseSequence(Sequence[T]):
    """Some items of a long sequence, each in its place; the others are not here."""

    def __init__(self, items: Mapping[int, T], length: int) -> None:
        self._items, self._length = dict(items), length

    @classmethod
    def of(cls, sequence: Sequence[T], indices: Sequence[int]) -> "SparseSequence[T]":
        """Those of a sequence at some indices."""
        return cls({index: sequence[index] for index in indices}, len(sequence))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._items[place] for place in range(*index.indices(self._length))]
        return self._items[index]


@dataclass(frozen=True)
class PictureBlock:
    """Some pictures of a list: their indices, and the list with no more than them."""

    indices: Sequence[int]
    pictures: ImageList


@dataclass(frozen=True, eq=False)
class ExtractionJob:
    """What describing any part of a list takes; the weights are in the model, on the CPU.

    manifest: the first line of the folder's, by which a worker knows that it sees the same folder; short: blocks of a
    packed folder that lack pictures at their end.
    """

    model: PlaceModel
    config: Config
    header: StoreHeader
    trained: Trained | None
    folder: Path
    short: Sequence[Block]
    manifest: bytes
    device: str
    cpus: int

    def prepare(self) -> Callable[[PictureBlock], list[Written]]:
        """The model on its device; what describes a part writes its files too."""
        if first_line(self.folder) != self.manifest:
            raise UserError(
                f"{self.folder}: is not the same folder on {platform.node()}, which Ray uses too (all machines must "
                "see --output_features_dir, --dataset_root_dir and the list's pictures under the same paths)"
            )
        torch.set_num_threads(self.cpus)
        config = replace(self.config, global_params=replace(self.config.global_params, threads=self.cpus))
        model = self.model.to(torch.device(self.device))

        @memory_errors(EXTRACTION_MEMORY)
        def describe(part: PictureBlock) -> list[Written]:
            return describe_part(model, config, part, self.header, self.trained, self.folder, self.short)

        return describe


def describe_part(
    model: PlaceModel,
    config: Config,
    part: PictureBlock,
    header: StoreHeader,
    trained: Trained | None,
    folder: Path,
    short: Sequence[Block] = (),
) -> list[Written]:
    """Describe some pictures and write their patch files; returns what the manifest has still to be told.

    short: blocks of a packed folder that lack pictures at their end.
    """
    written: list[Written] = []
    files = (folder, part.pictures, header, trained, part.indices)
    with PictureWriter(*files, written.extend, lambda: "finished blocks are kept", short) as writer:
        for described in describe_pictures(model, config, part.pictures, part.indices):
            for index, (global_, patches) in described.items():
                writer.write(index, global_, patches)
    return written


def with_ray(cluster: Cluster) -> Describe:
    """What describes pictures on a cluster, in place of this process."""

    def describe(model: PlaceModel, config: Config, writer: FeatureWriter, advance: Callable[[int], object]) -> None:
        folder, pictures = writer.folder.absolute(), writer.pictures
        described_with = model, config, writer.header, writer.trained
        job = ExtractionJob(
            *described_with, folder, writer.short_blocks, first_line(folder), cluster.device, cluster.cpus
        )
        blocks = _cut(cluster, writer, config)
        announced = False
        for place, written in cluster.answers(job, (_part(pictures, indices) for indices in blocks)):
            if not announced:
                num_bytes = estimate_bytes(writer.header, written[0].map_size or (0, 0), sum(map(len, blocks)))
                check_disk(folder, num_bytes)
                logger.info("about %.3g GB on disk", num_bytes / 1e9)
                announced = True
            writer.record(written)
            advance(len(blocks[place]))

    return describe


def _cut(cluster: Cluster, writer: FeatureWriter, config: Config) -> list[list[int]]:
    """Missing pictures in parts: blocks of a packed folder, otherwise whole batches."""
    missing = writer.missing
    if writer.header.layout == "files":
        return cluster.parts(missing, _PICTURES, config.feature_extract.cachebatchsize)
    blocks: dict[int, list[int]] = {}
    for index in missing:
        blocks.setdefault(index // PICTURES_IN_BLOCK, []).append(index)
    return list(blocks.values())


def _part(pictures: ImageList, indices: Sequence[int]) -> PictureBlock:
    return PictureBlock(
        indices,
        ImageList(
            SparseSequence.of(pictures.names, indices),
            SparseSequence({index: pictures.paths[index].absolute() for index in indices}, len(pictures)),
            SparseSequence.of(pictures.feature_names, indices),
            pictures.source,
        ),
    )
