"""The feature map in codes, from which a picture's patch descriptors are made when they are asked for.

Patches overlap: those of one size at stride 1 are about as many as the map's positions, each with several times the
numbers, and of several sizes there are several times as many. What they hold is in the map. So its positions are
coded, and pooling and WPCA follow when a picture is read (docs/scale.md has what that costs, and what the codes of
patches themselves lose).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.patch_codes import SAMPLE_ROWS, PatchCodec, balanced_groups, train_quantizer
from patchnetvlad.patch_grid import PatchGrid
from patchnetvlad.store.arrays.patch_head import PatchHead

_STAGES = 6
_SAMPLE_COSINES = 1 << 15
_SEED = 20210621


@dataclass(frozen=True, eq=False)
class MapCodec:
    """A trained quantiser of maps into N bytes a position, and what makes patches of them.

    A map is turned along its C channels, so that errors weigh as they do in patches, and into its cosines along both
    axes. The dimensions of each cosine form G groups; stages of 256 centroids approach a group one after the other, a
    byte each, and the bytes go where they save most.

    num_bytes: N; mean: (C,); into and back: C×C, to the turned channels and from them; spectrum: mean square of the
    cosines of a map, H×W, stretched for maps of other sizes; groups: int64 G×⌈C/G⌉, the dimensions in each, −1 where a
    group is smaller; centroids: S×G×256×⌈C/G⌉, for cosines of mean square 1; gains: S×G, what each stage saves of that;
    head: the model's. All others float32.
    """

    num_bytes: int
    mean: NDArray[np.float32]
    into: NDArray[np.float32]
    back: NDArray[np.float32]
    spectrum: NDArray[np.float32]
    groups: NDArray[np.int64]
    centroids: NDArray[np.float32]
    gains: NDArray[np.float32]
    head: PatchHead

    @property
    def dtype(self) -> str:
        """The feature_dtype that it is trained for."""
        return f"map{self.num_bytes}"

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """All that decides codes and descriptors, by name."""
        own = {name: getattr(self, name) for name in _ARRAYS}
        return {"num_bytes": np.array(self.num_bytes), **own, **self.head.arrays}

    @classmethod
    def of_arrays(cls, content: Mapping[str, NDArray[np.generic]]) -> "MapCodec":
        """The codec of such arrays. Raises KeyError where one is missing."""
        head = PatchHead(**{name: content[name].astype(np.float32) for name in PatchHead.__dataclass_fields__})
        own = {name: content[name].astype(np.int64 if name == "groups" else np.float32) for name in _ARRAYS}
        return cls(num_bytes=int(content["num_bytes"]), head=head, **own)  # type: ignore[arg-type]  # by name

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that decides codes and descriptors."""
        content = hashlib.sha256()
        for name, array in self.arrays.items():
            content.update(f"{name} {array.shape}".encode("ascii"))
            content.update(np.ascontiguousarray(array, dtype="<i8" if array.dtype.kind == "i" else "<f4").tobytes())
        return content.hexdigest()

    @cached_property
    def _stages(self) -> list[PatchCodec]:
        return [PatchCodec(self.groups, centroids, 0.0) for centroids in self.centroids]

    @cached_property
    def _plans(self) -> dict[tuple[int, int], "_Plan"]:
        return {}

    def _plan(self, height: int, width: int) -> "_Plan":
        """Where the bytes of a map of that size are; made once for each size."""
        if (height, width) not in self._plans:
            spectrum = _stretched(self.spectrum, height, width)
            self._plans[height, width] = _planned(spectrum, self.gains, self.groups, self.num_bytes * height * width)
        return self._plans[height, width]

    def encode(self, local: Tensor) -> NDArray[np.uint8]:
        """Codes of H×W×C unit local descriptors on any device: (H·W)×N, of the map as a whole."""
        height, width, channels = local.shape
        plan = self._plan(height, width)
        turned = (local.detach().cpu().float() - torch.from_numpy(self.mean)) @ torch.from_numpy(self.into)
        left = cosines(turned).reshape(-1, channels) / plan.lengths
        codes = []
        for codec, (places, coded, mask) in zip(self._stages, plan.stages, strict=False):
            of_places = codec.encode(left[places])
            codes.append(of_places[coded])
            left[places] -= codec.approximate(of_places).mul_(mask)
        return np.concatenate(codes).reshape(height * width, self.num_bytes)

    def decode(self, codes: NDArray[np.uint8], height: int, width: int) -> Tensor:
        """The unit local descriptors, H×W×C float32, that the codes of a map stand for."""
        plan, flat = self._plan(height, width), codes.reshape(-1)
        total = torch.zeros(height * width, len(self.mean))
        first = 0
        for codec, (places, coded, mask) in zip(self._stages, plan.stages, strict=False):
            of_places = np.zeros(coded.shape, dtype=np.uint8)
            count = int(coded.sum())
            of_places[coded] = flat[first : first + count]
            total.index_add_(0, places, codec.approximate(of_places).mul_(mask))
            first += count
        turned = from_cosines(total.mul_(plan.lengths).reshape(height, width, -1))
        return F.normalize(turned @ torch.from_numpy(self.back) + torch.from_numpy(self.mean), dim=2)

    def encode_picture(
        self, descriptors: Sequence[Tensor], grids: Sequence[PatchGrid], local: Tensor | None
    ) -> list[NDArray[np.uint8]]:
        """The codes of a picture's map, where it has patches; its descriptors are not looked at."""
        if local is None:
            raise ValueError("a picture without its map cannot be coded")
        return [self.encode(local)] if any(map(len, grids)) else []

    def decode_picture(
        self, codes: Sequence[NDArray[np.uint8]], coded: Sequence[PatchGrid], grids: Sequence[PatchGrid]
    ) -> tuple[Tensor, ...]:
        """The unit rows P×D of all patches of some grids, from the codes of the map."""
        if not codes:
            return tuple(torch.empty(0, self.head.num_dims) for _ in grids)
        return self.head.descriptors(self.decode(codes[0], coded[0].map_height, coded[0].map_width), grids)


