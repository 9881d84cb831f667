"""One training run from configuration to checkpoints."""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from patchnetvlad.checkpoints import Checkpoint, build_model, read_checkpoint, without_projection
from patchnetvlad.clustering import (
    LOCALS_PER_PICTURE,
    Clusters,
    cluster_file,
    find_clusters,
    read_clusters,
    write_clusters,
)
from patchnetvlad.config import Config
from patchnetvlad.devices import TRAINING_MEMORY, memory_errors
from patchnetvlad.distributed import Processes
from patchnetvlad.errors import UserError, counted
from patchnetvlad.files import replacing, told, write_text
from patchnetvlad.frozen_layers import freeze, learning_layers
from patchnetvlad.images import tell_stretched_files
from patchnetvlad.ini import config_text
from patchnetvlad.memory_estimate import estimate_memory
from patchnetvlad.model import PlaceModel
from patchnetvlad.model_fitting import initialise_pool, picture_batches
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.paths import RUNS_FOLDER
from patchnetvlad.training import Trainer
from patchnetvlad.training_csv import read_training_csv
from patchnetvlad.training_data import TrainingData, TripletPlaces, read_cities, triplet_places
from patchnetvlad.training_state import (
    BEST,
    LAST,
    Learning,
    can_resume,
    changed_settings,
    restore_learning,
    run_settings,
    start_learning,
)
from patchnetvlad.validation import check_validation
from patchnetvlad.weights import initialise_encoder

logger = logging.getLogger(__name__)

CLUSTER_PICTURES = 500  # database pictures whose local descriptors are clustered


@dataclass(frozen=True)
class Source:
    """Where pictures come from: the root of an MSLS tree, or of the pictures in a CSV file."""

    root: Path
    training_csv: Path | None = None

    @property
    def listed(self) -> Path:
        """What to name in messages."""
        return self.training_csv or self.root


@dataclass(frozen=True)
class RunOptions:
    """What the command line says of a run.

    root: of the dataset; training_csv: CSV file in place of MSLS; more_sources: of pictures, beside that one;
    save_path: folder for the run's own folder, None for runs, or where the run that is resumed is; cache_path: where
    clusters are kept, None for a temporary folder; cluster_path: a cluster file to use, or to make; resume_path:
    checkpoint to start from; start_epoch: take its weights alone and count from there; check_pictures: decode all
    before the start; skip_unreadable: leave bad ones out.
    """

    root: Path
    training_csv: Path | None = None
    more_sources: tuple[Source, ...] = ()
    save_path: Path | None = None
    identifier: str = "mapillary_nopanos"
    cache_path: Path | None = None
    cluster_path: Path | None = None
    resume_path: Path | None = None
    num_epochs: int = 30
    start_epoch: int | None = None
    save_every_epoch: bool = False
    check_pictures: bool = True
    skip_unreadable: bool = False

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where all pictures come from."""
        return (Source(self.root, self.training_csv), *self.more_sources)


@dataclass(frozen=True)
class TrainedRun:
    """Where a run is, and the last validation's recalls with the best Recall@5."""

    folder: Path
    epoch: int
    recalls: dict[int, float]
    best_score: float


@memory_errors(TRAINING_MEMORY)
def train_model(config: Config, options: RunOptions, processes: Processes, progress: bool = False) -> TrainedRun:
    """Train on MSLS or on the user's pictures, from clusters, or from where a checkpoint stopped.

    Raises UserError for whatever does not fit, before training starts, and when the loss is no longer a number.
    """
    _check_run(config, processes)
    train = config.train
    config = config.for_training()
    checkpoint = read_checkpoint(options.resume_path) if options.resume_path else None
    cities = _read_data(config, options, processes, progress)
    places = triplet_places(cities.train, train.positive_radius, train.negative_radius)
    if processes.is_first:
        tell_stretched_files(places.paths, train.imageresizeh, train.imageresizew, config.feature_extract.exif_rotation)
    check_validation(cities.validation, train.match_radius)
    learning = _learning(config, options, checkpoint, places, processes, progress)
    logger.info("learning: %s", learning_layers(learning.model))
    _tell_memory(config, learning.model, places)
    folder = processes.from_first(_run_folder(config, options, checkpoint) if processes.is_first else None)
    assert folder is not None
    logger.info("run in %s", folder)
    if learning.progress.epoch >= options.num_epochs > 0:
        epochs = counted(learning.progress.epoch, "epoch is", "epochs are")
        logger.warning("%s finished already, --nEpochs is %d", epochs, options.num_epochs)
    trainer = Trainer(
        config, learning, places, cities.validation, folder, processes, options.save_every_epoch, progress
    )
    trainer.run(options.num_epochs)
    state = learning.progress
    return TrainedRun(folder, state.epoch, state.recalls, state.best_score)


