"""Scores of a reranker for the candidates that the coarse stage returned, a block at a time.

A block of queries shares one read of patches: the candidates of 64 captions over 1,000 images are
mostly the same images. Nothing is added to the candidates and nothing taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..rerank.rerank import TEXTS_AT_ONCE, pairs_at_once, queries_at_once, score_candidates
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
    for part in _blocks(len(queries), queries_at_once(scorer, n)):
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
        for block in _blocks_of_pairs(counts[by_count], pairs_at_once(scorer)):
            some = by_count[block]  # (u,)
            columns = np.arange(counts[some].max())  # (w,)
            there = columns < counts[some, None]  # (u, w)
            pairs = by_text[starts[some, None] + np.where(there, columns, 0)]  # (u, w)
            rescored = _score(
                scorer,
                texts,
                distinct[some],
                np.where(there, images[pairs], -1),
                cosines[pairs],
                gallery,
            )
            found[pairs[there]] = rescored[there]
        scores[part] = found.reshape(-1, n)
        if on_block:
            on_block(len(scores[part]))
    return scores


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, total, size)]


def _blocks_of_pairs(counts: np.ndarray, most: int) -> Iterator[slice]:
    """Cut ascending counts (U,) into blocks of at most ``most`` pairs, padding included."""
    at = 0
    while at < len(counts):
        padded = counts[at:] * np.arange(1, len(counts) - at + 1)  # (U - at,) pairs of the block
        size = max(1, int(np.searchsorted(padded[:TEXTS_AT_ONCE], most, side="right")))
        yield slice(at, at + size)
        at += size


def _score(
    scorer: Scorer,
    texts: TextBank,
    queries: np.ndarray,
    images: np.ndarray,
    cosines: np.ndarray,
    gallery: Gallery,
) -> np.ndarray:
    """Score (B, n) images, -1 where there is none, of (B,) texts."""
    scores, _ = score_candidates(
        scorer,
        texts.take(queries.tolist()),
        images,
        cosines,
        lambda rows: gallery.fetch(np.array(rows)),
        gallery.pictures,
    )
    return scores  # (B, n)
