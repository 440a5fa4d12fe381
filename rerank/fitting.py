"""From a head's raw terms to a scorer: fusion weights, the probability, and a paired test."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Calibration

POPULARITY_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0, 5.0, 10.0)


class Judged(NamedTuple):
    """Q queries' candidates as coarse stage and head see them. Shapes (Q, N) unless said."""

    scale: float  # of the cosine, see ``spread_scale``
    coarse: Tensor  # cosine similarity
    popularity: Tensor  # of the candidates at that scale
    rank: Tensor  # the head's rank term
    match: Tensor  # the head's match logit
    relevant: Tensor  # bool
    picture: np.ndarray  # (Q,) the picture each query describes


class Fit(NamedTuple):
    """A fused order, and what it is worth."""

    weight: float  # of the rank term
    popularity_weight: float
    coarse_hits: np.ndarray  # (Q, 3) hit at 1, 5, 10 by cosine
    bank_hits: np.ndarray  # (Q, 3) by cosine less popularity, weight fitted on the other half
    hits: np.ndarray  # (Q, 3) by the fused score, both weights fitted on the other half

    def fused(self, judged: Judged) -> Tensor:
        """Return the fused scores, (Q, N)."""
        return fuse(judged, self.popularity_weight, self.weight)


def spread_scale(coarse: Tensor) -> float:
    """Return what brings the cosines of one query's candidates (Q, N) to unit spread."""
    return 1.0 / float(coarse.std(dim=1).mean().clamp_min(1e-6))


def fuse(judged: Judged, popularity_weight: float, weight: float) -> Tensor:
    """Return ``scale * (cosine - popularity_weight * popularity) + weight * rank``, (Q, N)."""
    cosine = judged.coarse - popularity_weight * judged.popularity  # (Q, N)
    return judged.scale * cosine + weight * judged.rank  # (Q, N)


def fit_fusion(judged: Judged) -> Fit:
    """Choose the weights of popularity and rank term, and measure each on other pictures.

    The weights are those with the most hits at 1 (then at 5) over all queries. For the figures,
    the pictures are halved and each half is ranked with the weights that suit the other, so no
    weight is measured on what it was fitted to. That does not hold of the head: training keeps
    the epoch that was best on these very captions, so the figures are slightly optimistic.
    """
    grid = list(itertools.product(POPULARITY_WEIGHTS, WEIGHTS))  # the first is the cosine alone
    relevant = judged.relevant  # (Q, N)
    tables = np.stack([hits(fuse(judged, *pair), relevant) for pair in grid])  # (W, Q, 3)
    alone = tables[:: len(WEIGHTS)]  # (W', Q, 3), rank weight 0
    half = judged.picture % 2 == 0  # (Q,)
    popularity_weight, weight = grid[_best(tables)]
    coarse, bank, both = tables[0], _cross_fitted(alone, half), _cross_fitted(tables, half)
    return Fit(weight, popularity_weight, coarse, bank, both)


def _cross_fitted(tables: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Take each half's hits from the table (W, Q, 3) that is best on the other half: (Q, 3)."""
    found = tables[0].copy()  # (Q, 3)
    for here in (half, ~half):
        if here.any() and not here.all():
            found[here] = tables[_best(tables[:, ~here])][here]
    return found


def _best(tables: np.ndarray) -> int:
    value = tables.mean(axis=1) @ np.array([1.0, 0.5, 0.25])  # (W,)
    return int(value.argmax())


def hits(fused: Tensor, relevant: Tensor) -> np.ndarray:
    """Whether a relevant picture is among the first 1, 5, 10; ties count against us.

    Args:
        fused: (Q, N) scores.
        relevant: (Q, N) bool; a query without any misses.

    Returns:
        (Q, 3) bool.
    """
    mine = fused.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)  # (Q, 1)
    ahead = ((fused >= mine) & ~relevant).sum(dim=1)  # (Q,)
    ahead = ahead.masked_fill(~relevant.any(dim=1), 10**6)  # (Q,)
    return torch.stack([ahead < k for k in (1, 5, 10)], dim=1).numpy()


def calibrate(judged: Judged, fused: Tensor, steps: int = 100) -> Calibration:
    """Fit P(match) to the fused scores (Q, N) by logistic regression, the two classes at even odds.

    The fused score alone is as good as score and match logit together (docs/bundled-model.md), and
    with it a better hit never looks less probable.
    """
    x = torch.stack([fused, torch.ones_like(fused)], dim=-1).flatten(0, 1).double()  # (QN, 2)
    y = judged.relevant.flatten().double()  # (QN,)
    spread = x.std(dim=0).clamp_min(1e-9)  # (2,)
    spread[1] = 1.0
    x = x / spread
    theta = torch.zeros(2, dtype=torch.float64)  # (2,)
    ridge = 1e-3 * torch.eye(2, dtype=torch.float64)  # (2, 2)
    for _ in range(steps):  # Newton's method
        p = (x @ theta).sigmoid()  # (QN,)
        gradient = x.T @ (p - y) + 1e-3 * theta  # (2,)
        hessian = x.T @ (x * (p * (1 - p)).unsqueeze(1)) + ridge  # (2, 2)
        step = torch.linalg.solve(hessian, gradient)  # (2,)
        theta = theta - step.clamp(-2, 2)
        if float(step.abs().max()) < 1e-6:
            break
    slope, bias = (theta / spread).tolist()
    share = float(y.mean().clamp(1e-6, 1 - 1e-6))
    return Calibration(slope, bias - math.log(share / (1 - share)))  # from their odds to even ones


def paired_p(
    ours: np.ndarray, theirs: np.ndarray, picture: np.ndarray, seed: int, flips: int = 10_000
) -> float:
    """How often chance gives a difference as large: signs flipped a picture, two-sided.

    Args:
        ours, theirs: (Q,) hits of the same queries.
        picture: (Q,) the picture each query describes; its captions are not independent.
        seed: of the flips.
        flips: how many.
    """
    _, group = np.unique(picture, return_inverse=True)
    change = np.bincount(group, ours.astype(float) - theirs.astype(float))  # (G,)
    change = change[change != 0]
    rng = np.random.default_rng(seed)
    seen = abs(change.sum())
    extreme = sum(
        int((np.abs(rng.choice([-1.0, 1.0], (500, len(change))) @ change) >= seen - 1e-9).sum())
        for _ in range(flips // 500)
    )
    return (extreme + 1) / (flips + 1)
