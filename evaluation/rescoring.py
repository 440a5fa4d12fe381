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
from ..rerank.rerank import QUERIES_AT_ONCE, queries_at_once, score_candidates
from .gallery import Gallery
from .ranking import Ranking
from .texts import TextBank

if TYPE_CHECKING:
    from ..rerank.scorers import Scorer

IMAGES_AT_ONCE = 512  # image queries: their candidates' texts then come up once, not once a block


def score_images(
    scorer: Scorer,
    texts: TextBank,
    queries: np.ndarray,
    coarse: Ranking,
    n: int,
    gallery: Gallery,
    on_block: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Score the first n images of each text's list.

    Args:
        scorer: the reranker.
        texts: holds the queries.
        queries: (Q,) rows in `texts`.
        coarse: the lists; its documents are gallery rows.
        n: how many candidates a query.
        gallery: reads patches, or the images themselves.
        on_block: called with the number of queries that a block has finished.

    Returns:
        (Q, n) float32.
    """
    scores = np.empty((len(queries), n), dtype=np.float32)
    for part in _blocks(len(queries), queries_at_once(scorer)):
        images, cosines = coarse.order[part, :n], coarse.scores[part, :n]  # (B, n) each
        scores[part] = _score(scorer, texts, queries[part], images, cosines, gallery)
        if on_block:
            on_block(len(images))
    return scores


def score_texts(
    scorer: Scorer,
    texts: TextBank,
    queries: np.ndarray,
    coarse: Ranking,
    n: int,
    gallery: Gallery,
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
                gallery,
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
    gallery: Gallery,
) -> np.ndarray:
    """Score (B, n) images, -1 where there is none, of (B,) texts; each image is read once."""
    distinct, inverse = np.unique(images, return_inverse=True)
    padded = int(distinct[0] < 0)
    rows = inverse.reshape(images.shape) - padded  # (B, n), -1 where there is none
    ranks = score_candidates(
        scorer,
        texts.take(queries.tolist()),
        distinct[padded:].tolist(),
        torch.from_numpy(rows),
        torch.from_numpy(np.ascontiguousarray(cosines)),
        lambda rows: gallery.fetch(np.array(rows)),
        gallery.pictures,
    ).rank  # (B, n)
    scores = ranks.float().cpu().numpy()
    if np.isnan(scores).any():
        raise ModelError(f"scorer {scorer.name!r} gave a score that is not a number")
    return scores
