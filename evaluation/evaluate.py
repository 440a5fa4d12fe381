"""Every caption as a query, or every image: the coarse stage and rerankers on the same candidates.

evaluation = evaluate(captions, gallery, text_encoder, scorers, Plan(candidates=100))
evaluation.directions[0].rows[0].estimates["hit@1"]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .datasets import CaptionSet
from .gallery import Gallery
from .metrics import measure
from .ranking import Ranking, Relevance, rescored
from .rescoring import score_images, score_texts
from .search import search
from .statistics import Clusters, Difference, Estimate
from .texts import TextBank

if TYPE_CHECKING:
    from ..indexing.encoder import TextEncoder
    from ..rerank.scorers import Scorer

DIRECTIONS = ("t2i", "i2t")
LEAST_DEPTH = 100  # of the lists that mrr, map and TREC runs are read from

Progress = Callable[[str, int, int], None]  # (stage, steps done just now, steps in all)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to evaluate and how."""

    directions: tuple[str, ...] = ("t2i",)
    candidates: int = 100  # handed to the rerankers; 0 for the coarse stage alone
    ks: tuple[int, ...] = (1, 5, 10)
    limit: int | None = None  # of queries, drawn at random; what is searched stays whole
    seed: int = 0

    @property
    def depth(self) -> int:
        """The length of the ranked lists: candidates first, then the coarse order goes on."""
        return max(self.candidates or LEAST_DEPTH, *self.ks, 10)


@dataclass(frozen=True, slots=True)
class Row:
    """One system: the coarse stage, or a reranker after it."""

    scorer: str
    ranking: Ranking
    values: dict[str, np.ndarray]  # measure -> (Q,)
    estimates: dict[str, Estimate]  # measure -> mean; "median_rank" as well
    differences: dict[str, Difference]  # from the coarse row; empty there
    seconds: float  # this stage took for all queries together


@dataclass(frozen=True, slots=True)
class Direction:
    """All systems on one kind of query."""

    name: str  # "t2i" or "i2t"
    queries: list[str]  # Q ids
    documents: list[str]  # ids of what is searched
    sources: np.ndarray  # (Q,) the caption row ("t2i") or gallery row ("i2t") of each query
    relevance: Relevance
    clusters: np.ndarray  # (Q,) queries of one image belong together
    depth: int
    candidates: int
    ceiling: Estimate  # hit@candidates of the coarse stage, which no reranker can pass
    rows: list[Row] = field(default_factory=list)

    @property
    def single(self) -> bool:
        """Whether each query has just one relevant document, so that hit@k is recall@k."""
        return bool((self.relevance.counts() <= 1).all())


def evaluate(
    captions: CaptionSet,
    gallery: Gallery,
    encoder: TextEncoder,
    scorers: Sequence[Scorer],
    plan: Plan,
    on_progress: Progress = lambda stage, done, total: None,
) -> list[Direction]:
    """Run all queries of each direction through the coarse stage and each scorer.

    Args:
        captions: queries and judgements; image rows are the first rows of `gallery`.
        gallery: what is searched.
        encoder: the text half of the gallery's model.
        scorers: rerankers; each gets the same candidates.
        plan: what to do.
        on_progress: told about texts encoded and queries searched and rescored.
    """
    relevance = Relevance.of_captions(captions, len(gallery.names))
    asked = _sample(np.arange(len(captions.captions)), plan.limit, plan.seed)
    needed = np.arange(len(captions.captions)) if "i2t" in plan.directions else asked
    texts = TextBank(
        encoder,
        [captions.captions[row].text for row in needed],
        keep_tokens=bool(scorers) and plan.candidates > 0,
        on_batch=lambda done: on_progress("encode captions", done, len(needed)),
    )
    results = []
    for name in plan.directions:
        if name == "t2i":
            queries = np.searchsorted(needed, asked)  # (Q,) rows of texts
            direction = _Setting(
                name,
                [captions.captions[row].id for row in asked],
                list(gallery.names),
                asked,
                relevance.restricted(asked),
                np.array([captions.captions[row].image for row in asked]),
                texts.pooled[queries],
                gallery.vectors,
            )
            scoring = score_images
        else:
            described = np.flatnonzero(relevance.transposed().counts())
            queries = _sample(described, plan.limit, plan.seed)  # (Q,) gallery rows
            direction = _Setting(
                name,
                [gallery.names[row] for row in queries],
                [each.id for each in captions.captions],
                queries,
                relevance.transposed().restricted(queries),
                queries,
                gallery.vectors[queries],
                texts.pooled,
            )
            scoring = score_texts

        def rescore(scorer: Scorer, coarse: Ranking, n: int, queries=queries, scoring=scoring):
            stage = f"rerank with {scorer.name}"
            return scoring(
                scorer, texts, queries, coarse, n, gallery.fetch,
                lambda done: on_progress(stage, done, len(queries)),
            )  # fmt: skip

        results.append(_run(direction, scorers, plan, rescore, on_progress))
    return results


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a direction asks and searches."""

    name: str
    queries: list[str]
    documents: list[str]
    sources: np.ndarray
    relevance: Relevance
    clusters: np.ndarray
    query_vectors: np.ndarray  # (Q, D)
    document_vectors: np.ndarray  # (M, D)


def _run(
    setting: _Setting,
    scorers: Sequence[Scorer],
    plan: Plan,
    rescore: Callable[[Scorer, Ranking, int], np.ndarray],
    on_progress: Progress,
) -> Direction:
    total = len(setting.queries)
    started = time.perf_counter()
    coarse = search(
        setting.query_vectors,
        setting.document_vectors,
        setting.relevance,
        plan.depth,
        on_block=lambda done: on_progress("search", done, total),
    )
    rankings = [("coarse", coarse, time.perf_counter() - started)]
    n = min(plan.candidates, coarse.order.shape[1])
    for scorer in scorers if n else ():
        started = time.perf_counter()
        ranking = rescored(coarse, rescore(scorer, coarse, n))
        rankings.append((scorer.name, ranking, time.perf_counter() - started))
    clusters = Clusters(setting.clusters, plan.seed)
    depth = coarse.order.shape[1]
    within = (coarse.first <= (n or depth)).astype(float)
    direction = Direction(
        setting.name,
        setting.queries,
        setting.documents,
        setting.sources,
        setting.relevance,
        setting.clusters,
        depth,
        n,
        clusters.estimates({"ceiling": within})["ceiling"],
    )
    for name, ranking, seconds in rankings:
        values = measure(ranking, setting.relevance, plan.ks)
        estimates = clusters.estimates(values)
        estimates["median_rank"] = clusters.median(ranking.first)
        first = direction.rows[0].values if direction.rows else None
        differences = clusters.differences(first, values) if first else {}
        direction.rows.append(Row(name, ranking, values, estimates, differences, seconds))
    return direction


def _sample(rows: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Draw at most `limit` of the rows at random, ascending."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
