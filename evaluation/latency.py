"""How long one query takes, stage by stage, asked alone as a user asks it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..rerank.rerank import read_pictures, rerank

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
    stages = ["encode", "search", *(f"rerank with {scorer.name}" for scorer in scorers)]
    taken = []
    for text in [*texts[:WARM_UP], *texts]:
        marks = [time.perf_counter()]
        encoded = encoder.encode_texts([text])
        marks.append(time.perf_counter())
        found = index.search(encoded.pooled.cpu().numpy(), max(candidates, 1))
        marks.append(time.perf_counter())
        for scorer in scorers:
            rerank(scorer, encoded, found, index.patches, partial(read_pictures, index))
            marks.append(time.perf_counter())
        taken.append(1000 * np.diff(marks))
    low, high = np.quantile(taken[-len(texts) :], (0.5, 0.95), axis=0)
    return {
        stage: {"p50": float(low[at]), "p95": float(high[at])} for at, stage in enumerate(stages)
    }
