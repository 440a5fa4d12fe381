"""Measures of one ranked list each; their mean over the queries is what gets reported.

Definitions are those of ``trec_eval`` (hit@k is its ``success``, as ir_measures' Success@k); a
test holds each equal to ir_measures. A document of any grade above zero is relevant, the gain of
nDCG is the grade. A query whose first hit lies beyond the list scores zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .ranking import Ranking, Relevance


def measure(ranking: Ranking, relevance: Relevance, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Measure every list.

    Args:
        ranking: Q lists of N documents.
        relevance: which documents are relevant.
        ks: cut-offs; each at most N, or else the list ends before the cut-off.

    Returns:
        name -> (Q,) float64, in the order to print: ``hit@k``, ``recall@k``, ``mrr``,
        ``ndcg@10``, ``map``.
    """
    relevant = ranking.grades > 0  # (Q, N)
    totals = np.maximum(relevance.counts(), 1)  # (Q,)
    depth = relevant.shape[1]
    found = relevant.cumsum(axis=1)  # (Q, N)
    places = np.arange(1, depth + 1)  # (N,)
    values = {f"hit@{k}": (ranking.first <= min(k, depth)).astype(float) for k in ks}
    values |= {f"recall@{k}": found[:, min(k, depth) - 1] / totals for k in ks}
    values["mrr"] = np.where(ranking.first <= depth, 1 / ranking.first, 0.0)
    values["ndcg@10"] = _ndcg(ranking.grades, relevance, 10)
    values["map"] = (relevant * found / places).sum(axis=1) / totals
    return values


def _ndcg(grades: np.ndarray, relevance: Relevance, k: int) -> np.ndarray:
    """Discounted cumulative gain of the first k over that of the ideal list, (Q,)."""
    discounts = 1 / np.log2(np.arange(2, k + 2))  # (k,)
    gains = grades[:, :k] @ discounts[: grades.shape[1]]  # (Q,)
    ideal = relevance.ideal(k) @ discounts  # (Q,)
    return np.divide(gains, ideal, out=np.zeros(len(gains)), where=ideal > 0)