_ARRAYS = ("mean", "into", "back", "spectrum", "groups", "centroids", "gains")


class _Stage(NamedTuple):
    """Of one stage: the P cosines that have bytes, which of their G groups, P×G bool, and dimensions, P×C, 0 or 1."""

    places: Tensor
    coded: NDArray[np.bool_]
    mask: Tensor


@dataclass(frozen=True, eq=False)
class _Plan:
    """Where the bytes of a map go, and the length of each cosine, (H·W)×1, that its centroids are made for."""

    stages: list[_Stage]
    lengths: Tensor


def _planned(
    spectrum: NDArray[np.float64], gains: NDArray[np.float32], groups: NDArray[np.int64], num_bytes: int
) -> _Plan:
    """Bytes to the stages, cosines and groups that save most; a stage never without the one before."""
    saved = gains.astype(np.float64)[:, None, :] * spectrum.reshape(1, -1, 1)  # S×(H·W)×G
    chosen = np.zeros(saved.size, dtype=bool)
    chosen[np.argsort(-saved, axis=None, kind="stable")[:num_bytes]] = True
    group_of = np.empty(int((groups >= 0).sum()), dtype=np.int64)
    for number, dims in enumerate(groups):
        group_of[dims[dims >= 0]] = number
    stages = []
    for coded in chosen.reshape(saved.shape):
        places = np.flatnonzero(coded.any(axis=1))
        if len(places):
            mask = torch.from_numpy(coded[places][:, group_of].astype(np.float32))
            stages.append(_Stage(torch.from_numpy(places), coded[places], mask))
    return _Plan(stages, torch.from_numpy(np.sqrt(spectrum).astype(np.float32).reshape(-1, 1)))


