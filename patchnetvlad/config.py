"""What can be configured: one frozen dataclass for each section of an INI file, with every key's rule and default."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from patchnetvlad.config_values import (
    Table,
    choice,
    code_form,
    encoder_name,
    flag,
    index_name,
    list_of,
    named,
    optional,
    real,
    recall_counts,
    scale_weights,
    setting,
    some_of_names,
    some_text,
    storage_type,
    value_text,
    weights_source,
    whole,
)
from patchnetvlad.errors import UserError
from patchnetvlad.paths import find_checkpoint, package_weights, require_checkpoint, require_file

MSLS_CITIES = {  # Mapillary Street-Level Sequences, by what a city is for
    "train": (
        *("trondheim", "london", "boston", "melbourne", "amsterdam", "helsinki", "tokyo", "toronto"),
        *("saopaulo", "moscow", "zurich", "paris", "bangkok", "budapest", "austin", "berlin"),
        *("ottawa", "phoenix", "goa", "amman", "nairobi", "manila"),
    ),
    "val": ("cph", "sf"),
    "test": ("miami", "athens", "buenosaires", "stockholm", "bengaluru", "kampala"),
}
_PUBLISHED_WEIGHTS = (0.45, 0.15, 0.4)  # of the three patch sizes 2, 5, 8

# A Matcher each (matching.py)
MATCHERS: Table[Any] = Table(
    "[feature_match] matcher", {"RANSAC": "ransac:RANSAC", "spatialApproximator": "rapid_spatial:RAPID_SPATIAL"}
)
# A subclass of Encoder each (encoders/interface.py), and what it takes behind colons
ENCODERS: Table[Any] = Table(
    "[global_params] backbone",
    {
        "vgg16": "encoders.vgg16:VGG16",
        "rootsift": "encoders.rootsift:DenseRootSIFT",
        "efficientnet_lite0": "encoders.efficientnet_lite:EfficientNetLite0",
        "timm:NAME[:LAYER]": "encoders.timm_encoder:TimmEncoder",
        "half:ENCODER": "encoders.half_size:HalfSize",
    },
)
ENCODER_ALIASES = {
    "resnet50": "timm:resnet50.tv2_in1k:layer3",
    "dinov2": "timm:vit_small_patch14_dinov2.lvd142m",
}
# A Loss each (losses.py)
LOSSES: Table[Any] = Table("[train] loss", {"triplet": "losses:TRIPLET", "multi_similarity": "losses:MULTI_SIMILARITY"})
# A Change each (picture_changes.py), in the order in which they happen to a picture
CHANGES: Table[Any] = Table(
    "[train] augmentation",
    {
        name: f"picture_changes:{name}"
        for name in ("turn", "roll", "zoom", "occlusion", "darkness", "blur", "noise", "jpeg")
    },
)
BUILT_INDEX = ".json"  # what ends the name of a search index made before, and no factory string
_ONE_GPU = "several are for feature_extract.py and feature_match.py with --engine ray; torchrun is for train.py"
_ENCODER = encoder_name(ENCODERS, ENCODER_ALIASES)


@dataclass(frozen=True)
class FeatureExtractConfig:
    """[feature_extract]: describing pictures."""

    batchsize: int = setting(5, whole(1))  # without effect, accepted because published files have it
    cachebatchsize: int = setting(5, whole(1))  # pictures described at a time
    imageresizew: int = setting(640, whole())  # width in pixels; 0 or less keeps each picture's own size
    imageresizeh: int = setting(480, whole())  # height in pixels; likewise
    # Type of the patch descriptors on disk. For databases codes of N bytes (docs/scale.md): mapN of every position of
    # the map, from which patches are made when they are read; pqN of a patch, where descriptors are too long for that.
    feature_dtype: str = setting("float32", storage_type("float32", "float16", "int8"))
    # Files of patch descriptors: one a picture and patch size, or one a block of pictures, for large databases.
    layout: str = setting("files", choice("files", "packed"))
    # Of the encoder's convolutions and the WPCA product: bfloat16 is faster where the processor has it, and less exact;
    # so is, between the two, tf32 on an NVIDIA GPU, and elsewhere it is float32.
    precision: str = setting("float32", choice("float32", "tf32", "bfloat16"))
    exif_rotation: bool = setting(False, flag())  # turn upright by EXIF; the published numbers are without

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that all pictures get, None where each keeps its own."""
        return (self.imageresizeh, self.imageresizew) if min(self.imageresizeh, self.imageresizew) > 0 else None


