"""Exact search over a whole gallery, a block of queries at a time.

The Q x M score matrix is never held: a block of queries is scored against all documents, its
best N and the exact rank of its first hit are kept, and its scores are overwritten by the next.
Memory is therefore the two sets of vectors, one block, and N numbers a query.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .ranking import Ranking, Relevance, sort_pessimistically

BLOCK_BYTES = 64 << 20  # of one block's scores


def search(
    queries: np.ndarray,
    documents: np.ndarray,
    relevance: Relevance,
    depth: int,
    *,
    block_bytes: int = BLOCK_BYTES,
    on_block: Callable[[int], None] | None = None,
) -> Ranking:
    """Rank all documents for each query by inner product and keep the best.

    Args:
        queries: (Q, D) float32.
        documents: (M, D) float32.
        relevance: Q x M; breaks ties against us (see `ranking`) and gives the first hits.
        depth: how many documents to keep a query, at most M.
        block_bytes: how much memory one block's scores may take.
        on_block: called with the number of queries that a block has finished.
    """
    total, size = relevance.shape
    depth = min(depth, size)
    order = np.empty((total, depth), dtype=np.int64)
    scores = np.empty((total, depth), dtype=np.float32)
    grades = np.empty((total, depth), dtype=np.int64)
    first = np.empty(total, dtype=np.int64)
    rows = max(1, min(total, block_bytes // (4 * size)))
    block = torch.empty(rows, size)
    gallery = torch.from_numpy(documents).T  # (D, M)
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        part = slice(start, stop)
        sums = torch.mm(
            torch.from_numpy(queries[part]), gallery, out=block[: stop - start]
        )  # (B, M)
        first[part] = _first_hits(sums, relevance, start)
        order[part], scores[part], grades[part] = _best(sums, relevance, start, depth)
        if on_block:
            on_block(stop - start)
    return Ranking(order, scores, grades, first)


def _first_hits(sums: torch.Tensor, relevance: Relevance, start: int) -> np.ndarray:
    """Rank of each query's best relevant document: one more than those that beat or equal it."""
    count, size = sums.shape
    rows, columns, _ = map(torch.from_numpy, relevance.within(start, start + count))
    own = sums[rows, columns]  # (E,)
    best = torch.full((count,), -torch.inf).scatter_reduce(0, rows, own, "amax")  # (B,)
    ahead = (sums >= best[:, None]).sum(dim=1)  # (B,), the relevant that are best among them
    ours = torch.zeros(count, dtype=torch.int64).scatter_add(0, rows, (own >= best[rows]).long())
    none = torch.isneginf(best)
    return torch.where(none, size + 1, 1 + ahead - ours).numpy()


def _best(
    sums: torch.Tensor, relevance: Relevance, start: int, depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best `depth` documents of each query: order, scores, grades, each (B, depth)."""
    values, indices = sums.topk(depth, dim=1)
    order, scores = indices.numpy(), values.numpy()
    least = values[:, -1:]  # (B, 1)
    # Where the last place is tied, topk took any of the tied: choose again, against us.
    for row in ((sums >= least).sum(dim=1) > depth).nonzero().flatten().tolist():
        tied = (sums[row] >= least[row]).nonzero().numpy().reshape(1, -1)  # (1, more than depth)
        line = sums[row].numpy()[tied]
        worst = sort_pessimistically(tied, line, relevance.grades_of(tied, start + row))
        order[row], scores[row] = worst[0][0, :depth], worst[1][0, :depth]
    return sort_pessimistically(order, scores, relevance.grades_of(order, start))
