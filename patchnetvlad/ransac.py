"""Spatial score by a homography between matched patches (paper section 3.4), for many pairs at once."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from patchnetvlad.homographies import (
    Quads,
    float64_device,
    four_point_homographies,
    possible_quads,
    refine_homographies,
)
from patchnetvlad.matching import Matcher, Matches, Score
from patchnetvlad.patch_grid import PatchGrid

TOLERANCE = 1.5  # reprojection threshold in patch pitches
SAMPLE = 4  # matches that determine a homography
MODELS = 2000  # homographies tried at most
CONFIDENCE = 0.995  # of having drawn one sample of inliers alone, at which the search stops
BLOCKS = (128, *(4096,) * 5)  # samples drawn at a time; most samples of unrelated pictures are impossible
KEPT = 0.9  # share of the inliers that a refined homography must keep to take the place of the sampled one
# Models × matches computed at a time: what fits into a processor's cache, or a share of an accelerator's memory.
CACHE_NUMBERS, DEVICE_NUMBERS = 1 << 17, 1 << 28


def ransac_score(matches: Matches, query_grid: PatchGrid, reference_grid: PatchGrid) -> Score:
    """Inliers of the best homography from reference to query patch centres, divided by all query patches: 0..1.

    An inlier is reprojected within 1.5 patch pitches (1.5·16·s pixels for VGG16 at stride s) of its query centre.
    Fewer than four matches, or matches that no homography fits, score 0 without inliers. Draws, rejects, counts and
    stops as OpenCV's RANSAC does, from the same seed, so that scores agree with the published ones.
    """
    return ransac_scores([matches], [query_grid], [reference_grid], torch.device("cpu"))[0]


def ransac_scores(
    matches: Sequence[Matches],
    query_grids: Sequence[PatchGrid],
    reference_grids: Sequence[PatchGrid],
    device: torch.device,
) -> list[Score]:
    """`ransac_score` of many pairs, whose homographies are sought together on a device."""
    scores = [Score(0.0, torch.zeros(len(pair_matches), dtype=torch.bool)) for pair_matches in matches]
    able = [index for index, pair_matches in enumerate(matches) if len(pair_matches) >= SAMPLE]
    if not able:
        return scores
    source, target = (
        pad_sequence(
            [grids[index].centers()[getattr(matches[index], side)] / query_grids[index].pitch_pixels for index in able],
            batch_first=True,
        ).to(device)
        for grids, side in ((reference_grids, "reference"), (query_grids, "query"))
    )  # B×M×2 in pitches of the query
    counts = torch.tensor([len(matches[index]) for index in able], device=device)
    inliers, homographies = (tensor.cpu() for tensor in consensus(source, target, counts, TOLERANCE))
    for index, mask, homography in zip(able, inliers, homographies, strict=True):
        mask = mask[: len(matches[index])].clone()
        if not mask.any():
            continue
        pitch = query_grids[index].pitch_pixels
        pixels = homography * homography.new_tensor([[1, 1, pitch], [1, 1, pitch], [1 / pitch, 1 / pitch, 1]])
        scores[index] = Score(int(mask.sum()) / len(query_grids[index]), mask, pixels / pixels[2, 2])
    return scores


RANSAC = Matcher(ransac_score, ransac_scores, "inliers of one homography / patches of the query")


def consensus(source: Tensor, target: Tensor, counts: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The largest sets of matches that one homography explains (RANSAC).

    source, target: B×M×2, of which the first counts (B, ≥ 4) are matches. Returns inliers, bool B×M, and homographies
    from source to target, float64 B×3×3, refined on them; without inliers where every sample was impossible. An
    inlier's projection lies within the tolerance of its target, in the unit of the points, which should be of order 1
    to 100. Computed, and returned, on the points' device or, where that has no float64, on the CPU.
    """
    source, target, counts = (values.to(float64_device(values.device)) for values in (source, target, counts))
    residuals = _Residuals.of(source, target, counts, tolerance)
    batch = len(source)
    best = torch.full((batch,), SAMPLE - 1, device=source.device)  # inliers of the best so far
    tried = torch.zeros_like(best)
    homographies = torch.zeros(batch, 3, 3, dtype=torch.float64, device=source.device)
    searching = torch.arange(batch, device=source.device)
    for block in range(len(BLOCKS)):
        matches_left = counts[searching]
        samples = _samples(matches_left, block)  # 4×b×n
        models, number = _possible_models(source[searching], target[searching], samples, MODELS - tried[searching])
        explained = residuals.rows(searching).count_explained(models)  # b×m
        place = torch.arange(1, 1 + models.shape[1], device=source.device)
        explained = explained.masked_fill(place > number[:, None], 0)
        # The search ends at the model after which enough have been tried, given the best until then
        running = torch.maximum(explained.cummax(dim=1).values, best[searching, None])
        ended = tried[searching, None] + place >= _models_needed(running / matches_left[:, None])
        before_end = ended.cumsum(dim=1) - ended.long() == 0
        most, which = explained.masked_fill(~before_end, 0).max(dim=1)
        better = most > best[searching]
        improved = searching[better]
        best[improved] = most[better]
        homographies[improved] = models[better, which[better]]
        tried[searching] += number
        searching = searching[~(ended & (place <= number[:, None])).any(dim=1)]
        if len(searching) == 0:
            break
    inliers = residuals.explained(homographies[:, None])[:, 0]  # a homography of zeros explains nothing
    refined = refine_homographies(source, target, inliers, homographies)
    explained = residuals.explained(refined[:, None])[:, 0]
    better = (best >= SAMPLE) & (explained.sum(dim=1) >= KEPT * inliers.sum(dim=1))
    return (
        torch.where(better[:, None], explained, inliers),
        torch.where(better[:, None, None], refined, homographies),
    )


