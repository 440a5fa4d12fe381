"""From candidates to an order: the second stage, used alike by query and eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..core.errors import MmsearchError, ModelError
from ..core.types import Candidates, PatchBatch, TextFeatures
from .itm import ItmScorer

if TYPE_CHECKING:
    from ..indexing.index import ImageIndex
    from .scorers import Scorer, Scores

QUERIES_AT_ONCE = 64  # bounds the patches held in memory: 64 x 100 candidates are about 80 MB
LOOKING_AT_ONCE = 8  # the same for pictures: 8 x 100 of PICTURE_SIDE are about 500 MB
PICTURE_SIDE = 512  # of pictures for scorers that look at them; theirs is 384

FetchPictures = Callable[[Sequence[int]], list["np.ndarray | None"]]


@dataclass(frozen=True, slots=True)
class Reranked(Candidates):
    """The same candidates, best first by the scorer. ``scores`` are the scorer's own.

    The further arrays are aligned with ``ids``; padding (id -1) stays at the end.
    """

    coarse: np.ndarray  # (Q, N) float32, cosine similarity
    coarse_rank: np.ndarray  # (Q, N) int64, place in the coarse order, from 0
    probability: np.ndarray | None  # (Q, N) float32, of a match; NaN where the scorer has none


def rerank(
    scorer: Scorer,
    text: TextFeatures,
    candidates: Candidates,
    fetch_patches: Callable[[Sequence[int]], PatchBatch],
    fetch_pictures: FetchPictures | None = None,
) -> Reranked:
    """Order each query's candidates by the scorer; ties go by coarse score, then by id.

    A candidate without patches (``PatchBatch.present``) keeps its coarse score.

    Candidates are permuted and nothing else: recall over all of them does not change.

    Args:
        scorer: from ``load_scorer``.
        text: the Q queries that the candidates belong to.
        candidates: the coarse stage's answer, (Q, N).
        fetch_patches: from M image ids to their patches, in that order (``ImageIndex.patches``);
            called only if the scorer needs patches.
        fetch_pictures: from image ids to their pixels, None where a picture cannot be read
            (``read_pictures``); needed by scorers that look at pictures.

    Raises:
        ModelError: the scorer gave a NaN.
        UsageError: the scorer looks at pictures and they cannot be fetched.
    """

    def score(
        text: TextFeatures, ids: list[int], rows: torch.Tensor, coarse: torch.Tensor
    ) -> Scores:
        return score_candidates(scorer, text, ids, rows, coarse, fetch_patches, fetch_pictures)

    parts = [
        _rerank_some(scorer.name, score, _texts(text, some), _candidates(candidates, some))
        for some in _slices(len(candidates.ids), queries_at_once(scorer))
    ]
    if not parts:
        return Reranked(candidates.ids, candidates.scores, candidates.scores, candidates.ids, None)
    probabilities = [part.probability for part in parts if part.probability is not None]
    return Reranked(
        ids=np.concatenate([part.ids for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        coarse=np.concatenate([part.coarse for part in parts]),
        coarse_rank=np.concatenate([part.coarse_rank for part in parts]),
        probability=np.concatenate(probabilities) if probabilities else None,
    )


def score_candidates(
    scorer: Scorer,
    text: TextFeatures,
    ids: Sequence[int],
    rows: torch.Tensor,
    coarse: torch.Tensor,
    fetch_patches: Callable[[Sequence[int]], PatchBatch],
    fetch_pictures: FetchPictures | None = None,
) -> Scores:
    """Score pairs, with whatever the scorer looks at: patches, pictures or neither.

    Args:
        scorer: from ``load_scorer``.
        text: Q texts.
        ids: the M distinct pictures, as the fetching functions know them.
        rows: (Q, N) long, the place in ``ids`` of each candidate; -1 for none.
        coarse: (Q, N) float32, cosine similarity; -inf on padding.
        fetch_patches: called if the scorer needs patches.
        fetch_pictures: called if the scorer looks at pictures.

    Raises:
        UsageError: the scorer looks at pictures and they cannot be fetched.
    """
    if fetch_pictures and isinstance(scorer, ItmScorer):
        return scorer.score_pictures(text.texts, fetch_pictures(ids), rows)
    patches = fetch_patches(ids) if scorer.needs_patches else None
    if patches is not None and patches.present is not None:
        there = patches.present[rows.clamp_min(0)] & (rows >= 0)  # (Q, N)
        rows = rows.masked_fill(~there, -1)  # (Q, N)
    return scorer.score(text, patches, rows, coarse)


def queries_at_once(scorer: Scorer) -> int:
    """Return how many queries' candidates may be held in memory together."""
    return LOOKING_AT_ONCE if isinstance(scorer, ItmScorer) else QUERIES_AT_ONCE


