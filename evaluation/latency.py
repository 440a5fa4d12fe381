"""How long one query takes, stage by stage, asked alone as a user asks it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..rerank.rerank import rerank

if TYPE_CHECKING:
    from ..indexing.encoder import TextEncoder
    from ..indexing.index import ImageIndex
    from ..rerank.scorers import Scorer

WARM_UP = 3  # queries asked before the clock starts


def measure_latency(
    index: ImageIndex,
    encoder: TextEncoder,
    scorers: Sequence[Scorer],
    texts: Sequence[str],
    candidates: int,
) -> dict[str, dict[str, float]]:
    """Ask each text alone: encode, search in Milvus, rerank with each scorer.

    Returns:
        stage -> {"p50", "p95"} in milliseconds; the stages of a query add up.
    """
    times: dict[str, list[float]] = {}
    for turn, text in enumerate([*texts[:WARM_UP], *texts]):
        laps = []

        def lap(stage: str, since: float, laps: list = laps) -> float:
            now = time.perf_counter()
            laps.append((stage, 1000 * (now - since)))
            return now

        start = time.perf_counter()
        encoded = encoder.encode_texts([text])
        start = lap("encode", start)
        found = index.search(encoded.pooled.cpu().numpy(), max(candidates, 1))
        start = lap("search", start)
        for scorer in scorers:
            rerank(scorer, encoded, found, index.patches)
            start = lap(f"rerank with {scorer.name}", start)
        if turn >= WARM_UP:
            for stage, taken in laps:
                times.setdefault(stage, []).append(taken)
    return {
        stage: {"p50": float(np.median(taken)), "p95": float(np.quantile(taken, 0.95))}
        for stage, taken in times.items()
    }
