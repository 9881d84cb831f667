"""Homographies from four matches each, or refined on many, for whole batches and on any device with float64."""

from typing import NamedTuple

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """Where to compute homographies for tensors of a device: there, or on the CPU beside one without float64."""
    return torch.device("cpu") if device.type == "mps" else device


class Quads(NamedTuple):
    """Four points each: x and y of all first points, of all second ones and so on, 4×… each."""

    x: Tensor
    y: Tensor

    def areas(self) -> list[Tensor]:
        """Twice the signed areas of the triangles that leave out each point in turn: 4 times …"""

        def area(first: int, second: int, third: int) -> Tensor:
            across, down = self.x[second] - self.x[first], self.y[second] - self.y[first]
            return across * (self.y[third] - self.y[first]) - down * (self.x[third] - self.x[first])

        return [area(1, 2, 3), area(2, 0, 3), area(0, 1, 3), area(0, 1, 2)]


def possible_quads(source: Quads, target: Quads) -> Tensor:
    """Which four points can be the picture of the other four, bool …: the last is on no line through two others, and
    all triples keep their sense of rotation or all change it. Another homography would tear the picture apart
    (Márquez-Neila et al. 2013)."""
    changed = torch.zeros_like(source.x[0], dtype=torch.int64)
    possible = torch.ones_like(source.x[0], dtype=torch.bool)
    for left_out, (source_area, target_area) in enumerate(zip(source.areas(), target.areas(), strict=True)):
        product = source_area * target_area
        changed += product < 0
        if left_out < 3:
            possible &= product != 0
    return possible & ((changed == 0) | (changed == 4))


def four_point_homographies(source: Quads, target: Quads) -> Tensor:
    """Homographies that map four points onto four possible ones: …×3×3 float64 of unit norm."""
    source, target = (Quads(points.x.double(), points.y.double()) for points in (source, target))
    # In the basis of the first three points the fourth has these areas as coordinates, so that
    # H = Σ_k (target area / source area)_k · target point_k · (source line through the other two)ᵀ.
    total: Tensor | None = None
    areas = zip(source.areas()[:3], target.areas()[:3], strict=True)
    for k, (source_area, target_area) in enumerate(areas):
        first, second = (k + 1) % 3, (k + 2) % 3
        weight = target_area / source_area
        point = torch.stack([target.x[k] * weight, target.y[k] * weight, weight], dim=-1)
        line = torch.stack(
            [
                source.y[first] - source.y[second],
                source.x[second] - source.x[first],
                source.x[first] * source.y[second] - source.x[second] * source.y[first],
            ],
            dim=-1,
        )
        term = point[..., :, None] * line[..., None, :]
        total = term if total is None else total.add_(term)
    assert total is not None
    return total / torch.linalg.vector_norm(total, dim=(-2, -1), keepdim=True)


def refine_homographies(source: Tensor, target: Tensor, weight: Tensor, start: Tensor, steps: int = 5) -> Tensor:
    """Homographies moved towards the least weighted squares of the distances in the target, by Gauss-Newton.

    source, target: B×M×2; weight: B×M, 0 leaves a match out; start: B×3×3. Returns float64 B×3×3 whose last entry is
    1. Where no step can be made the numbers are not finite: compare the result before it is used.
    """
    x, y = source.double().unbind(dim=2)
    weights = weight.double().repeat(1, 2)  # B×2M
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    point = torch.stack([x, y, ones], dim=2)  # B×M×3
    wanted = torch.cat(target.double().unbind(dim=2), dim=1)  # B×2M, all u and then all v
    damping = 1e-9 * torch.eye(8, dtype=torch.float64, device=source.device)
    matrix = start.double() / start.double()[:, 2:, 2:]
    for _ in range(steps):
        projected = point @ matrix.transpose(1, 2)
        depth = projected[..., 2:]
        across, down = (projected[..., :2] / depth).unbind(dim=2)
        unit = point / depth
        none = torch.stack([zeros] * 3, dim=2)
        jacobian = torch.cat(
            [
                torch.cat([unit, none, -across[..., None] * unit[..., :2]], dim=2),
                torch.cat([none, unit, -down[..., None] * unit[..., :2]], dim=2),
            ],
            dim=1,
        )  # B×2M×8
        weighted = (jacobian * weights[..., None]).transpose(1, 2)
        normal = weighted @ jacobian
        normal = normal + damping * normal.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        step = weighted @ (torch.cat([across, down], dim=1) - wanted)[..., None]
        change = torch.linalg.solve_ex(normal, step).result[..., 0]
        matrix = matrix - torch.nn.functional.pad(change, (0, 1)).unflatten(1, (3, 3))
    return matrix