def read_picture(path: Path) -> np.ndarray:
    """Read an indexed picture for a scorer that looks at pixels, (H, W, 3) uint8.

    Raises:
        UndecodableImage: it is no picture.
        OSError: it cannot be read.
    """
    from ..indexing.images import open_thumbnail, source_of

    return np.array(open_thumbnail(source_of(path), PICTURE_SIDE))  # a copy: torch wants to write


def read_pictures(index: ImageIndex, ids: Sequence[int]) -> list[np.ndarray | None]:
    """Read indexed pictures, each as in ``read_picture``, or None where it cannot be read."""
    pictures: list[np.ndarray | None] = []
    for record in index.records(ids):
        try:
            pictures.append(read_picture(Path(record.path)))
        except (MmsearchError, OSError):
            pictures.append(None)
    return pictures


def _rerank_some(
    name: str,
    score: Callable[[TextFeatures, list[int], torch.Tensor, torch.Tensor], Scores],
    text: TextFeatures,
    candidates: Candidates,
) -> Reranked:
    padding = candidates.ids < 0  # (Q, N)
    coarse = np.where(padding, -np.inf, candidates.scores).astype(np.float32)  # (Q, N)
    distinct, inverse = np.unique(candidates.ids, return_inverse=True)  # (M or M+1,), (Q*N,)
    hidden = int(len(distinct) > 0 and distinct[0] < 0)  # the padding id sorts first
    rows = inverse.reshape(candidates.ids.shape) - hidden  # (Q, N), -1 on padding
    wanted = distinct[hidden:].tolist()
    scores, probability = coarse, None
    if wanted:
        rank, match = score(text, wanted, torch.from_numpy(rows).long(), torch.from_numpy(coarse))
        scores = rank.numpy().astype(np.float32)  # (Q, N)
        probability = None if match is None else match.numpy().astype(np.float32)  # (Q, N)
    if np.isnan(scores).any():
        raise ModelError(f"scorer {name!r} gave a score that is not a number")
    scores = np.where(padding, -np.inf, scores).astype(np.float32)  # (Q, N)
    order = np.lexsort((candidates.ids, -coarse, -scores), axis=1)  # (Q, N)
    coarse_order = np.lexsort((candidates.ids, -coarse), axis=1)  # (Q, N)
    coarse_rank = np.argsort(coarse_order, axis=1)  # (Q, N)

    def sort(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, order, axis=1)

    return Reranked(
        ids=sort(candidates.ids),
        scores=sort(scores),
        coarse=sort(coarse),
        coarse_rank=sort(coarse_rank),
        probability=None if probability is None else sort(probability),
    )


def _slices(queries: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, queries, size)]


def _texts(text: TextFeatures, some: slice) -> TextFeatures:
    return TextFeatures(
        text.texts[some], text.pooled[some], text.tokens[some], text.mask[some], text.words[some]
    )


def _candidates(candidates: Candidates, some: slice) -> Candidates:
    return Candidates(candidates.ids[some], candidates.scores[some])