def _stretched(spectrum: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """A spectrum at the frequencies of a map of another size; what it has not got is as its border."""
    found = spectrum.astype(np.float64)
    for axis, size in enumerate((height, width)):
        known = np.arange(found.shape[axis]) / found.shape[axis]
        found = np.apply_along_axis(partial(np.interp, np.arange(size) / size, known), axis, found)
    return np.maximum(found, 1e-12)


def cosines(values: Tensor) -> Tensor:
    """The coefficients of an H×W×C map on cosines along both axes; orthonormal."""
    return _along_both(values, _cosines(values.shape[0]).T, _cosines(values.shape[1]).T)


def from_cosines(coefficients: Tensor) -> Tensor:
    """The map H×W×C of such coefficients."""
    return _along_both(coefficients, _cosines(coefficients.shape[0]), _cosines(coefficients.shape[1]))


def _along_both(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    height, width, channels = values.shape
    lines = (rows @ values.reshape(height, -1)).reshape(height, width, channels)
    return columns @ lines


@lru_cache(maxsize=256)
def _cosines(count: int) -> Tensor:
    """Columns of the orthonormal cosine transform (DCT-II) of so many values."""
    places, frequencies = np.arange(count)[:, None] + 0.5, np.arange(count)
    basis = np.sqrt(2 / count) * np.cos(np.pi * places * frequencies / count)
    basis[:, 0] /= np.sqrt(2)
    return torch.from_numpy(basis.astype(np.float32))


def train_map_codec(maps: Sequence[Tensor], num_bytes: int, head: PatchHead) -> MapCodec:
    """A codec of num_bytes bytes a position for maps like these, H×W×C float32 unit local descriptors.

    Raises ValueError unless 1 ≤ num_bytes ≤ C, and without maps.
    """
    if not maps:
        raise ValueError("a codec needs descriptors to learn from")
    channels = maps[0].shape[2]
    if not 1 <= num_bytes <= channels:
        raise ValueError(f"{num_bytes} bytes for {channels} channels: expected 1 to {channels}")
    maps = [local.detach().cpu().float() for local in maps]
    rows = torch.cat([local.flatten(0, 1) for local in maps]).double().numpy()
    mean = rows.mean(axis=0)
    into, back = _turns(np.cov((rows - mean).T).reshape(channels, channels), head.weights())
    turn = torch.from_numpy(into.astype(np.float32))
    shift = torch.from_numpy(mean.astype(np.float32))
    coefficients = [cosines((local - shift) @ turn) for local in maps]
    height, width = max((tuple(local.shape[:2]) for local in maps), key=lambda size: size[0] * size[1])
    powers = [values.square().sum(dim=2).double().numpy() for values in coefficients]
    spectrum = np.mean([_stretched(power, height, width) for power in powers], axis=0)
    sample = _sample(coefficients, spectrum)
    groups = balanced_groups(sample.numpy().var(axis=0, dtype=np.float64), min(channels, max(16, 2 * num_bytes // 3)))
    centroids, gains = _trained_stages(sample, groups, num_bytes)
    arrays = {"mean": mean, "into": into, "back": back, "spectrum": spectrum, "centroids": centroids, "gains": gains}
    return MapCodec.of_arrays({"num_bytes": np.array(num_bytes), "groups": groups, **arrays, **head.arrays})


def _turns(
    covariance: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrices to principal axes and back, in channels whose errors all weigh the same; covariance and weights of
    errors: C×C."""
    values, vectors = np.linalg.eigh(weights)
    values = np.maximum(values, 1e-6 * values.max())
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    axes = np.linalg.eigh(root @ covariance @ root)[1]
    return root @ axes, axes.T @ inverse


def _sample(coefficients: Sequence[Tensor], spectrum: NDArray[np.float64]) -> Tensor:
    """Cosines of some maps, divided by their lengths: more of those that have most to be coded."""
    rng = np.random.default_rng(_SEED)
    count = max(1, min(SAMPLE_ROWS, _SAMPLE_COSINES) // len(coefficients))
    rows = []
    for values in coefficients:
        power = _stretched(spectrum, *values.shape[:2]).reshape(-1)
        chances = np.minimum(power, np.quantile(power, 0.9))
        drawn = rng.choice(len(power), min(count, len(power)), replace=False, p=chances / chances.sum())
        scale = torch.from_numpy(np.sqrt(power[drawn]).astype(np.float32))
        rows.append(values.flatten(0, 1)[torch.from_numpy(drawn)] / scale[:, None])
    return torch.cat(rows)


def _trained_stages(
    sample: Tensor, groups: NDArray[np.int64], num_bytes: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Centroids of each stage, and the share that each saves of a cosine's square in each group; never more than the
    stage before."""
    left, centroids, errors = sample, [], [_group_squares(sample, groups)]
    for _ in range(max(_STAGES, -(-num_bytes // len(groups)))):
        codec = train_quantizer(left, groups)
        left = left - codec.approximate(codec.encode(left))
        centroids.append(codec.centroids)
        errors.append(_group_squares(left, groups))
    saved = -np.diff(np.array(errors), axis=0)
    return np.stack(centroids), np.maximum(np.minimum.accumulate(saved, axis=0), 0)


def _group_squares(rows: Tensor, groups: NDArray[np.int64]) -> NDArray[np.float64]:
    squares = rows.double().square().mean(dim=0).numpy()
    return np.array([squares[dims[dims >= 0]].sum() for dims in groups])


def map_grid(grids: Sequence[PatchGrid]) -> tuple[PatchGrid, ...]:
    """The positions of the map that grids lie on, as patches of one position; none where there are no patches."""
    for grid in grids:
        if len(grid):
            return (PatchGrid(grid.map_height, grid.map_width, 1, 1, grid.geometry),)
    return ()
