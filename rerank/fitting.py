"""From a head's raw terms to a scorer: the fusion weight, the probability, and a paired test."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Calibration

WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0, 5.0, 10.0)


class Judged(NamedTuple):
    """Q queries' candidates as coarse stage and head see them. Shapes (Q, N) unless said."""

    coarse: Tensor  # cosine similarity
    rank: Tensor  # the head's rank term
    match: Tensor  # the head's match logit
    relevant: Tensor  # bool
    picture: np.ndarray  # (Q,) the picture each query describes


class Fit(NamedTuple):
    """A fused order, and what it is worth."""

    scale: float  # of the cosine
    weight: float  # of the rank term
    coarse_hits: np.ndarray  # (Q, 3) hit at 1, 5, 10 by cosine
    hits: np.ndarray  # (Q, 3) the same by the fused score, weight fitted on the other half


def fit_fusion(judged: Judged) -> Fit:
    """Choose the rank term's weight, and measure it honestly.

    The weight is the one with the most hits at 1 (then at 5) over all queries. For the figures,
    the pictures are halved and each half is ranked with the weight that suits the other.
    """
    scale = 1.0 / float(judged.coarse.std(dim=1).mean().clamp_min(1e-6))
    by_weight = np.stack([_hits(judged, scale, weight) for weight in WEIGHTS])  # (W, Q, 3)
    half = judged.picture % 2 == 0  # (Q,)
    hits = by_weight[0].copy()  # (Q, 3)
    for here in (half, ~half):
        if here.any() and not here.all():
            hits[here] = by_weight[_best(by_weight[:, ~here])][here]
    return Fit(scale, WEIGHTS[_best(by_weight)], by_weight[0], hits)


def _best(by_weight: np.ndarray) -> int:
    value = by_weight.mean(axis=1) @ np.array([1.0, 0.5, 0.25])  # (W,)
    return int(value.argmax())


def _hits(judged: Judged, scale: float, weight: float) -> np.ndarray:
    """Whether a relevant picture is among the first 1, 5, 10; ties count against us. (Q, 3)."""
    fused = scale * judged.coarse + weight * judged.rank  # (Q, N)
    mine = fused.masked_fill(~judged.relevant, -torch.inf).amax(dim=1, keepdim=True)  # (Q, 1)
    ahead = ((fused >= mine) & ~judged.relevant).sum(dim=1)  # (Q,)
    ahead = ahead.masked_fill(~judged.relevant.any(dim=1), 10**6)  # (Q,)
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
    ridge = 1e-3 * torch.eye(2, dtype=torch.float64)
    for _ in range(steps):  # Newton's method
        p = (x @ theta).sigmoid()  # (QN,)
        gradient = x.T @ (p - y) + 1e-3 * theta  # (3,)
        hessian = x.T @ (x * (p * (1 - p)).unsqueeze(1)) + ridge  # (3, 3)
        step = torch.linalg.solve(hessian, gradient)  # (3,)
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
