"""A query's pose from the poses of the pictures it matches: the best match's, or a weighted mean of the first k.

The weights are those of kapture-localization: equal (EWB), barycentric descriptor interpolation (BDI), and similarity
to a power (CSI).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.localization.poses import Pose, conjugate, rotate

Weighting = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def equal_weights(query: NDArray[np.float64], matches: NDArray[np.float64]) -> NDArray[np.float64]:
    """1/k for each of k matches."""
    return np.full(len(matches), 1 / len(matches))


def barycentric_weights(query: NDArray[np.float64], matches: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights that sum to 1 and bring the weighted mean of the matches' descriptors k×D closest to the query's (D,).

    They may be negative. The normal equations with a Lagrange multiplier are solved by least squares, which gives the
    shortest of several solutions where descriptors repeat.
    """
    count = len(matches)
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = matches @ matches.T
    system[count, count] = 0
    return np.linalg.lstsq(system, np.append(matches @ query, 1.0), rcond=None)[0][:count]


def similarity_weights(alpha: float) -> Weighting:
    """Cosine similarity to the power of alpha, negative ones as 0, divided by the sum; equal when all are 0."""

    def weights(query: NDArray[np.float64], matches: NDArray[np.float64]) -> NDArray[np.float64]:
        powers = np.maximum(matches @ query, 0) ** alpha
        return powers / powers.sum() if powers.sum() > 0 else equal_weights(query, matches)

    return weights


def mean_pose(poses: Sequence[Pose], weights: NDArray[np.float64]) -> Pose:
    """Weighted mean of the cameras' places and of their directions (quaternion nearest to all in the mean square)."""
    outward = np.stack([conjugate(pose.quaternion) for pose in poses])  # k×4, camera to world
    places = np.stack([pose.center for pose in poses])
    total = weights.sum()
    place = weights @ places / total
    _, vectors = np.linalg.eigh((outward * weights[:, None]).T @ outward / total)
    quaternion = conjugate(vectors[:, -1])
    return Pose(quaternion, -rotate(quaternion, place))


def approximate_poses(
    predictions: NDArray[np.int64],
    database: Sequence[Pose | None],
    top_k: int = 1,
    weighting: Weighting = equal_weights,
    query_descriptors: NDArray[np.floating] | None = None,
    database_descriptors: NDArray[np.floating] | None = None,
) -> list[Pose | None]:
    """Poses of queries from predictions nQ×k, best first, −1 for none; a match without a pose is passed over.

    top_k = 1 is the pose of the best match, as in the paper. Descriptors (nQ×D, M×D, unit vectors) are needed by
    barycentric and similarity weights. None where no match has a pose.
    """
    approximated: list[Pose | None] = []
    for row, ranking in enumerate(predictions.tolist()):
        placed = [index for index in ranking if index >= 0 and database[index] is not None][:top_k]
        poses = [pose for pose in (database[index] for index in placed) if pose is not None]
        if len(poses) < 2:
            approximated.append(poses[0] if poses else None)
            continue
        if query_descriptors is None or database_descriptors is None:
            query, matches = np.empty(0), np.empty((len(placed), 0))
        else:
            query = query_descriptors[row].astype(np.float64)
            matches = database_descriptors[placed].astype(np.float64)
        approximated.append(mean_pose(poses, weighting(query, matches)))
    return approximated
