"""k-means over sampled local descriptors: where NetVLAD's clusters come from, and their files.

A file has the published layout: HDF5 with datasets ``centroids`` (K×C) and ``descriptors`` (n×C).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from patchnetvlad.errors import UserError
from patchnetvlad.faiss_library import faiss
from patchnetvlad.files import writing_hdf5
from patchnetvlad.netvlad import EPSILON

LOCALS_PER_PICTURE = 100  # local descriptors of each picture


@dataclass(frozen=True, eq=False)
class Clusters:
    """k-means centres (K×C) and the unit local descriptors (n×C) that they are of, float32."""

    centroids: NDArray[np.float32]
    descriptors: NDArray[np.float32]


def find_clusters(encoder: nn.Module, pictures: Iterable[Tensor], num_clusters: int, seed: int) -> Clusters:
    """Cluster the local descriptors of pictures (batches N×3×H×W on the encoder's device)."""
    samples = sample_local_descriptors(encoder, pictures, LOCALS_PER_PICTURE, seed)
    return Clusters(kmeans_centers(samples, num_clusters, seed), samples)


@torch.inference_mode()
def sample_local_descriptors(
    encoder: nn.Module, pictures: Iterable[Tensor], per_picture: int, seed: int
) -> NDArray[np.float32]:
    """Unit local descriptors at random positions of each picture's feature map.

    pictures: batches N×3×H×W on the encoder's device. Returns n×C; at most ``per_picture`` of each picture, fewer
    where the map has fewer positions or where the local descriptor is zero (nothing to see).
    """
    rng = np.random.default_rng(seed)
    rows: list[Tensor] = []
    for batch in pictures:
        feature_maps = encoder(batch).float().flatten(2).transpose(1, 2)  # N×HW×C
        for local in feature_maps:
            chosen = rng.permutation(local.shape[0])[:per_picture]
            picked = local[torch.from_numpy(chosen).to(local.device)]
            picked = picked[picked.norm(dim=1) > EPSILON]
            rows.append(F.normalize(picked, dim=1, eps=EPSILON).cpu())
    if not rows:
        raise UserError("clustering: no pictures to sample local descriptors from")
    return torch.cat(rows).numpy()


def kmeans_centers(
    samples: NDArray[np.float32], num_clusters: int, seed: int, iterations: int = 100
) -> NDArray[np.float32]:
    """K×C centres of n×C samples (Lloyd's iterations, deterministic for a seed)."""
    if len(samples) < num_clusters:
        raise UserError(
            f"clustering: {num_clusters} clusters need at least as many local descriptors: found {len(samples)}"
        )
    kmeans = faiss.Kmeans(
        samples.shape[1],
        num_clusters,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, len(samples) // num_clusters + 1),
    )
    kmeans.train(np.ascontiguousarray(samples, dtype=np.float32))
    return np.asarray(kmeans.centroids, dtype=np.float32)


def cluster_file(cache: Path, backbone: str, dataset: str, num_clusters: int) -> Path:
    """Where the clusters of a dataset are kept: CACHE/centroids/vgg16_mapillary_16_desc_cen.hdf5.

    Characters of the encoder's name that a file's may not have, as in timm:NAME, become underscores.
    """
    backbone = re.sub(r"[^\w.-]+", "_", backbone)
    return cache / "centroids" / f"{backbone}_{dataset}_{num_clusters}_desc_cen.hdf5"


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
        shape = "×".join(map(str, centroids.shape))
        raise UserError(
            f"{path}: centroids are {shape}, the model needs {num_clusters}×{channels} ([train] num_clusters × the "
            "encoder's channels)"
        )
    if descriptors.ndim != 2 or descriptors.shape[1] != channels or not len(descriptors):
        shape = "×".join(map(str, descriptors.shape))
        raise UserError(f"{path}: descriptors are {shape}, expected rows of {channels} numbers")
    if not (np.isfinite(centroids).all() and np.isfinite(descriptors).all()):
        raise UserError(f"{path}: holds NaN or infinite values (damaged?)")
    return Clusters(centroids, descriptors)


def write_clusters(path: Path, clusters: Clusters) -> None:
    """Write clusters atomically, making their folder."""
    with writing_hdf5(path) as file:
        file.create_dataset("centroids", data=clusters.centroids)
        file.create_dataset("descriptors", data=clusters.descriptors)