def _check_run(config: Config, processes: Processes) -> None:
    """Raises UserError for settings that cannot be trained with, and warns of GPUs that would stand idle."""
    config.check_training()
    train = config.train
    if train.mixed_precision and processes.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("[train] mixed_precision = True: this GPU does not compute in bfloat16 (set it to False)")
    if processes.device.type == "cuda" and config.global_params.ngpu > processes.count:
        logger.warning(
            "[global_params] ngpu = %d, but %d process runs: start it as torchrun --nproc_per_node %d train.py …",
            config.global_params.ngpu,
            processes.count,
            config.global_params.ngpu,
        )


def read_training_data(config: Config, sources: Sequence[Source]) -> TrainingData:
    """The pictures of all sources: MSLS cities of the configuration, or those in CSV files.

    Several sources may each have pictures to learn from, or to be judged by, or both. Raises UserError when all of them
    together lack one, and for a city that is in two sources.
    """
    train = config.train
    of_sources = []
    for source in sources:
        if source.training_csv is None:
            cities = read_cities(source.root, train.cities, include_panoramas=train.includepanos)
            of_sources.append(TrainingData(cities, read_cities(source.root, train.val_cities)))
        else:
            complete = len(sources) == 1
            of_sources.append(read_training_csv(source.training_csv, source.root, train.includepanos, complete))
    joined = TrainingData(
        tuple(city for source_data in of_sources for city in source_data.train),
        tuple(city for source_data in of_sources for city in source_data.validation),
    )
    where = ", ".join(str(source.listed) for source in sources)
    for split, cities in (("train", joined.train), ("val", joined.validation)):
        if not cities:
            raise UserError(f"{where}: no picture has the roles {split}_query and {split}_database")
        twice = [name for name, count in Counter(city.name for city in cities).items() if count > 1]
        if twice:
            raise UserError(f"{where}: city {twice[0]} is in more than one (give its pictures another city's name)")
    return joined


def _read_data(config: Config, options: RunOptions, processes: Processes, progress: bool) -> TrainingData:
    cities = read_training_data(config, options.sources)
    workers = config.global_params.loading_threads
    return cities.checked(processes, options.check_pictures, options.skip_unreadable, workers, progress)


def _goes_on(checkpoint: Checkpoint, options: RunOptions) -> bool:
    """Whether a run is resumed, rather than a new one started from weights."""
    return options.start_epoch is None and can_resume(checkpoint)


def _learning(
    config: Config,
    options: RunOptions,
    checkpoint: Checkpoint | None,
    places: TripletPlaces,
    processes: Processes,
    progress: bool,
) -> Learning:
    """The model at its start, or as a checkpoint left it."""
    torch.manual_seed(config.train.seed)
    start = options.start_epoch or 0
    if checkpoint is None:
        model = _new_model(config, options, places, processes, progress)
        learning = start_learning(model, freeze(model, config.train.encoder_learns), config.train)
        learning.progress.epoch = start
        return learning
    model = build_model(without_projection(checkpoint), config.global_params).to(processes.device)
    if checkpoint.num_clusters not in (None, config.train.num_clusters):
        logger.info("%s: has %d clusters, which holds", checkpoint.path, checkpoint.num_clusters)
    learning = start_learning(model, freeze(model, config.train.encoder_learns), config.train)
    if _goes_on(checkpoint, options):
        restore_learning(checkpoint, learning, config.train.optim, processes.device)
        done = learning.progress
        logger.info(
            "%s: goes on after epoch %d, subset %d, step %d", checkpoint.path, done.epoch, done.subset, done.step
        )
        for change in changed_settings(checkpoint, run_settings(config, places)):
            logger.warning("%s: this run differs from the one that is resumed: %s", checkpoint.path, change)
    else:
        learning.progress.epoch = start
        logger.info("%s: its weights are the start, from epoch %d", checkpoint.path, start + 1)
    return learning


def _new_model(
    config: Config, options: RunOptions, places: TripletPlaces, processes: Processes, progress: bool
) -> PlaceModel:
    params, train = config.global_params, config.train
    model = PlaceModel(params.backbone, params.pooling, train.num_clusters, vladv2=params.vladv2)
    freeze(model, train.encoder_learns)
    if processes.is_first:
        initialise_encoder(model, config)
    model.eval().to(processes.device)
    if isinstance(model.pool, NetVLAD) and processes.is_first:
        initialise_pool(model.pool, _clusters(config, options, model, places, progress))
    state = processes.from_first(
        {key: value.cpu() for key, value in model.state_dict().items()} if processes.is_first else {}
    )
    model.load_state_dict(state)
    return model