@dataclass(frozen=True)
class FeatureMatchConfig:
    """[feature_match]: ranking database pictures."""

    matcher: str = setting("RANSAC", named(MATCHERS))  # scores a pair's matches
    n_values_all: tuple[int, ...] = setting((1, 5, 10, 20, 50, 100), recall_counts())  # N of Recall@N
    dataset_name: str | None = setting(None, optional(some_text()))  # a label, without effect on results
    # File with the candidates of another method, in place of the search.
    pred_input_path: str | None = setting(None, optional(some_text()))
    imageresizew: int = setting(640, whole())  # pixels, as in [feature_extract]
    imageresizeh: int = setting(480, whole())
    # Share of each patch size in the score; not given: 0.45,0.15,0.4 for three sizes, otherwise equal shares.
    patchweights2use: tuple[float, ...] = setting((), scale_weights())
    # Share of the global descriptors' similarity in the score, beside those of the patch sizes; 0 as published.
    global_weight: float = setting(0.0, real(0))
    # Candidates that are re-ranked; None: as many as the largest of n_values_all.
    rerank_top: int | None = setting(None, optional(whole(1)))
    panorama_cutouts: int = setting(1, whole(1))  # cut-outs a panorama in the database; Tokyo 24/7: 12
    # Flat, the exact search; a faiss factory string; or the .json file that tools/build_index.py made.
    index: str = setting("Flat", index_name(BUILT_INDEX))
    # Patch descriptors are read from the store, or made when a candidate needs them.
    local_features: str = setting("stored", choice("stored", "on_demand"))
    # Patches are compared by float32 products, by 8-bit ones that are checked in float32 (same matches, on a CPU), or
    # by the faster of these.
    similarity: str = setting("auto", choice("auto", "float32", "int8"))
    # GB of patch descriptors made on demand that are kept on disk, in the feature folder, for later runs; 0: none.
    disk_cache_gb: float = setting(0.0, real(0))
    # GB of patch descriptors kept in memory; None: half of the memory available.
    cache_gb: float | None = setting(None, optional(real(0)))

    @property
    def reranked(self) -> int:
        """Candidates of each query that are re-ranked."""
        return self.rerank_top or max(self.n_values_all)

    @property
    def retrieved(self) -> int:
        """Candidates of each query that are retrieved: all that are re-ranked or reported."""
        return max(self.reranked, *self.n_values_all)


@dataclass(frozen=True)
class GlobalParams:
    """[global_params]: the model and the machine."""

    pooling: str = setting("patchnetvlad", choice("netvlad", "patchnetvlad", "max", "avg"))
    # The checkpoint's path without its end, which is num_pcs and .pth.tar, or the whole path.
    resumepath: str = setting("./pretrained_models/mapillary_WPCA", some_text())
    threads: int = setting(4, whole(0))  # threads that load and check pictures; 0: as many as there are cores
    num_pcs: int = setting(4096, whole(0))  # dimensions after WPCA; 0: no WPCA
    # GPUs to use where there are any; more than 1 share extraction and matching by Ray, and training by torchrun.
    ngpu: int = setting(1, whole(0))
    # Sides of the square patches, in positions of the feature map.
    patch_sizes: tuple[int, ...] = setting(
        (2, 5, 8), list_of(whole(1), "different whole numbers of 1 or more", distinct=True)
    )
    # Positions from one patch to the next, for each patch size; not given: 1 each.
    strides: tuple[int, ...] = setting((), list_of(whole(1), "whole numbers of 1 or more"))
    vladv2: bool = setting(False, flag())  # NetVLAD's soft assignment has a bias
    backbone: str = setting("vgg16", _ENCODER)

    # Encoder of the patches where it is another one; only with pooling = patchnetvlad.
    patch_backbone: str | None = setting(None, optional(_ENCODER))

    def __post_init__(self) -> None:
        if not self.strides:
            object.__setattr__(self, "strides", (1,) * len(self.patch_sizes))

    @property
    def has_patches(self) -> bool:
        """Whether pictures have patch descriptors beside the global one."""
        return self.pooling == "patchnetvlad"

    @property
    def loading_threads(self) -> int:
        """Threads that load pictures while others are described, 1 or more."""
        return self.threads or _cores()


