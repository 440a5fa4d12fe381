"""Scores of a reranker for the candidates that the coarse stage returned, a block at a time.

A block of queries shares one read of patches: the candidates of 64 captions over 1,000 images are
mostly the same images. Nothing is added to the candidates and nothing taken away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..core.errors import ModelError
from ..core.types import PatchBatch
from .ranking import Ranking
from .texts import TextBank

if TYPE_CHECKING:
    from ..rerank.scorers import Scorer

QUERIES_AT_ONCE = 64  # texts with their candidates
IMAGES_AT_ONCE = 512  # image queries: their candidates' texts then come up once, not once a block

FetchPatches = Callable[[np.ndarray], PatchBatch]  # from gallery rows (M,) to their patches


def score_images(
    scorer: Scorer,
    texts: TextBank,
    queries: np.ndarray,
    coarse: Ranking,
    n: int,
    fetch: FetchPatches,
    on_block: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Score the first n images of each text's list.

    Args:
        scorer: the reranker.
        texts: holds the queries.
        queries: (Q,) rows in `texts`.
        coarse: the lists; its documents are gallery rows.
        n: how many candidates a query.
        fetch: reads patches.
        on_block: called with the number of queries that a block has finished.

    Returns:
        (Q, n) float32.
    """
    scores = np.empty((len(queries), n), dtype=np.float32)
    for part in _blocks(len(queries), QUERIES_AT_ONCE):
        images = coarse.order[part, :n]  # (B, n)
        scores[part] = _score(scorer, texts, queries[part], images, coarse.scores[part, :n], fetch)
        if on_block:
            on_block(len(images))
    return scores


def score_texts(
    scorer: Scorer,
    texts: TextBank,
    queries: np.ndarray,
    coarse: Ranking,
    n: int,
    fetch: FetchPatches,
    on_block: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Score the first n texts of each image's list; see `score_images`.

    `queries` are gallery rows here and documents are rows of `texts`. Scorers take images a text,
    so the pairs of a block are turned round: each text that is a candidate of some image of the
    block is asked once, about the images that have it.
    """
    scores = np.empty((len(queries), n), dtype=np.float32)
    for part in _blocks(len(queries), IMAGES_AT_ONCE):
        images = np.repeat(queries[part], n)  # (B * n,)
        cosines = coarse.scores[part, :n].ravel()  # (B * n,)
        distinct, inverse, counts = np.unique(
            coarse.order[part, :n].ravel(), return_inverse=True, return_counts=True
        )
        by_text = np.argsort(inverse, kind="stable")  # pairs, those of one text together
        starts = np.cumsum(counts) - counts  # (U,)
        found = np.empty(len(images), dtype=np.float32)
        # Texts wanted by about as many images go together, so that little is padded.
        by_count = np.argsort(counts, kind="stable")  # (U,)
        for at in range(0, len(distinct), QUERIES_AT_ONCE):
            some = by_count[at : at + QUERIES_AT_ONCE]  # (u,)
            columns = np.arange(counts[some].max())  # (w,)
            there = columns < counts[some, None]  # (u, w)
            pairs = by_text[starts[some, None] + np.where(there, columns, 0)]  # (u, w)
            block = _score(
                scorer,
                texts,
                distinct[some],
                np.where(there, images[pairs], -1),
                np.where(there, cosines[pairs], -np.inf).astype(np.float32),
                fetch,
            )
            found[pairs[there]] = block[there]
        scores[part] = found.reshape(-1, n)
        if on_block:
            on_block(len(scores[part]))
    return scores


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, total, size)]


def _score(
    scorer: Scorer,
    texts: TextBank,
    queries: np.ndarray,
    images: np.ndarray,
    cosines: np.ndarray,
    fetch: FetchPatches,
) -> np.ndarray:
    """Score (B, n) images, -1 where there is none, of (B,) texts with one read of patches."""
    distinct, inverse = np.unique(images, return_inverse=True)
    padded = int(distinct[0] < 0)
    rows = inverse.reshape(images.shape) - padded  # (B, n), -1 where there is none
    ranks = scorer.score(
        texts.take(queries.tolist()),
        fetch(distinct[padded:]) if scorer.needs_patches else None,
        torch.from_numpy(rows),
        torch.from_numpy(np.ascontiguousarray(cosines)),
    ).rank  # (B, n)
    scores = ranks.float().cpu().numpy()
    if np.isnan(scores).any():
        raise ModelError(f"scorer {scorer.name!r} gave a score that is not a number")
    return scores
