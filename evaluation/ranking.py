"""Ranked lists and what in them is relevant.

Ties are broken against us: among equal scores the documents that are not relevant come first,
lower grades before higher, then by row. A figure read off such a list is the lowest that any
order of the tied documents would give, and it does not depend on the order of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .datasets import CaptionSet


@dataclass(frozen=True, slots=True)
class Relevance:
    """Which documents answer which query: E triples sorted by query, then document."""

    queries: np.ndarray  # (E,) int64
    documents: np.ndarray  # (E,) int64
    grades: np.ndarray  # (E,) int64, above zero
    shape: tuple[int, int]  # Q queries, M documents

    @classmethod
    def from_triples(
        cls, triples: Sequence[tuple[int, int, int]], shape: tuple[int, int]
    ) -> Relevance:
        """Build from (query, document, grade)."""
        table = np.array(sorted(triples), dtype=np.int64).reshape(-1, 3)
        return cls(table[:, 0], table[:, 1], table[:, 2], shape)

    @classmethod
    def of_captions(cls, captions: CaptionSet, gallery: int) -> Relevance:
        """Captions as queries, and as documents a gallery that begins with their images."""
        triples = [
            (query, image, grade)
            for query, caption in enumerate(captions.captions)
            for image, grade in caption.grades
        ]
        return cls.from_triples(triples, (len(captions.captions), gallery))

    def transposed(self) -> Relevance:
        """Documents as queries."""
        order = np.lexsort((self.queries, self.documents))
        queries, documents = self.shape
        return Relevance(
            self.documents[order],
            self.queries[order],
            self.grades[order],
            (documents, queries),
        )

    def restricted(self, queries: np.ndarray) -> Relevance:
        """Keep the queries given, ascending, and number them anew."""
        kept = np.isin(self.queries, queries)
        return Relevance(
            np.searchsorted(queries, self.queries[kept]),
            self.documents[kept],
            self.grades[kept],
            (len(queries), self.shape[1]),
        )

    def counts(self) -> np.ndarray:
        """How many documents are relevant to each query, (Q,) int64."""
        return np.bincount(self.queries, minlength=self.shape[0])

    def within(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The triples of queries start..stop: (queries from 0, documents, grades)."""
        low, high = np.searchsorted(self.queries, (start, stop))
        return self.queries[low:high] - start, self.documents[low:high], self.grades[low:high]

    def grades_of(self, order: np.ndarray, start: int = 0) -> np.ndarray:
        """Look up grades.

        Args:
            order: (B, N) documents of queries `start` on.
            start: the first row's query.

        Returns:
            (B, N) int64, 0 where not relevant.
        """
        if not len(self.queries):
            return np.zeros_like(order)
        width = self.shape[1]
        keys = self.queries * width + self.documents  # (E,) ascending
        queries = np.arange(start, start + len(order))[:, None]
        wanted = queries * width + order  # (B, N)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, self.grades[at], 0)

    def ideal(self, depth: int) -> np.ndarray:
        """Each query's grades in the best order, (Q, depth) int64, padded with zeros."""
        order = np.lexsort((-self.grades, self.queries))
        first = np.cumsum(self.counts()) - self.counts()  # (Q,) where each query's triples start
        places = np.arange(len(order)) - first[self.queries]  # (E,) 0, 1, … within a query
        best = np.zeros((self.shape[0], depth), dtype=np.int64)
        kept = places < depth
        best[self.queries[kept], places[kept]] = self.grades[order][kept]
        return best


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a system answered to Q queries: the best N documents, and the rank of the first hit."""

    order: np.ndarray  # (Q, N) int64 documents, best first
    scores: np.ndarray  # (Q, N) float32, not increasing along a row
    grades: np.ndarray  # (Q, N) int64, 0 where not relevant
    first: np.ndarray  # (Q,) int64, rank from 1 of the first relevant document, counted in the
    # whole gallery even where it lies beyond N; M + 1 for a query whose relevant is not in it


def sort_pessimistically(
    order: np.ndarray, scores: np.ndarray, grades: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort each list by falling score, then rising grade, then document; all (B, N)."""
    by = np.lexsort((order, grades, -scores), axis=-1)
    return (
        np.take_along_axis(order, by, axis=-1),
        np.take_along_axis(scores, by, axis=-1),
        np.take_along_axis(grades, by, axis=-1),
    )


def rescored(coarse: Ranking, scores: np.ndarray) -> Ranking:
    """Order the first n documents of each list by new scores; what follows keeps its place.

    Args:
        coarse: the lists to reorder.
        scores: (Q, n) of the first n <= N documents of each.
    """
    n = scores.shape[1]
    order, head, grades = sort_pessimistically(
        coarse.order[:, :n], scores.astype(np.float32), coarse.grades[:, :n]
    )
    hit = grades > 0  # (Q, n)
    first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, coarse.first)
    return Ranking(
        np.concatenate([order, coarse.order[:, n:]], axis=1),
        np.concatenate([head, np.minimum(coarse.scores[:, n:], head[:, -1:])], axis=1),
        np.concatenate([grades, coarse.grades[:, n:]], axis=1),
        first,
    )
