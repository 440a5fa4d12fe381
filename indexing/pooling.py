"""Fewer vectors a picture: patches that belong together are stored once, as their mean.

    "1"          every patch is stored
    "2"          one vector for each cell of 2 x 2 patches; at an odd edge, of those there are
    "cluster:N"  one for each of N clusters of the picture's own patches

Clusters are those of spherical k-means (Dhillon & Modha, 2001) on the directions of the patches.
Pooling by clusters is Token Pooling (Marin et al., arXiv 2110.03860); that late interaction keeps
most of its accuracy with a third of the vectors is from Clavie et al. (arXiv 2409.14683).

Besides the letters of ``core.types``, S is the number of vectors stored of a picture.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import UsageError
from ..core.types import Grid

if TYPE_CHECKING:
    import torch

MOST_CLUSTERS = 255  # an assignment is a byte
_STEPS = 8  # of Lloyd's algorithm
_CLUSTERS = re.compile(r"cluster:([1-9]\d{0,2})", re.ASCII)


def check_pool(pool: str, grid: Grid | None = None) -> None:
    """Refuse a pooling that is none, or that has more clusters than a grid has patches.

    Raises:
        UsageError: it names the valid ones.
    """
    most = MOST_CLUSTERS if grid is None else min(MOST_CLUSTERS, grid.size)
    clusters = _clusters(pool)
    if pool not in ("1", "2") and not (clusters and 2 <= clusters <= most):
        raise UsageError(
            f"cannot use --patch-pool {pool!r}",
            f"Use 1, 2 or cluster:N with N from 2 to {most}.",
        )


def pooled_size(pool: str, grid: Grid) -> int:
    """Return S, how many vectors are stored of a picture."""
    if pool == "1":
        return grid.size
    return _clusters(pool) or -(-grid.height // 2) * -(-grid.width // 2)


def whole_cells(pool: str, grid: Grid) -> Grid | None:
    """Return the grid of 2 x 2 cells that a grid is pooled by; None where some are cut off."""
    halves = pool == "2" and grid.height % 2 == grid.width % 2 == 0
    return Grid(grid.height // 2, grid.width // 2) if halves else None


def cells(grid: Grid) -> np.ndarray:
    """Return the 2 x 2 cell that each patch lies in, (P,) int64; cells count row by row."""
    rows, columns = np.indices(grid).reshape(2, -1) // 2  # (P,)
    return rows * -(-grid.width // 2) + columns  # (P,)


def pool_patches(patches: torch.Tensor, pool: str, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool patch features, on the device they are on.

    Args:
        patches: (N, P, C) floating point.
        pool: "2" or "cluster:N".
        grid: how the P patches lie.

    Returns:
        The means (N, S, C) float32, and which of them each patch became, (N, P) int64. A cluster
        without patches is zero.
    """
    import torch

    patches = patches.float()  # (N, P, C)
    clusters = _clusters(pool)
    if clusters is None:
        assignments = torch.from_numpy(cells(grid)).to(patches.device)  # (P,)
        assignments = assignments.expand(len(patches), -1)  # (N, P)
    else:
        assignments = _cluster(patches, clusters)  # (N, P)
    return _means(patches, assignments, pooled_size(pool, grid)), assignments


def _clusters(pool: str) -> int | None:
    match = _CLUSTERS.fullmatch(pool)
    return int(match[1]) if match else None


def _cluster(patches: torch.Tensor, count: int) -> torch.Tensor:
    """Assign the patches (N, P, C) of each picture to S = count clusters by cosine, (N, P).

    The same patches give the same clusters: the first centre is the first patch, each further one
    the patch least like those before, and sums are matrix products, in the same order every time.
    """
    from torch.nn import functional

    units = functional.normalize(patches, dim=-1)  # (N, P, C)
    centres = _spread(units, count)  # (N, S, C)
    assignments = (units @ centres.mT).argmax(-1)  # (N, P)
    for _ in range(_STEPS):
        means = functional.normalize(_means(units, assignments, count), dim=-1)  # (N, S, C)
        empty = (means == 0).all(-1, keepdim=True)  # (N, S, 1)
        centres = centres.where(empty, means)  # (N, S, C)
        assignments = (units @ centres.mT).argmax(-1)  # (N, P)
    return assignments


def _spread(units: torch.Tensor, count: int) -> torch.Tensor:
    """Choose S = count of the unit vectors (N, P, C), each far from those before: (N, S, C)."""
    import torch

    pictures = torch.arange(len(units), device=units.device)  # (N,)
    chosen = [units[:, 0]]  # (N, C) each
    likeness = torch.full(units.shape[:2], -torch.inf, device=units.device)  # (N, P)
    while len(chosen) < count:
        likeness = likeness.maximum((units @ chosen[-1].unsqueeze(-1)).squeeze(-1))  # (N, P)
        chosen.append(units[pictures, likeness.argmin(-1)])
    return torch.stack(chosen, 1)  # (N, S, C)


def _means(vectors: torch.Tensor, assignments: torch.Tensor, count: int) -> torch.Tensor:
    """Average the vectors (N, P, C) of each cluster, (N, S, C) with S = count; of none: zero."""
    import torch

    clusters = torch.arange(count, device=vectors.device)  # (S,)
    members = (assignments.unsqueeze(-1) == clusters).to(vectors.dtype)  # (N, P, S)
    return members.mT @ vectors / members.sum(1).clamp_min(1).unsqueeze(-1)  # (N, S, C)
