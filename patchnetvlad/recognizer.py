"""Place recognition from Python: describe pictures, compare two, keep a database in memory and query it."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from patchnetvlad.config import Config
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.devices import check_one_gpu, memory_errors
from patchnetvlad.errors import UserError
from patchnetvlad.extraction import tell_precision
from patchnetvlad.images import in_order, prepare_image, read_image
from patchnetvlad.ini import load_config
from patchnetvlad.model import PlaceModel
from patchnetvlad.paths import require_file
from patchnetvlad.ranking import Ranker, find_matcher
from patchnetvlad.reranking import PairScore, score_pair, weighted_sum
from patchnetvlad.store.patch_sources import DescribedPictures, PatchesInMemory
from patchnetvlad.weights import load_model

Picture: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | Tensor
"""A file, a Pillow picture, an H×W×3 or H×W uint8 array (RGB or grey), or a 3×H×W tensor with values 0 to 1."""

Pictures: TypeAlias = Picture | Iterable[Picture]
"""One or several; an array or tensor with one dimension more is several of one size."""


@dataclass(frozen=True)
class Description:
    """One described picture: global_, D unit entries, and its patch descriptors (empty for a global model)."""

    global_: Tensor
    patches: PatchFeatures


@dataclass(frozen=True)
class Comparison:
    """Two pictures compared: score, the weighted sum over patch sizes (larger is better), and what is behind it."""

    score: float
    pair: PairScore


@dataclass(frozen=True)
class Answer:
    """One database picture proposed for a query; score is comparable within one query's answers only."""

    index: int
    score: float


class PlaceRecognizer:
    """A model with its configuration, ready to describe and compare pictures."""

    def __init__(self, model: PlaceModel, config: Config) -> None:
        config.check_matching()
        self.model = model
        self.config = config
        self.matcher = find_matcher(config.feature_match.matcher)

    @classmethod
    def load(
        cls,
        config: str | Path | Config = "builtin.ini",
        device: str | torch.device = "cpu",
        overrides: Sequence[str] = (),
    ) -> "PlaceRecognizer":
        """Load the model that a configuration (a shipped INI's name, a path, or a Config) describes.

        overrides: "section.key=value", as --set of the scripts. Raises UserError for whatever does not fit.
        """
        if not isinstance(config, Config):
            config = load_config(require_file(str(config), "configs"), overrides)
        check_one_gpu(config.global_params, "a PlaceRecognizer")
        model, _ = load_model(config)
        tell_precision(model.to(device))
        return cls(model.to(device), config)

    @memory_errors("[feature_extract] imageresizew and imageresizeh")
    def describe(self, pictures: Pictures) -> list[Description]:
        """Describe one picture or several, in the order given; while one is described, the next are loaded.

        Raises UserError for a file that cannot be read, ValueError for an array or tensor of another shape or type.
        """
        several = [pictures] if _is_one(pictures) else cast(Iterable[Picture], pictures)
        threads = 0 if _is_one(pictures) else self.config.global_params.loading_threads
        with closing(in_order(self._tensor, several, threads, ahead=threads)) as tensors:
            return [self._described(tensor) for tensor in tensors]

    def _described(self, tensor: Tensor) -> Description:
        described = self.model.describe(tensor[None].to(self.model.device))
        return Description(described.global_[0], described.picture(0))

    def compare(self, query: Description, reference: Description) -> Comparison:
        """Match two pictures at every patch size and score how well the matches agree in space."""
        pair = score_pair(query.patches, reference.patches, self.matcher)
        return Comparison(weighted_sum(pair.scores, self.config.feature_match.patchweights2use), pair)

    def database(self, pictures: Pictures) -> "PlaceDatabase":
        """Describe pictures and keep them in memory, to be queried."""
        return PlaceDatabase(self, self.describe(pictures))

    def _tensor(self, picture: Picture) -> Tensor:
        size = self.config.feature_extract
        if isinstance(picture, (str, Path)):
            picture = read_image(Path(picture), size.exif_rotation)
        elif isinstance(picture, Tensor):
            if picture.ndim != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
                raise ValueError(
                    f"expected a 3×H×W tensor of values 0 to 1, not {picture.dtype} {tuple(picture.shape)}"
                )
            picture = (picture.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()  # H×W×3
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
                raise ValueError(f"expected a uint8 array H×W×3 or H×W, not {picture.dtype} {picture.shape}")
            picture = Image.fromarray(picture)
        return prepare_image(picture.convert("RGB"), size.imageresizeh, size.imageresizew)


def _is_one(pictures: Pictures) -> TypeGuard[Picture]:
    if isinstance(pictures, (np.ndarray, Tensor)):
        return pictures.ndim < 4
    return isinstance(pictures, (str, Path, Image.Image))


class PlaceDatabase:
    """Described pictures in memory; answers name them by their position, from 0 in the order given.

    Raises UserError for settings of [feature_match] that such a database cannot follow: candidates of another method,
    patches on demand, more patches than cache_gb, and what `Ranker` refuses.
    """

    def __init__(self, recognizer: PlaceRecognizer, pictures: Sequence[Description]) -> None:
        self.recognizer = recognizer
        self.pictures = list(pictures)
        _check_in_memory(recognizer.config, self.pictures)
        self._ranker = Ranker(
            recognizer.config.feature_match, described_pictures(recognizer, self.pictures), recognizer.model.device
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def query(self, picture: Picture | Description, top: int = 5) -> list[Answer]:
        """The database pictures most like a query, best first: at most ``top``.

        The nearest by global descriptor are re-ranked by their patches, as many as [feature_match] says and at least
        ``top``. With a global model the order is the retrieval's.
        """
        if not isinstance(picture, Description):
            (picture,) = self.recognizer.describe([picture])
        rankings = self._ranker.rank(described_pictures(self.recognizer, [picture]), at_least=top)
        if rankings.scores is None:
            indices, scores = rankings.indices[0], rankings.retrieved.scores[0]
        else:
            indices, scores = rankings.scores.indices[0], rankings.scores.fused[0]
        best = zip(indices[:top].tolist(), scores[:top].tolist(), strict=True)
        return [Answer(index, score) for index, score in best if index >= 0]


def described_pictures(recognizer: PlaceRecognizer, pictures: Sequence[Description]) -> DescribedPictures:
    """Descriptions as ranking takes them."""
    vectors = [described.global_.cpu().numpy() for described in pictures]
    dims = recognizer.model.output_dims
    global_ = np.stack(vectors) if vectors else np.zeros((0, dims), dtype=np.float32)
    if recognizer.config.global_params.pooling != "patchnetvlad":
        return DescribedPictures(global_, None)
    return DescribedPictures(global_, PatchesInMemory(described.patches for described in pictures))


def _check_in_memory(config: Config, pictures: Sequence[Description]) -> None:
    options = config.feature_match
    if options.pred_input_path is not None:
        raise UserError(
            f"[feature_match] pred_input_path = {options.pred_input_path}: belongs to a list of queries, which a "
            "database in memory does not have (feature_match takes it)"
        )
    if config.describes_on_demand:
        raise UserError(
            "[feature_match] local_features = on_demand: a database in memory keeps its patches (take stored)"
        )
    held = sum(described.patches.nbytes for described in pictures)
    if options.cache_gb is not None and held > options.cache_gb * 1e9:
        raise UserError(
            f"[feature_match] cache_gb = {options.cache_gb:g}: the patches of {len(pictures)} pictures in memory take "
            f"{held / 1e9:.3g} GB (take more, or features on disk with feature_match)"
        )
