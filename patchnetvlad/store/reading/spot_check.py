"""Feature folders checked by describing a picture or two again: of unknown origin, or of a root that may be another."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.errors import UserError, counted
from patchnetvlad.image_lists import ImageList
from patchnetvlad.model import PlaceModel

logger = logging.getLogger(__name__)

_SAME = 0.99  # cosine of two descriptions of one picture, on whatever device and by whatever version
_OTHER = 0.9  # below it the picture, the model or the settings are others
_LOOKED_FOR = 5  # pictures of a list, to see whether they are where its root says


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
        described = {
            index: find_model().describe_file(pictures.paths[index], config.feature_extract).global_[0].cpu().numpy()
            for index in chosen
        }
    except UserError as error:
        logger.warning("%s: has no manifest.jsonl, and cannot be checked by its pictures (%s)", folder, error)
        return
    for index, descriptor in described.items():
        _compare(folder, pictures, global_, index, descriptor)
    logger.info(
        "%s: has no manifest.jsonl; described again and found to agree: %s", folder, counted(len(chosen), "picture")
    )


def check_root(
    folder: Path, pictures: ImageList, global_: NDArray[np.float32], config: Config, model: PlaceModel
) -> None:
    """Describe one picture of a list again; raises UserError where it is not the one that the folder describes.

    global_: the folder's, N×D, unit rows. A warning where none of a few is at hand.
    """
    looked_for = np.unique(np.linspace(0, len(pictures) - 1, _LOOKED_FOR).astype(int)).tolist()
    at_hand = next((index for index in looked_for if pictures.paths[index].is_file()), None)
    if at_hand is None:
        logger.warning(
            "%s: %s is not there, nor are others: the database answers, but cannot be drawn (another root?)",
            folder,
            pictures.paths[0],
        )
        return
    path = pictures.paths[at_hand]
    described = model.describe_file(path, config.feature_extract).global_[0].cpu().numpy()
    if (likeness := float(described @ global_[at_hand])) < _SAME:
        raise UserError(
            f"{folder}: {path} is not the picture that was described as {pictures.names[at_hand]} (cosine "
            f"{likeness:.3f}; another root, or replaced since?)"
        )


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