@dataclass(frozen=True)
class TrainConfig:
    """[train]: learning on Mapillary Street-Level Sequences, and fitting WPCA."""

    batchsize: int = setting(4, whole(1))  # triplet sets in one step
    cachebatchsize: int = setting(20, whole(1))  # pictures described at a time in mining and validation
    optim: str = setting("SGD", choice("SGD", "ADAM", "ADAMW"))  # ADAM goes without weight decay and schedule
    seed: int = setting(123, whole(0))  # of every random generator
    lr: float = setting(1e-4, real(0, above=True))  # learning rate
    lrstep: int = setting(5, whole(1))  # epochs from one reduction of the learning rate to the next
    lrgamma: float = setting(0.5, real(0, above=True))  # factor of one reduction
    weightdecay: float = setting(1e-3, real(0))  # of SGD and ADAMW
    momentum: float = setting(0.9, real(0, 1))  # of SGD
    patience: int = setting(10, whole(0))  # validations without a better Recall@5 before the end; 0: no end
    evalevery: int = setting(1, whole(1))  # epochs from one validation to the next
    loss: str = setting("triplet", named(LOSSES))
    # Changes that happen to queries by chance, others in every epoch.
    augmentation: tuple[str, ...] = setting((), some_of_names(CHANGES))
    # Weight of the loss of local features at points whose places augmentation knows, beside the loss of descriptors.
    local_weight: float = setting(0.0, real(0))
    margin: float = setting(0.1, real(0))  # its root, √0.1, is the loss's margin on Euclidean distances
    num_clusters: int = setting(16, whole(1))  # K of NetVLAD
    includepanos: bool = setting(False, flag())  # train on panoramas too
    nneg: int = setting(5, whole(1))  # hardest negatives in a triplet set, at most
    imageresizew: int = setting(640, whole())  # pixels, as in [feature_extract]
    imageresizeh: int = setting(480, whole())
    whitening: float = setting(1.0, real(0, 1))  # power of WPCA's whitening: 0 rotates only, 1 is full
    # With augmentation: what is whitened, the differences that changes make, or the spread of all descriptors.
    whitens: str = setting("changes", choice("changes", "all"))
    # imagenet: as published; none: random; package:NAME: of an installed Python package; or a file's path.
    pretrained: str = setting("imagenet", weights_source())  # encoder's start
    # What of the encoder learns beside the pooling: its last stage (VGG16's conv5), all of it, or none of it.
    encoder_learns: str = setting("last", choice("last", "all", "none"))
    mixed_precision: bool = setting(False, flag())  # encoder in bfloat16; pooling stays float32
    # Cities of MSLS to learn from, and to be judged by.
    cities: tuple[str, ...] = setting(
        MSLS_CITIES["train"], list_of(some_text(), "different names of cities", distinct=True)
    )
    val_cities: tuple[str, ...] = setting(
        MSLS_CITIES["val"], list_of(some_text(), "different names of cities", distinct=True)
    )
    positive_radius: float = setting(10.0, real(0, above=True))  # metres within which two pictures show one place
    negative_radius: float = setting(25.0, real(0, above=True))  # metres within which a picture is no negative
    match_radius: float = setting(25.0, real(0, above=True))  # metres within which a validation's answer is right
    subset_queries: int = setting(1000, whole(1))  # queries that are mined for at a time
    subset_negatives: int = setting(1000, whole(1))  # random database pictures that negatives are mined from
    frozen_cache_gb: float = setting(8.0, real(0))  # GB for the frozen layers' output of the pictures mined

    @property
    def changes(self) -> tuple[Any, ...]:
        """What augmentation names, each a Change, in the table's order."""
        CHANGES.check(*self.augmentation)
        return tuple(CHANGES[name] for name in CHANGES if name in self.augmentation)