def _clusters(
    config: Config, options: RunOptions, model: PlaceModel, places: TripletPlaces, progress: bool
) -> Clusters:
    """Clusters from --cluster_path where that file is, otherwise new ones, which are written there or to the cache."""
    train = config.train
    assert isinstance(model.pool, NetVLAD)
    if options.cluster_path is not None and options.cluster_path.exists():
        logger.info("clusters: %s", options.cluster_path)
        return read_clusters(options.cluster_path, train.num_clusters, model.pool.channels)
    rng = np.random.default_rng(train.seed)
    count = min(CLUSTER_PICTURES, places.num_database)
    rows = np.sort(rng.choice(places.num_database, count, replace=False)) + places.num_queries
    paths = [places.paths[row] for row in rows.tolist()]
    logger.info("clustering %d local descriptors of each of %d database pictures", LOCALS_PER_PICTURE, count)
    batches = picture_batches(config, paths, model.device, progress, "Sampling local descriptors")
    clusters = find_clusters(model.encoder, batches, train.num_clusters, train.seed)
    dataset = "own" if options.training_csv else "mapillary"
    with _cache(options.cache_path) as cache:
        path = options.cluster_path or cluster_file(cache, model.backbone, dataset, train.num_clusters)
        write_clusters(path, clusters)
        if options.cluster_path or options.cache_path:
            logger.info("clusters kept in %s", path)
    return clusters


@contextmanager
def _cache(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with TemporaryDirectory(prefix="patchnetvlad-") as name:
        yield Path(name)


def _tell_memory(config: Config, model: PlaceModel, places: TripletPlaces) -> None:
    train = config.train
    trained = train.batchsize * (2 + train.nneg + bool(train.local_weight))  # with local features, queries twice
    size = (train.imageresizeh, train.imageresizew)
    estimate = estimate_memory(model, size, train.cachebatchsize, trained, train.mixed_precision, train.optim != "SGD")
    pictures = min(len(places.paths), 2 * train.subset_queries + train.subset_negatives)
    kept = min(pictures * estimate.output, int(train.frozen_cache_gb * 1e9))
    gigabytes = [value / 1e9 for value in (estimate.peak, estimate.frozen, estimate.learned, kept)]
    logger.info(
        "memory, estimated: %.2f GB on the computing device (frozen layers %.2f GB for %s, learning %.2f GB "
        "for %s), and %.2f GB of main memory for the frozen layers' output of %s",
        *gigabytes[:2],
        counted(train.cachebatchsize, "picture"),
        gigabytes[2],
        counted(trained, "picture"),
        gigabytes[3],
        counted(pictures, "picture"),
    )


def _run_folder(config: Config, options: RunOptions, checkpoint: Checkpoint | None) -> Path:
    """The folder of the run that is resumed, unless the run is to go on elsewhere; otherwise a new one."""
    resumed = _resumed_folder(options, checkpoint)
    save_path = options.save_path or (resumed.parent if resumed else Path(RUNS_FOLDER))
    if resumed is not None and resumed.parent.resolve() == save_path.resolve():
        return resumed
    folder = save_path / f"{time.strftime('%b%d_%H-%M-%S')}_{options.identifier}"
    with told(folder):
        save_path.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError as error:
            raise UserError(f"{folder}: is there already (started twice in one second? try again)") from error
        if resumed is not None and (resumed / "checkpoints" / BEST).exists():
            with replacing(folder / "checkpoints" / BEST) as temporary:
                shutil.copyfile(resumed / "checkpoints" / BEST, temporary)
    write_text(folder / "config.ini", config_text(config))
    if resumed is not None:
        logger.info("the run of %s goes on in another folder, as --save_path says; its best model goes along", resumed)
    return folder


def _resumed_folder(options: RunOptions, checkpoint: Checkpoint | None) -> Path | None:
    """The folder of the run that a checkpoint goes on with, if it lies in one."""
    if checkpoint is None or not _goes_on(checkpoint, options) or checkpoint.path.parent.name != "checkpoints":
        return None
    folder = checkpoint.path.resolve().parent.parent
    return folder if (folder / "config.ini").exists() and (folder / "checkpoints" / LAST).exists() else None
