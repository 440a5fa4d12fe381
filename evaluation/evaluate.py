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
    asked = _sample(np.arange(len(captions.captions)), plan)  # rows of captions
    described = _sample(np.flatnonzero(relevance.transposed().counts()), plan)  # rows of gallery
    needed = np.arange(len(captions.captions)) if "i2t" in plan.directions else asked
    texts = TextBank(
        encoder,
        [captions.captions[row].text for row in needed],
        keep_tokens=bool(scorers) and plan.candidates > 0,
        on_batch=lambda done: on_progress("encode captions", done, len(needed)),
    )
    makers = {
        "t2i": lambda: _text_queries(captions, gallery, texts, relevance, asked, needed),
        "i2t": lambda: _image_queries(captions, gallery, texts, relevance, described),
    }
    return [
        _run(makers[name](), texts, gallery, scorers, plan, on_progress) for name in plan.directions
    ]


@dataclass(frozen=True, slots=True)
class _Setting:
    """What one direction asks and searches, and how its candidates are scored again."""

    name: str
    queries: list[str]
    documents: list[str]
    sources: np.ndarray  # (Q,) as in Direction
    relevance: Relevance
    clusters: np.ndarray  # (Q,)
    query_vectors: np.ndarray  # (Q, D)
    document_vectors: np.ndarray  # (M, D)
    score: Callable[..., np.ndarray]  # score_images or score_texts
    rows: np.ndarray  # (Q,) the queries as `score` wants them


def _text_queries(
    captions: CaptionSet,
    gallery: Gallery,
    texts: TextBank,
    relevance: Relevance,
    asked: np.ndarray,
    needed: np.ndarray,
) -> _Setting:
    rows = np.searchsorted(needed, asked)  # (Q,) rows of texts
    return _Setting(
        "t2i",
        [captions.captions[row].id for row in asked],
        list(gallery.names),
        asked,
        relevance.restricted(asked),
        np.array([captions.captions[row].image for row in asked]),
        texts.pooled[rows],
        gallery.vectors,
        score_images,
        rows,
    )


def _image_queries(
    captions: CaptionSet,
    gallery: Gallery,
    texts: TextBank,
    relevance: Relevance,
    described: np.ndarray,
) -> _Setting:
    return _Setting(
        "i2t",
        [gallery.names[row] for row in described],
        [caption.id for caption in captions.captions],
        described,
        relevance.transposed().restricted(described),
        described,
        gallery.vectors[described],
        texts.pooled,
        score_texts,
        described,
    )


def _run(
    setting: _Setting,
    texts: TextBank,
    gallery: Gallery,
    scorers: Sequence[Scorer],
    plan: Plan,
    on_progress: Progress,
) -> Direction:
    total = len(setting.queries)

    def advance(stage: str) -> Callable[[int], None]:
        return lambda done: on_progress(f"{setting.name}: {stage}", done, total)

    started = time.perf_counter()
    coarse = search(
        setting.query_vectors,
        setting.document_vectors,
        setting.relevance,
        plan.depth,
        on_block=advance("search"),
    )
    rankings = [("coarse", coarse, time.perf_counter() - started)]
    depth = coarse.order.shape[1]
    n = min(plan.candidates, depth)
    for scorer in scorers if n else ():
        started = time.perf_counter()
        scores = setting.score(
            scorer, texts, setting.rows, coarse, n, gallery, advance(scorer.name)
        )  # (Q, n)
        rankings.append((scorer.name, rescored(coarse, scores), time.perf_counter() - started))
    clusters = Clusters(setting.clusters, plan.seed)
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


def _sample(rows: np.ndarray, plan: Plan) -> np.ndarray:
    """Draw at most as many of the rows as the plan allows, at random, ascending."""
    if plan.limit is None or plan.limit >= len(rows):
        return rows
    drawn = np.random.default_rng(plan.seed).choice(rows, plan.limit, replace=False)
    return np.sort(drawn)
