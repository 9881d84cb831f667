"""Place recognition from Python: describe pictures, compare two, keep a database in memory and query it."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from patchnetvlad.config import MATCHERS, Config
from patchnetvlad.config_values import value_text
from patchnetvlad.descriptors import PatchFeatures
from patchnetvlad.devices import memory_errors, require_device
from patchnetvlad.errors import UserError, by_number, counted
from patchnetvlad.evaluation import open_features
from patchnetvlad.extraction import tell_precision
from patchnetvlad.files import some_of
from patchnetvlad.ground_truth import ground_truth_lengths, read_ground_truth
from patchnetvlad.image_lists import ImageList, read_image_list
from patchnetvlad.images import check_images, in_order, prepare_image, read_image, stretches, tell_stretched, to_rgb
from patchnetvlad.ini import load_config
from patchnetvlad.model import PlaceModel
from patchnetvlad.pair_comparison import MatchedPair, distinct_names
from patchnetvlad.paths import require_file
from patchnetvlad.ranking import Ranker
from patchnetvlad.reranking import PairScore, score_pair, weighted_sum
from patchnetvlad.store.cache.memory_cache import cache_bytes
from patchnetvlad.store.manifest import has_manifest
from patchnetvlad.store.reading.patch_sources import DescribedPictures, PatchesInMemory
from patchnetvlad.store.reading.spot_check import check_root
from patchnetvlad.weights import load_model
from patchnetvlad.workers import PICTURE_MEMORY, keep_freed_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | Tensor
"""A file, a Pillow picture, an H×W×3 or H×W uint8 array (RGB or grey), or a 3×H×W tensor with values 0 to 1."""

Pictures: TypeAlias = Picture | Iterable[Picture]
"""One or several; an array or tensor with one dimension more is several of one size."""


_FORMS = "a path, a Pillow picture, a uint8 array or a float tensor"


@dataclass(frozen=True, eq=False, repr=False)
class Description:
    """One described picture: global_, D unit entries, and its patch descriptors (empty for a global model).

    name: the file as it was given, or which picture it was; source: the picture as it was given, for figures.
    """

    global_: Tensor
    patches: PatchFeatures
    name: str = "picture"
    source: Picture | None = None

    def __repr__(self) -> str:
        counts = " + ".join(str(len(patches)) for patches in self.patches.descriptors)
        patches = (
            f", {counts} {by_number(sum(map(len, self.patches.descriptors)), 'patch', 'patches')}" if counts else ""
        )
        return f"{self.name}: {counted(len(self.global_), 'number')}{patches}"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Two pictures compared: score, the weighted sum over patch sizes (larger is better), and what is behind it."""

    score: float
    pair: PairScore
    query: Description
    reference: Description
    config: Config

    def __repr__(self) -> str:
        inliers, matches = (sum(counts) for counts in (self._inliers(), map(len, self.pair.matches)))
        names = f"{self.query.name} and {self.reference.name}"
        agreeing = f"{inliers} of {counted(matches, 'match', 'matches')} {by_number(inliers, 'agrees', 'agree')}"
        return f"{names}: score {self.score:.5f}, {agreeing}"

    def _inliers(self) -> list[int]:
        return [int(score.inliers.sum()) for score in self.pair.scores]

    def matched(self) -> MatchedPair:
        """Both pictures, read again where they were files, and their matches. Raises UserError without pictures."""
        size = self.config.feature_extract
        pictures, names = [], []
        for described in (self.query, self.reference):
            if described.source is None:
                raise UserError(f"{described.name}: was described without keeping the picture, so none can be drawn")
            pictures.append(as_image(described.source, described.name, size.exif_rotation))
            names.append(described.name)
        if all(isinstance(described.source, (str, Path)) for described in (self.query, self.reference)):
            names = list(distinct_names(Path(names[0]), Path(names[1])))
        grids = (self.query.patches.grids, self.reference.patches.grids)
        meaning = MATCHERS.find(self.config.feature_match.matcher).meaning
        return MatchedPair(
            pictures[0], pictures[1], *grids, self.pair, size.picture_size, (names[0], names[1]), meaning
        )

    def figure(self, width: float = 10.0, outlines: bool = False) -> "Figure":
        """Both pictures and their matches, width inches wide; a notebook shows what this returns."""
        from patchnetvlad.figures import match_figure

        return match_figure(self.matched(), self.score, width, outlines)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; all coordinates are pixels of the pictures as they are.

        matches: [query x, query y, reference x, reference y, inlier] of each; homography: rows of the 3×3 from the
        reference to the query, null where the matcher has none.
        """
        matched, scales = self.matched(), []
        for scale, (score, weight) in enumerate(
            zip(self.pair.scores, self.config.feature_match.patchweights2use, strict=True)
        ):
            homography = matched.homography(scale)
            query, reference = (points.round(2).tolist() for points in matched.points(scale))
            inliers = score.inliers.tolist()
            scales.append(
                {
                    "patch_size": matched.query_grids[scale].patch_size,
                    "stride": matched.query_grids[scale].stride,
                    "weight": weight,
                    "score": score.value,
                    "query_patches": len(matched.query_grids[scale]),
                    "num_matches": len(inliers),
                    "num_inliers": sum(inliers),
                    "homography": None if homography is None else homography.tolist(),
                    "matches": [
                        [*first, *second, inlier]
                        for first, second, inlier in zip(query, reference, inliers, strict=True)
                    ],
                }
            )
        names, matcher = matched.names, self.config.feature_match.matcher
        heads = {"query": names[0], "reference": names[1], "score": self.score, "matcher": matcher}
        return {**heads, "scales": scales}


@dataclass(frozen=True)
class Answer:
    """One database picture proposed for a query; score is comparable within one query's answers only.

    position: coordinates of the database picture, None where the database has none.
    """

    index: int
    score: float
    name: str
    position: tuple[float, ...] | None = None


class PlaceRecognizer:
    """A model with its configuration, ready to describe and compare pictures."""

    def __init__(self, model: PlaceModel, config: Config) -> None:
        config.check_matching()
        self.model = model
        self.config = config
        self.matcher = MATCHERS.find(config.feature_match.matcher)
        self._told_stretched = False

    def __repr__(self) -> str:
        params = self.config.global_params
        patches = f", patches of {value_text(params.patch_sizes)}" if params.has_patches else ""
        return (
            f"{self.config.path or 'configuration'}: {params.backbone}, {counted(self.model.output_dims, 'number')}"
            f"{patches}, on {self.model.device}"
        )

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
        config.check_one_gpu("a PlaceRecognizer")
        model, _ = load_model(config)
        model = model.to(require_device(device))
        tell_precision(model)
        return cls(model, config)

    @memory_errors("[feature_extract] imageresizew and imageresizeh")
    def describe(self, pictures: Pictures) -> list[Description]:
        """Describe one picture or several, in the order given; while one is described, the next are loaded.

        Of several, all files are checked before the first is described. Raises UserError for files that cannot be read,
        naming them, and for a picture smaller than a patch, ValueError for an array or tensor of another shape or type.
        """
        several = [pictures] if _is_one(pictures) else list(cast(Iterable[Picture], pictures))
        size, threads = self.config.feature_extract, 0
        if not _is_one(pictures):
            threads = self.config.global_params.loading_threads
            problems = check_images([Path(one) for one in several if isinstance(one, (str, Path))], threads)
            if problems:
                raise UserError(some_of(list(problems.values()), separator="; "))
        if self.model.device.type == "cpu":
            keep_freed_memory(*PICTURE_MEMORY)
        described, stretched = [], 0
        named = ((picture, picture_name(picture, number)) for number, picture in enumerate(several))
        with closing(in_order(self._loaded, named, threads, ahead=threads)) as loaded:
            for tensor, is_stretched, name, source in loaded:
                described.append(self._described(tensor, name, source))
                stretched += is_stretched
        if stretched and not self._told_stretched:  # once, not for every frame of a camera
            tell_stretched(stretched, len(described), size.imageresizeh, size.imageresizew)
            self._told_stretched = True
        return described

    def _loaded(self, named: tuple[Picture, str]) -> tuple[Tensor, bool, str, Picture]:
        size = self.config.feature_extract
        image, shape = as_image(*named, size.exif_rotation), (size.imageresizeh, size.imageresizew)
        return prepare_image(image, *shape), stretches(image.size, *shape), named[1], named[0]

    def _described(self, tensor: Tensor, name: str, source: Picture) -> Description:
        try:
            described = self.model.describe(tensor[None].to(self.model.device))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        return Description(described.global_[0], described.picture(0), name, source)

    def compare(self, query: Description, reference: Description) -> Comparison:
        """Match two described pictures at every patch size and score how well the matches agree in space.

        Raises ValueError for what is no description.
        """
        for given in (query, reference):
            if not isinstance(given, Description):
                raise ValueError(f"expected descriptions, which `describe` makes, not {type(given).__name__}")
        pair = score_pair(query.patches, reference.patches, self.matcher)
        score = weighted_sum(pair.scores, self.config.feature_match.patchweights2use)
        return Comparison(score, pair, query, reference, self.config)

    def database(self, pictures: Pictures, positions: NDArray[np.floating] | None = None) -> "PlaceDatabase":
        """Describe pictures and keep them in memory, to be queried; positions: M×c, for the answers.

        Raises ValueError for none at all, and as `describe`.
        """
        return PlaceDatabase(self, self.describe(pictures), positions)

    def open_database(
        self, features: str | Path, listed: str | Path, root: str | Path = "", ground_truth: str | Path | None = None
    ) -> "PlaceDatabase":
        """A database of features that feature_extract wrote; patches are read from the folder when they are needed.

        listed: the list that it described, whose names start from root; ground_truth: .npz whose utmDb has the
        positions. Close it, or use it in a with block. Raises UserError for what does not fit together, and for
        pictures that are not those that were described.
        """
        pictures = read_image_list(require_file(str(listed), "dataset_imagenames"), Path(root))
        positions = None
        if ground_truth is not None:
            truth_path = require_file(str(ground_truth), "dataset_gt_files")
            truth = read_ground_truth(truth_path, ground_truth_lengths(truth_path)[0], pictures.names)
            positions = truth.utm_database
        with ExitStack() as opened:
            memory = cache_bytes(self.config.feature_match.cache_gb)
            stored = opened.enter_context(
                open_features(self.config, pictures, Path(features), memory, lambda: self.model)
            )
            if has_manifest(Path(features)):  # without one it has been held against two of its pictures
                check_root(Path(features), pictures, stored.global_, self.config, self.model)
            return PlaceDatabase(self, _Stored(stored, pictures), positions, stored, opened.pop_all())


def picture_name(picture: object, number: int) -> str:
    """What a picture is called: its file, or its place among those given, counted from 0."""
    file = picture if isinstance(picture, (str, Path)) else getattr(picture, "filename", None)
    return str(file) if file else f"picture {number}"


def as_image(picture: Picture, name: str, exif_rotation: bool = False) -> Image.Image:
    """Any form of picture as Pillow's RGB.

    Raises UserError for a file that cannot be read, ValueError for another form, which it names.
    """
    if isinstance(picture, (str, Path)):
        return read_image(Path(picture), exif_rotation)
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
            raise ValueError(
                f"{name}: expected a 3×H×W tensor of values 0 to 1, not {picture.dtype} {tuple(picture.shape)}"
            )
        picture = (picture.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()  # H×W×3
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
            raise ValueError(f"{name}: expected a uint8 array H×W×3 or H×W, not {picture.dtype} {picture.shape}")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"{name}: expected {_FORMS}, not {type(picture).__name__}")
    try:
        return to_rgb(picture, exif_rotation)
    except (OSError, ValueError, SyntaxError) as error:  # of a picture that was opened, and is decoded only now
        raise UserError(f"{name}: cannot be decoded ({' '.join(str(error).split())})") from error


def _is_one(pictures: Pictures) -> TypeGuard[Picture]:
    if isinstance(pictures, (np.ndarray, Tensor)):
        return pictures.ndim < 4
    if not isinstance(pictures, (str, Path, Image.Image, Iterable)):
        raise ValueError(f"expected {_FORMS}, or several of them, not {type(pictures).__name__}")
    return isinstance(pictures, (str, Path, Image.Image))


class _Stored(Sequence[Description]):
    """The pictures of a feature folder, whose patches are read when they are asked for."""

    def __init__(self, stored: DescribedPictures, pictures: ImageList) -> None:
        self._stored, self._pictures = stored, pictures

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def names(self) -> Sequence[str]:
        return self._pictures.names

    @overload
    def __getitem__(self, index: int) -> Description: ...
    @overload
    def __getitem__(self, index: slice) -> list[Description]: ...
    def __getitem__(self, index: int | slice) -> Description | list[Description]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        patches = self._stored.patches
        return Description(
            torch.from_numpy(self._stored.global_[place]),
            PatchFeatures((), ()) if patches is None else patches.patches(place),
            self._pictures.names[place],
            self._pictures.paths[place],
        )


class PlaceDatabase:
    """Described pictures; answers name them by their index, from 0 in the order given, their name and position.

    pictures: their descriptions; positions: M×c, None where not known. Raises UserError for settings of
    [feature_match] that a database cannot follow: candidates of another method; in memory also patches on demand and
    more patches than cache_gb; and what `Ranker` refuses.
    """

    def __init__(
        self,
        recognizer: PlaceRecognizer,
        pictures: Sequence[Description],
        positions: NDArray[np.floating] | None = None,
        stored: DescribedPictures | None = None,
        opened: ExitStack | None = None,
    ) -> None:
        """stored and opened: of `PlaceRecognizer.open_database`."""
        self.recognizer = recognizer
        self.pictures = list(pictures) if stored is None else pictures
        self._names = pictures.names if isinstance(pictures, _Stored) else [picture.name for picture in self.pictures]
        self.positions = positions
        if positions is not None and len(positions) != len(pictures):
            raise ValueError(f"{counted(len(positions), 'position')} for {counted(len(pictures), 'picture')}")
        self._opened = opened or ExitStack()
        with ExitStack() as closing_after_errors:
            closing_after_errors.push(self._opened)
            recognizer.config.check_own_candidates("a database (feature_match takes it)")
            if not len(pictures):
                raise ValueError("a database needs at least one picture (does the pattern of their names match any?)")
            if stored is None:
                _check_in_memory(recognizer.config, self.pictures)
                stored = for_ranking(recognizer, self.pictures)
            self._ranker = Ranker(recognizer.config.feature_match, stored, recognizer.model.device)
            closing_after_errors.pop_all()

    def __repr__(self) -> str:
        kept = "on disk" if isinstance(self.pictures, _Stored) else "in memory"
        placed = "with" if self.positions is not None else "without"
        return f"{counted(len(self), 'picture')} {kept}, {placed} positions; {self.recognizer}"

    def __enter__(self) -> "PlaceDatabase":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the feature folder of `open_database`."""
        self._opened.close()

    def __len__(self) -> int:
        return len(self.pictures)

    def query(self, picture: Picture | Description, top: int = 5) -> list[Answer]:
        """The database pictures most like a query, best first: at most ``top``.

        The nearest by global descriptor are re-ranked by their patches, as many as [feature_match] says and at least
        ``top``. With a global model the order is the retrieval's. Raises ValueError for a ``top`` below 1.
        """
        if top < 1:
            raise ValueError(f"top = {top}: expected 1 or more answers")
        if not isinstance(picture, Description):
            (picture,) = self.recognizer.describe([picture])
        rankings = self._ranker.rank(for_ranking(self.recognizer, [picture]), at_least=top)
        if rankings.scores is None:
            indices, scores = rankings.indices[0], rankings.retrieved.scores[0]
        else:
            indices, scores = rankings.scores.indices[0], rankings.scores.fused[0]
        best = zip(indices[:top].tolist(), scores[:top].tolist(), strict=True)
        return [self._answer(index, score) for index, score in best if index >= 0]

    def _answer(self, index: int, score: float) -> Answer:
        position = None if self.positions is None else tuple(map(float, self.positions[index]))
        return Answer(index, score, self._names[index], position)


def for_ranking(recognizer: PlaceRecognizer, pictures: Sequence[Description]) -> DescribedPictures:
    """Descriptions as ranking takes them."""
    vectors = [described.global_.cpu().numpy() for described in pictures]
    dims = recognizer.model.output_dims
    global_ = np.stack(vectors) if vectors else np.zeros((0, dims), dtype=np.float32)
    if not recognizer.config.global_params.has_patches:
        return DescribedPictures(global_, None)
    return DescribedPictures(global_, PatchesInMemory(described.patches for described in pictures))


def _check_in_memory(config: Config, pictures: Sequence[Description]) -> None:
    options = config.feature_match
    if config.describes_on_demand:
        raise UserError(
            "[feature_match] local_features = on_demand: a database in memory keeps its patches (take stored)"
        )
    held = sum(described.patches.nbytes for described in pictures)
    if options.cache_gb is not None and held > options.cache_gb * 1e9:
        raise UserError(
            f"[feature_match] cache_gb = {options.cache_gb:g}: the patches of "
            f"{counted(len(pictures), 'picture')} in memory take "
            f"{held / 1e9:.3g} GB (take more, or features on disk with feature_match)"
        )
