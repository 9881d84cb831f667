"""Feature folders without a record of what made them, checked by describing two of their pictures again."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.errors import UserError
from patchnetvlad.image_lists import ImageList
from patchnetvlad.images import prepare_image, read_image
from patchnetvlad.model import PlaceModel

logger = logging.getLogger(__name__)

_SAME = 0.99  # cosine of two descriptions of one picture, on whatever device and by whatever version
_OTHER = 0.9  # below it the picture, the model or the settings are others


def check_by_pictures(
    folder: Path,
    pictures: ImageList,
    global_: NDArray[np.float32],
    config: Config,
    find_model: Callable[[], PlaceModel],
) -> None:
    """Describe two pictures of a list whose features have no manifest, and compare the global descriptors.

    global_: the folder's, N×D, unit rows. Without pictures or weights at hand nothing is compared, which is said.
    Raises UserError for a picture whose descriptor is far from its row, or that another row describes.
    """
    at_hand = [index for index, path in enumerate(pictures.paths) if path.is_file()]
    weights = config.find_checkpoint()
    if weights is None or not at_hand:
        lacking = "its pictures are" if weights else "the weights are"
        logger.info("%s: has no manifest.jsonl, and is not checked, since %s not at hand", folder, lacking)
        return
    chosen = sorted({at_hand[len(at_hand) // 3], at_hand[2 * len(at_hand) // 3]})  # not at an end, where lists agree
    try:
        described = {index: _describe(find_model(), pictures.paths[index], config) for index in chosen}
    except UserError as error:
        logger.warning("%s: has no manifest.jsonl, and cannot be checked by its pictures (%s)", folder, error)
        return
    for index, descriptor in described.items():
        _compare(folder, pictures, global_, index, descriptor)
    logger.info("%s: has no manifest.jsonl; %d pictures described again agree with it", folder, len(chosen))


@torch.inference_mode()
def _describe(model: PlaceModel, path: Path, config: Config) -> NDArray[np.float32]:
    """The global descriptor of a picture (D,)."""
    size = config.feature_extract
    picture = prepare_image(read_image(path, size.exif_rotation), size.imageresizeh, size.imageresizew)
    descriptor = model(picture[None].to(model.device))[0]
    return np.asarray(descriptor.float().cpu().numpy(), dtype=np.float32)


def _compare(
    folder: Path, pictures: ImageList, global_: NDArray[np.float32], index: int, descriptor: NDArray[np.float32]
) -> None:
    name = pictures.names[index]
    if len(descriptor) != global_.shape[1]:
        raise UserError(
            f"{folder}: descriptors have {global_.shape[1]} dimensions, and {name} gets {len(descriptor)} now (another "
            "model: see resumepath and num_pcs)"
        )
    likeness = global_ @ descriptor  # N cosines
    best = int(likeness.argmax())
    if likeness[index] >= _SAME:
        return
    beginning = f"{folder}: has no manifest.jsonl, and row {index + 1} is not the descriptor of {name}"
    if likeness[best] >= _SAME:
        raise UserError(
            f"{beginning}, which stands in row {best + 1}, that of {pictures.names[best]} (made from a list in another "
            "order: give that list, or extract again)"
        )
    if likeness[index] < _OTHER:
        raise UserError(
            f"{beginning}: cosine {likeness[index]:.3f} with what it gets now (made by another model or picture size, "
            "or of pictures that --dataset_root_dir does not have: give the same, or extract again)"
        )
