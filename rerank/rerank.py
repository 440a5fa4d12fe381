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

PAIRS_AT_ONCE = 6400  # bounds the patches held in memory: those of so many are about 80 MB
TEXTS_AT_ONCE = 256  # and their tokens
LOOKING_AT_ONCE = 800  # the same for pictures: so many of PICTURE_SIDE are about 500 MB
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
    queries, n = candidates.ids.shape
    size = queries_at_once(scorer, n)
    parts = []
    for at in range(0, queries, size):
        some = range(at, min(at + size, queries))
        block = take_candidates(candidates, some)
        scores, probability = score_candidates(
            scorer, take_texts(text, some), block.ids, block.scores, fetch_patches, fetch_pictures
        )
        parts.append(_sorted(block, scores, probability))
    if not parts:
        return Reranked(candidates.ids, candidates.scores, candidates.scores, candidates.ids, None)
    return Reranked(
        ids=np.concatenate([part.ids for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        coarse=np.concatenate([part.coarse for part in parts]),
        coarse_rank=np.concatenate([part.coarse_rank for part in parts]),
        probability=_probabilities(parts),
    )


def score_candidates(
    scorer: Scorer,
    text: TextFeatures,
    ids: np.ndarray,
    coarse: np.ndarray,
    fetch_patches: Callable[[Sequence[int]], PatchBatch],
    fetch_pictures: FetchPictures | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Score pairs, with whatever the scorer looks at: patches, pictures or neither.

    Each picture is fetched once, however many texts have it.

    Args:
        scorer: from ``load_scorer``.
        text: Q texts.
        ids: (Q, N) pictures, as the fetching functions know them; -1 for none.
        coarse: (Q, N) float32, cosine similarity.
        fetch_patches: called if the scorer needs patches.
        fetch_pictures: called if the scorer looks at pictures.

    Returns:
        Scores, -inf where there is no picture, and match probabilities, None where the scorer
        gives none or there is no picture at all; (Q, N) float32 each.

    Raises:
        ModelError: the scorer gave a NaN.
        UsageError: the scorer looks at pictures and they cannot be fetched.
    """
    padding = ids < 0  # (Q, N)
    coarse = np.where(padding, -np.inf, coarse).astype(np.float32)  # (Q, N)
    distinct, inverse = np.unique(ids, return_inverse=True)  # (M or M+1,), (Q*N,)
    hidden = int(len(distinct) > 0 and distinct[0] < 0)  # the padding id sorts first
    wanted = distinct[hidden:].tolist()
    if not wanted:
        return coarse, None
    rows = torch.from_numpy(inverse.reshape(ids.shape) - hidden).long()  # (Q, N), -1 on padding
    rank, match = _ask(
        scorer, text, wanted, rows, torch.from_numpy(coarse), fetch_patches, fetch_pictures
    )
    scores = rank.float().cpu().numpy()  # (Q, N)
    if np.isnan(scores).any():
        raise ModelError(f"scorer {scorer.name!r} gave a score that is not a number")
    scores = np.where(padding, np.float32(-np.inf), scores)  # (Q, N)
    return scores, None if match is None else match.float().cpu().numpy()  # (Q, N) each


def _ask(
    scorer: Scorer,
    text: TextFeatures,
    ids: Sequence[int],
    rows: torch.Tensor,
    coarse: torch.Tensor,
    fetch_patches: Callable[[Sequence[int]], PatchBatch],
    fetch_pictures: FetchPictures | None,
) -> Scores:
    """Score the M distinct pictures ``ids`` where ``rows`` (Q, N), the places in them, say so."""
    if fetch_pictures and isinstance(scorer, ItmScorer):
        return scorer.score_pictures(text.texts, fetch_pictures(ids), rows)
    patches = fetch_patches(ids) if scorer.needs_patches else None
    if patches is not None and patches.present is not None:
        there = patches.present[rows.clamp_min(0)] & (rows >= 0)  # (Q, N)
        rows = rows.masked_fill(~there, -1)  # (Q, N)
    return scorer.score(text, patches, rows, coarse)


def queries_at_once(scorer: Scorer, candidates: int) -> int:
    """Return how many queries of so many candidates to score together."""
    return min(TEXTS_AT_ONCE, max(1, pairs_at_once(scorer) // max(candidates, 1)))


def pairs_at_once(scorer: Scorer) -> int:
    """Return how many pairs' patches or pictures may be held in memory together."""
    return LOOKING_AT_ONCE if isinstance(scorer, ItmScorer) else PAIRS_AT_ONCE


def take_texts(text: TextFeatures, rows: Sequence[int]) -> TextFeatures:
    """Return some of the texts, in the order of ``rows``."""
    some = list(rows)
    return TextFeatures(
        tuple(text.texts[row] for row in some),
        text.pooled[some],
        text.tokens[some],
        text.mask[some],
        tuple(text.words[row] for row in some),
    )


def take_candidates(candidates: Candidates, rows: Sequence[int]) -> Candidates:
    """Return the candidates of some of the queries, in the order of ``rows``."""
    some = list(rows)
    return Candidates(candidates.ids[some], candidates.scores[some])


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


def _sorted(candidates: Candidates, scores: np.ndarray, probability: np.ndarray | None) -> Reranked:
    """Sort candidates by their scores (Q, N); padding, which scores -inf, comes last."""
    coarse = np.where(candidates.ids < 0, -np.inf, candidates.scores).astype(np.float32)  # (Q, N)
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


def _probabilities(parts: Sequence[Reranked]) -> np.ndarray | None:
    """Join those of all blocks (Q, N); a block without candidates has none, and gets NaN."""
    if all(part.probability is None for part in parts):
        return None
    return np.concatenate(
        [
            np.full(part.ids.shape, np.nan, np.float32)
            if part.probability is None
            else part.probability
            for part in parts
        ]
    )
