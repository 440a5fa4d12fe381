"""The whole query: text and pictures in, ranked hits out. What ``mmsearch query`` runs.

with ImageIndex.open(folder) as index:
    searcher = Searcher(index)
    for hit in searcher.search([Query("red car")])[0]:
        print(hit.record.path, hit.probability)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import BadIndex, InputError, MmsearchError, UsageError
from .rerank import Reranked, read_pictures, rerank, take_candidates, take_texts
from .scorers import default_scorer_name, load_scorer

if TYPE_CHECKING:
    import torch

    from ..core.types import Candidates, ImageRecord, PatchBatch, TextFeatures
    from ..indexing.encoder import Encoder, TextEncoder
    from ..indexing.filters import Filters
    from ..indexing.index import ImageIndex
    from .scorers import Scorer
    from .sheets import Shown


_ENCODE_AT_ONCE = 32  # pictures whose missing patches are computed together


@dataclass(frozen=True)
class Query:
    """What to look for: words, pictures, or both; and what to steer away from.

    The coarse query is the normalised sum of the normalised parts: text, ``image_weight`` times
    the mean picture, less ``minus_weight`` times each thing unwanted. Only words alone have match
    probabilities: those are calibrated on cosines of texts with pictures.
    """

    text: str = ""
    images: tuple[Path | bytes, ...] = ()
    minus: tuple[str, ...] = ()
    image_weight: float = 1.0
    minus_weight: float = 0.5

    @property
    def words_alone(self) -> bool:
        """Whether nothing but words says what to look for."""
        return not (self.images or self.minus)


@dataclass(frozen=True)
class Hit:
    """One picture found, at its final place."""

    rank: int  # from 1
    record: ImageRecord
    score: float  # the scorer's, comparable within one query only
    probability: float | None  # calibrated match probability, where scorer and query have one
    coarse_score: float  # cosine of the pooled vectors
    coarse_rank: int  # from 1


class Searcher:
    """Answers queries on one index with one scorer; models load when first needed and stay.

    Args:
        index: an open index.
        scorer: a scorer's name; None takes the trained head that fits the index, else "coarse".
        device: as in ``choose_device``.
        on_notice: told, once, that patch features are missing from the index.

    Raises:
        ModelError: the scorer is unknown or was trained for another encoder.
    """

    def __init__(
        self,
        index: ImageIndex,
        scorer: str | None = None,
        device: str | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        self.index = index
        self._device = device
        self._on_notice = on_notice
        self._spec = index.manifest.encoder
        self._heads = index.path / "heads"
        self.scorer_name = scorer or default_scorer_name(self._spec, self._heads)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The scorer of the second stage."""
        return load_scorer(self.scorer_name, self._spec, device=self._device, folder=self._heads)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """The text half of the index's model."""
        from ..indexing.encoder import load_text_encoder

        return load_text_encoder(self._spec, self._device)

    @functools.cached_property
    def image_encoder(self) -> Encoder:
        """The whole model, needed for pictures in a query only."""
        from ..indexing.encoder import encoder_for

        return encoder_for(self._spec, self._device)

    def load(self) -> None:
        """Load now what text queries need, rather than with the first of them."""
        _ = self.text_encoder, self.scorer

    def search(
        self,
        queries: Sequence[Query],
        k: int = 10,
        candidates: int = 100,
        *,
        folder: Path | None = None,
        filters: Filters | None = None,
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """Answer queries, each with at most ``k`` hits, best first.

        Args:
            queries: what to look for.
            k: hits wanted a query.
            candidates: how many the coarse stage hands to the scorer (at least ``k``).
            folder: only pictures below it.
            filters: only pictures with these facts.
            min_score: only hits with at least this match probability.

        Raises:
            BadIndex: the index is empty.
            UsageError: a query that is empty or no valid text, or ``min_score`` with a query or
                a scorer that gives no probability.
            InputError: a picture of a query cannot be read.
        """
        if len(self.index) == 0:
            raise BadIndex(
                f"the index in {self.index.path} holds no pictures", "Run: mmsearch index FOLDER"
            )
        for query in queries:
            _refuse_unanswerable(query, min_score)
        text = self.text_encoder.encode_texts(
            [query.text.strip() or "a photo" for query in queries]
        )
        pooled = self._combine(queries, text.pooled)  # (Q, D)
        text = dataclasses.replace(text, pooled=pooled)
        found = self.index.search(
            pooled.cpu().numpy(), max(k, candidates), folder=folder, filters=filters
        )
        worded = [row for row, query in enumerate(queries) if query.text.strip()]
        wordless = [row for row, query in enumerate(queries) if not query.text.strip()]
        hits: dict[int, list[Hit]] = {}
        for rows in filter(None, (worded, wordless)):
            # A query without words has nothing for the cross-attention to attend with.
            scorer = self.scorer if rows is worded else load_scorer("coarse", self._spec)
            ranked = self._rerank(scorer, text, found, rows)
            no_probability = ranked.probability is None and (ranked.ids >= 0).any()
            if min_score is not None and no_probability:
                raise UsageError(
                    f"--min-score needs a match probability, and scorer {scorer.name!r} gives none",
                    "Use a trained scorer (see `mmsearch models --scorers`).",
                )
            for at, row in enumerate(rows):
                hits[row] = self._hits(queries[row], ranked, at, k, min_score)
        return [hits[row] for row in range(len(queries))]

    def require_attention(self) -> None:
        """Refuse, before any search, a scorer whose hits ``show`` cannot explain.

        Raises:
            UsageError: the scorer has no attention to show.
        """
        from .explain import require_attention

        require_attention(self.scorer)

    def show(self, record: ImageRecord, text: str) -> Shown | None:
        """Explain the score of a text for an indexed picture, from the picture itself.

        Returns:
            None if its file is gone, cannot be read or is not the one that was indexed.

        Raises:
            UsageError: the scorer has no attention to show.
        """
        from .viewing import show

        pixels = self._pixels_of(record)
        if pixels is None:
            return None
        name, row = Path(record.path).name, self.index.manifest.row_format
        return show(self.image_encoder, self.scorer, name, pixels, text, row)

    def _rerank(
        self, scorer: Scorer, text: TextFeatures, found: Candidates, rows: Sequence[int]
    ) -> Reranked:
        """Order the candidates of some of the queries, those of ``rows``."""
        pictures = functools.partial(read_pictures, self.index)
        return rerank(
            scorer, take_texts(text, rows), take_candidates(found, rows), self._patches, pictures
        )

    def _patches(self, ids: Sequence[int]) -> PatchBatch:
        """Read patches; those that the shards lack are computed from the picture if it is there."""
        import torch

        from ..indexing.shards import stored_form

        batch = self.index.patches_there(ids)
        if batch.present is None:
            return batch
        missing = (~batch.present).nonzero().flatten().tolist()
        pixels, places = [], []
        for at, record in zip(missing, self.index.records([ids[i] for i in missing]), strict=True):
            found = self._pixels_of(record)
            if found is not None:
                pixels.append(found)
                places.append(at)
        present = batch.present.clone()  # (M,)
        for start in range(0, len(places), _ENCODE_AT_ONCE):
            some = torch.tensor(places[start : start + _ENCODE_AT_ONCE])  # (B,)
            features = self.image_encoder.encode_images(
                np.stack(pixels[start : start + _ENCODE_AT_ONCE])
            )
            fresh = stored_form(features.patches, self.index.manifest.row_format)
            batch.codes[some] = fresh.codes
            if batch.pooled is not None:
                batch.pooled[some] = features.pooled.cpu()
            if batch.scales is not None and fresh.scales is not None:
                batch.scales[some] = fresh.scales
            present[some] = True
        if self._on_notice is not None:
            left = len(missing) - len(places)
            self._on_notice(
                f"patch features of {len(missing)} pictures cannot be read from the index: "
                f"{len(places)} computed from their files, {left} ranked by coarse score alone; "
                "mend it with `mmsearch check --repair`"
            )
            self._on_notice = None
        return dataclasses.replace(batch, present=present)

    def _pixels_of(self, record: ImageRecord) -> np.ndarray | None:
        """Return the model's view of a picture (H, W, 3), None if its file is gone or another."""
        from ..indexing.images import decode, source_of

        archive, inside, _ = record.path.partition(".tar!")
        try:
            # os.stat, since any bytes that a file system allows must come through.
            status = os.stat(f"{archive}.tar" if inside else record.path)  # noqa: PTH116
            size = record.size if inside else status.st_size
            if (size, status.st_mtime_ns) != (record.size, record.mtime_ns):
                return None
            return decode(source_of(Path(record.path)), self._spec.input_spec).pixels
        except (OSError, MmsearchError):
            return None

    def _hits(
        self, query: Query, ranked: Reranked, row: int, k: int, min_score: float | None
    ) -> list[Hit]:
        places = [at for at, id_ in enumerate(ranked.ids[row]) if id_ >= 0]
        probability = ranked.probability if query.words_alone else None  # (Q, N)
        if min_score is not None and probability is not None:
            places = [at for at in places if probability[row, at] >= min_score]
        places = places[:k]
        records = self.index.records([int(ranked.ids[row, at]) for at in places])
        hits = []
        for rank, (at, record) in enumerate(zip(places, records, strict=True), start=1):
            match = math.nan if probability is None else float(probability[row, at])
            hits.append(
                Hit(
                    rank=rank,
                    record=record,
                    score=float(ranked.scores[row, at]),
                    probability=None if math.isnan(match) else match,
                    coarse_score=float(ranked.coarse[row, at]),
                    coarse_rank=int(ranked.coarse_rank[row, at]) + 1,
                )
            )
        return hits

    def _combine(self, queries: Sequence[Query], words: torch.Tensor) -> torch.Tensor:
        """Mix words, pictures and what is unwanted into one unit vector a query, (Q, D)."""
        import torch
        import torch.nn.functional as F

        # A batch often shares its pictures and what is unwanted: each is encoded once.
        @functools.cache
        def mean_picture(images: tuple[Path | bytes, ...]) -> torch.Tensor:
            return F.normalize(self._encode_pictures(images).mean(0), dim=0)  # (D,)

        @functools.cache
        def unwanted(minus: tuple[str, ...]) -> torch.Tensor:
            return self.text_encoder.encode_texts(minus).pooled.sum(0)  # (D,)

        rows = []
        for query, word in zip(queries, words, strict=True):
            mixed = word if query.text.strip() else torch.zeros_like(word)  # (D,)
            if query.images:
                picture = mean_picture(tuple(query.images)).to(word.device)  # (D,)
                mixed = mixed + query.image_weight * picture  # (D,)
            if query.minus:
                mixed = mixed - query.minus_weight * unwanted(tuple(query.minus))  # (D,)
            if float(mixed.norm()) < 1e-6:
                raise UsageError(
                    "the parts of the query cancel each other out", "Leave out --minus."
                )
            rows.append(F.normalize(mixed, dim=0))  # (D,)
        return torch.stack(rows)

    def _encode_pictures(self, sources: Sequence[Path | bytes]) -> torch.Tensor:
        from ..indexing.images import UndecodableImage, decode

        pixels = []
        for source in sources:
            try:
                pixels.append(decode(source, self._spec.input_spec).pixels)
            except (UndecodableImage, OSError) as error:
                name = "the picture given" if isinstance(source, bytes) else source
                raise InputError(
                    f"cannot read {name}: {error}", "Give a picture file or an http(s) URL."
                ) from error
        return self.image_encoder.encode_images(np.stack(pixels)).pooled  # (I, D)


def _refuse_unanswerable(query: Query, min_score: float | None) -> None:
    """Refuse a query that no search can answer.

    Raises:
        UsageError: it is empty, no valid text, or asks for probabilities that it has none of.
    """
    if not (query.text.strip() or query.images):
        raise UsageError("the query is empty", "Give some words, or --image FILE.")
    try:
        " ".join([query.text, *query.minus]).encode()
    except UnicodeEncodeError as error:  # bytes of a command line come as lone surrogates
        raise UsageError("the query is not valid UTF-8 text", "Type it anew.") from error
    if min_score is not None and not query.words_alone:
        raise UsageError(
            "--min-score needs a match probability, and only words alone have one",
            "Leave out --min-score, or --image and --minus.",
        )
