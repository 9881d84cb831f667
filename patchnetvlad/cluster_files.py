"""k-means results on disk, in the published HDF5 layout: datasets ``centroids`` (K×C) and ``descriptors`` (n×C)."""

from pathlib import Path

import h5py
import numpy as np

from patchnetvlad.clustering import Clusters
from patchnetvlad.errors import UserError
from patchnetvlad.files import writing_hdf5


def cluster_file(cache: Path, backbone: str, dataset: str, num_clusters: int) -> Path:
    """Where the clusters of a dataset are kept: CACHE/centroids/vgg16_mapillary_16_desc_cen.hdf5."""
    name = backbone.replace(":", "_")  # of an encoder with arguments
    return cache / "centroids" / f"{name}_{dataset}_{num_clusters}_desc_cen.hdf5"


def read_clusters(path: Path, num_clusters: int, channels: int) -> Clusters:
    """Read clusters for a model of that size; raises UserError for another size or another kind of file."""
    try:
        with h5py.File(path) as file:
            arrays = [np.asarray(file[name], dtype=np.float32) for name in ("centroids", "descriptors")]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as a cluster file: {str(error).splitlines()[0]} (expected HDF5 with centroids and "
            "descriptors)"
        ) from error
    centroids, descriptors = arrays
    if centroids.shape != (num_clusters, channels):
        found = "×".join(map(str, centroids.shape))
        raise UserError(
            f"{path}: centroids are {found}, the model needs {num_clusters}×{channels} ([train] num_clusters × the "
            "encoder's channels)"
        )
    if descriptors.ndim != 2 or descriptors.shape[1] != channels or not len(descriptors):
        found = "×".join(map(str, descriptors.shape))
        raise UserError(f"{path}: descriptors are {found}, expected rows of {channels} numbers")
    if not (np.isfinite(centroids).all() and np.isfinite(descriptors).all()):
        raise UserError(f"{path}: holds NaN or infinite values (damaged?)")
    return Clusters(centroids, descriptors)


def write_clusters(path: Path, clusters: Clusters) -> None:
    """Write clusters atomically, making their folder."""
    with writing_hdf5(path) as file:
        file.create_dataset("centroids", data=clusters.centroids)
        file.create_dataset("descriptors", data=clusters.descriptors)