@dataclass(frozen=True)
class Config:
    """One configuration; ``path``, its file, and ``overrides``, section.key=value in place of the file's keys, take no
    part in equality.

    Weights that are not given become 0.45, 0.15, 0.4 for three patch sizes, otherwise equal ones of sum 1.
    Raises UserError when the numbers of patch sizes and strides differ.
    """

    feature_extract: FeatureExtractConfig = FeatureExtractConfig()
    feature_match: FeatureMatchConfig = FeatureMatchConfig()
    global_params: GlobalParams = GlobalParams()
    train: TrainConfig = TrainConfig()
    path: Path | None = field(default=None, compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        sizes, strides = self.global_params.patch_sizes, self.global_params.strides
        patch_backbone = self.global_params.patch_backbone
        if patch_backbone is not None and not self.global_params.has_patches:
            place = self._place("global_params.patch_backbone", "global_params.pooling")
            raise UserError(
                f"{place}: [global_params] patch_backbone = {patch_backbone}: pooling = "
                f"{self.global_params.pooling} has no patches (expected "
                "patchnetvlad, or patch_backbone = None)"
            )
        if len(strides) != len(sizes):
            place = self._place("global_params.strides", "global_params.patch_sizes")
            raise UserError(
                f"{place}: [global_params] strides = {value_text(strides)}: expected one stride for "
                f"each of patch_sizes = {value_text(sizes)}"
            )
        if not self.feature_match.patchweights2use:
            published = len(sizes) == len(_PUBLISHED_WEIGHTS)
            weights = _PUBLISHED_WEIGHTS if published else (1 / len(sizes),) * len(sizes)
            matching = replace(self.feature_match, patchweights2use=weights)
            object.__setattr__(self, "feature_match", matching)

    def _place(self, *keys: str) -> str:
        """Whose mistake it is when keys, as section.key, do not fit: the last override of one of them, or the file."""
        for override in reversed(self.overrides):
            if override.partition("=")[0].strip().lower() in keys:
                return f"--set {override}"
        return str(self.path or "configuration")

    def find_checkpoint(self) -> Path | None:
        """The checkpoint that resumepath and num_pcs name, or None where it is not at hand."""
        return find_checkpoint(self.global_params.resumepath, self.global_params.num_pcs, self.path)

    def require_checkpoint(self) -> Path:
        """The same; raises UserError where there is none. A published one may still have to be downloaded to there."""
        return require_checkpoint(self.global_params.resumepath, self.global_params.num_pcs, self.path)

    def require_pretrained(self) -> Path | None:
        """The file that [train] pretrained names; None for imagenet and none, which name no file.

        Raises UserError where there is none such.
        """
        source, params = self.train.pretrained, self.global_params
        if source in ("imagenet", "none"):
            return None
        package = source.removeprefix("package:")
        if package != source:
            try:
                return package_weights(package)
            except UserError as error:
                raise UserError(f"{self._place('train.pretrained')}: [train] pretrained = {source}: {error}") from error
        checkpoint = find_checkpoint(source, params.num_pcs, self.path) or find_checkpoint(source, 0, self.path)
        return checkpoint or require_file(source, "pretrained_models", self.path)

    @property
    def describes_on_demand(self) -> bool:
        """Whether matching makes patch descriptors when it needs them, in place of reading them."""
        return self.global_params.has_patches and self.feature_match.local_features == "on_demand"

    def check_one_gpu(self, work: str) -> None:
        """Raises UserError where several GPUs are asked for and the work, such as extraction, uses one."""
        if self.global_params.ngpu > 1:
            place = self._place("global_params.ngpu")
            raise UserError(
                f"{place}: [global_params] ngpu = {self.global_params.ngpu}: {work} uses one GPU ({_ONE_GPU})"
            )

    def check_torchrun(self, work: str) -> None:
        """Raises UserError where torchrun has started several processes, which would all do the same."""
        count = os.environ.get("WORLD_SIZE", "1")
        if count != "1":
            raise UserError(f"WORLD_SIZE = {count}: {work} is one process, and torchrun started several ({_ONE_GPU})")

    def check_one_process(self, work: str) -> None:
        """Raises UserError for several GPUs, and for several processes."""
        self.check_one_gpu(work)
        self.check_torchrun(work)

    def check_own_candidates(self, without: str) -> None:
        """Raises UserError for the candidates of another method, where there is no list of queries.

        without: what has none, and how they are used.
        """
        given = self.feature_match.pred_input_path
        if given is not None:
            place = self._place("feature_match.pred_input_path")
            raise UserError(
                f"{place}: [feature_match] pred_input_path = {given}: belongs to a list of queries, not to {without}"
            )

    def check_fitting(self) -> None:
        """Raises UserError unless a model can be fitted without training."""
        params, train = self.global_params, self.train
        if train.augmentation and params.has_patches:
            raise UserError(
                f"{self._place('train.augmentation')}: [train] augmentation: WPCA learns from changed pictures for a "
                "global model alone, since a changed picture's patches lie elsewhere (set [global_params] pooling = "
                "netvlad, or augmentation = None)"
            )
        if params.patch_backbone is not None:
            raise UserError(
                f"{self._place('global_params.patch_backbone')}: [global_params] patch_backbone = "
                f"{params.patch_backbone}: global descriptors and patches are fitted one by one, and joined by "
                "tools/combine_models.py (set it to None)"
            )
        self.require_pretrained()

    def check_projecting(self) -> None:
        """Raises UserError where WPCA is to be added and no dimensions are given."""
        if not self.global_params.num_pcs:
            raise UserError(
                f"{self._place('global_params.num_pcs')}: [global_params] num_pcs = 0: expected the number of "
                "dimensions to project to"
            )

    def check_matching(self) -> None:
        """Raises UserError unless [feature_match] fits the patch sizes and the picture size of extraction."""
        sizes, weights = self.global_params.patch_sizes, self.feature_match.patchweights2use
        if len(weights) != len(sizes):
            place = self._place("feature_match.patchweights2use", "global_params.patch_sizes")
            raise UserError(
                f"{place}: [feature_match] patchweights2use = {value_text(weights)}: expected one weight "
                f"for each of patch_sizes = {value_text(sizes)}"
            )
        self._check_picture_size("feature_match", self.feature_match)

    def for_queries(self) -> "Config":
        """The same for pictures that are looked for, whose patch descriptors are never stored as codes."""
        if code_form(self.feature_extract.feature_dtype) is None:
            return self
        return replace(self, feature_extract=replace(self.feature_extract, feature_dtype="float32"))

    def for_training(self) -> "Config":
        """The same for a model of global descriptors without WPCA, at the picture size of [train]."""
        params, train = self.global_params, self.train
        pooling = "netvlad" if params.has_patches else params.pooling
        sizes = replace(
            self.feature_extract,
            imageresizew=train.imageresizew,
            imageresizeh=train.imageresizeh,
            cachebatchsize=train.cachebatchsize,
        )
        params = replace(params, pooling=pooling, num_pcs=0, patch_backbone=None)
        return replace(self, global_params=params, feature_extract=sizes)

    def check_training(self) -> None:
        """Raises UserError unless [train] has the picture size of extraction, one for all, and what fits together."""
        self._check_picture_size("train", self.train)
        LOSSES.check(self.train.loss)
        CHANGES.check(*self.train.augmentation)
        if min(self.train.imageresizew, self.train.imageresizeh) < 1:
            place = self._place(*(f"train.{key}" for key in PICTURE_SIZE))
            raise UserError(
                f"{place}: [train] imageresizew, imageresizeh: training needs one size for all pictures, above 0"
            )
        if self.train.local_weight and not self.train.augmentation:
            raise UserError(
                f"{self._place('train.local_weight', 'train.augmentation')}: [train] local_weight = "
                f"{self.train.local_weight:g}: local features are compared between a query and its changed view, and "
                "augmentation = None (name some changes, or set local_weight = 0)"
            )
        near, far = self.train.positive_radius, self.train.negative_radius
        if near > far:
            place = self._place("train.positive_radius", "train.negative_radius")
            raise UserError(
                f"{place}: [train] positive_radius = {near:g}: expected at most negative_radius = {far:g} "
                "(a picture would be positive and negative)"
            )

    def _check_picture_size(self, section: str, values: FeatureMatchConfig | TrainConfig) -> None:
        for key in PICTURE_SIZE:
            here, extraction = getattr(values, key), getattr(self.feature_extract, key)
            if here != extraction:
                place = self._place(f"{section}.{key}", f"feature_extract.{key}")
                raise UserError(
                    f"{place}: [{section}] {key} = {here}: expected {extraction} as in "
                    "[feature_extract] (descriptors of differently resized pictures do not match: set both)"
                )


def _cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


SECTIONS = {  # section of the file, and its type
    "feature_extract": FeatureExtractConfig,
    "feature_match": FeatureMatchConfig,
    "global_params": GlobalParams,
    "train": TrainConfig,
}
PICTURE_SIZE = ("imageresizew", "imageresizeh")