class _Residuals(NamedTuple):
    """What decides whether a homography explains a match, as matrix products with its entries.

    With its rows a, b, w, the source p and the target (u, v) that is (a·p − u w·p)² + (b·p − v w·p)² < (t w·p)².
    Padding is 0 throughout, so that nothing explains it.
    """

    across: Tensor  # B×6×M: p and −u p
    down: Tensor  # B×6×M: p and −v p
    depth: Tensor  # B×3×M: t p

    @classmethod
    def of(cls, source: Tensor, target: Tensor, counts: Tensor, tolerance: float) -> "_Residuals":
        x, y = source.float().unbind(dim=2)
        u, v = target.float().unbind(dim=2)
        valid = torch.arange(x.shape[1], device=x.device) < counts[:, None]
        point = torch.stack([x, y, torch.ones_like(x)], dim=1) * valid[:, None]  # B×3×M
        across, down = (torch.cat([point, -to[:, None] * point], dim=1) for to in (u, v))
        return cls(across, down, tolerance * point)

    def rows(self, rows: Tensor) -> "_Residuals":
        """Those of some pairs."""
        return _Residuals(self.across[rows], self.down[rows], self.depth[rows])

    def explained(self, models: Tensor) -> Tensor:
        """B×n×3×3 → bool B×n×M."""
        a, b, w = models.float().unbind(dim=2)  # B×n×3 each
        across = torch.bmm(torch.cat([a, w], dim=2), self.across)
        down = torch.bmm(torch.cat([b, w], dim=2), self.down)
        depth = torch.bmm(w, self.depth)
        return across.square_().addcmul_(down, down).addcmul_(depth, depth, value=-1) < 0

    def count_explained(self, models: Tensor) -> Tensor:
        """B×n×3×3 → B×n, how many matches each explains."""
        numbers = CACHE_NUMBERS if models.device.type == "cpu" else DEVICE_NUMBERS
        step = max(1, numbers // (self.depth.shape[0] * self.depth.shape[2]))
        counts = [explained.sum(dim=2) for explained in map(self.explained, models.split(step, dim=1))]
        return torch.cat(counts, dim=1)


def _possible_models(source: Tensor, target: Tensor, samples: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Homographies of the first possible samples (4×B×n) of each pair, at most ``most`` (B,): B×m×3×3, m ≥ 1, of
    which the first number (B,) count."""
    quads = [_quads(points, samples) for points in (source, target)]
    possible = possible_quads(*quads)  # B×n
    place = possible.cumsum(dim=1)  # among the possible, from 1
    possible &= place <= most[:, None]
    number = possible.sum(dim=1)
    order = place.new_zeros(len(place), max(1, int(number.max())))
    pair, sample = possible.nonzero(as_tuple=True)
    order[pair, place[pair, sample] - 1] = sample
    chosen = samples.gather(2, order.expand(SAMPLE, -1, -1))
    return four_point_homographies(*(_quads(points, chosen) for points in (source, target))), number


def _quads(points: Tensor, samples: Tensor) -> Quads:
    """Points B×M×2 of samples 4×B×n."""
    x, y = (coordinate.expand(SAMPLE, -1, -1).gather(2, samples) for coordinate in points.unbind(dim=2))
    return Quads(x, y)


def _models_needed(share: Tensor) -> Tensor:
    """Samples until one of inliers alone has been drawn with CONFIDENCE, at most MODELS, for shares of inliers."""
    miss = (1 - share.double() ** SAMPLE).clamp(1e-300, 1 - 1e-15)
    return (math.log(1 - CONFIDENCE) / miss.log()).clamp(max=MODELS)


def _samples(counts: Tensor, block: int) -> Tensor:
    """Samples of four different matches out of counts (B,), those of a block in the order of drawing: 4×B×n."""
    drawn = [samples_of(count, block)[0] for count in counts.tolist()]
    return torch.stack(drawn, dim=1).to(counts.device, torch.int64)


@lru_cache(maxsize=2048)
def samples_of(count: int, block: int) -> tuple[Tensor, int]:
    """A block of samples of four different matches out of count, int32 4×n, and how many random numbers they and the
    blocks before have taken. Most searches need the first block alone; from 17 matches on no block takes a millisecond.
    """
    first = samples_of(count, block - 1)[1] if block else 0
    wanted = BLOCKS[block]
    needed = wanted * sum(count / (count - before) for before in range(SAMPLE))  # expected; 0.3 % at most is usual
    numbers = _random_numbers()[first : first + math.ceil(1.05 * needed) + 200]
    drawn = (numbers % np.uint32(count)).astype(np.int32)
    positions = _sample_positions(drawn, wanted)
    return torch.from_numpy(drawn[positions]), first + int(positions[-1, -1]) + 1


def _sample_positions(drawn: NDArray[np.int32], wanted: int) -> NDArray[np.int64]:
    """Where the matches of each sample stand among those drawn one by one, 4×wanted.

    A sample is the first four different matches after the sample before. Nearly always the next four are different;
    the places where they are not are found first, and between two of these every fourth place begins a sample.
    """
    places, positions = _recurrent(drawn)
    if len(places) == 0:
        return SAMPLE * np.arange(wanted) + np.arange(SAMPLE)[:, None]
    begins = np.append(positions[-1] + 1, 0)  # where the next sample begins, and last where the first one does
    # From each beginning, in steps of four, the first recurrent place with the same remainder; -1: none
    order = np.argsort(places % SAMPLE, kind="stable")
    keys = places[order] + len(drawn) * (places[order] % SAMPLE)
    insertions = np.searchsorted(keys, begins + len(drawn) * (begins % SAMPLE))
    following = np.append(order, -1)[insertions]
    following[places[following] % SAMPLE != begins % SAMPLE] = -1
    chain, links = [], following.tolist()
    place = links[-1]
    while place >= 0:
        chain.append(place)
        place = links[place]
    starts = np.append(0, begins[chain])
    samples = (np.append(places[chain], len(drawn)) - starts) // SAMPLE + 1  # with the recurrent one that is last
    last = samples.cumsum()
    within = np.arange(last[-1]) - np.repeat(last - samples, samples)
    sampled: NDArray[np.int64] = np.repeat(starts, samples) + SAMPLE * within + np.arange(SAMPLE)[:, None]
    sampled[:, last[:-1] - 1] = positions[:, chain]
    return sampled[:, :wanted]


def _recurrent(drawn: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places after which a match recurs among the next four, (n,), and the positions of four different ones, 4×n."""
    window = [drawn[first : len(drawn) - SAMPLE + 1 + first] for first in range(SAMPLE)]
    recurs = np.zeros(len(window[0]), dtype=bool)
    for earlier, later in combinations(window, 2):
        recurs |= earlier == later
    places = np.flatnonzero(recurs)
    drawn = np.append(drawn, -np.arange(1, SAMPLE + 1))  # so that every search ends
    positions = places[None]
    for _ in range(SAMPLE - 1):
        position = positions[-1] + 1
        again = np.arange(len(places))  # those whose match has been drawn for this sample
        while len(again):
            match = drawn[position[again]]
            recurs = np.zeros(len(again), dtype=bool)
            for before in positions:
                recurs |= match == drawn[before[again]]
            again = again[recurs]
            position[again] += 1
        positions = np.vstack([positions, position])
    return places, positions


@lru_cache(maxsize=1)
def _random_numbers() -> NDArray[np.uint32]:
    """What OpenCV's generator, multiply-with-carry, yields from its RANSAC's seed; enough for samples of few matches,
    in which numbers repeat."""
    state, numbers = (1 << 64) - 1, []
    for _ in range(3 * SAMPLE * sum(BLOCKS)):
        state = (state & 0xFFFFFFFF) * 4164903690 + (state >> 32)
        numbers.append(state & 0xFFFFFFFF)
    return np.array(numbers, dtype=np.uint32)
