"""Single pictures through an encoder and a scorer: what ``explain`` and ``ask`` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..core.types import PatchBatch
from .explain import explain, require_attention
from .scorers import default_scorer_name, load_scorer
from .sheets import Shown

if TYPE_CHECKING:
    from ..core.types import TextFeatures
    from ..indexing.encoder import Encoder
    from ..indexing.shards import RowFormat
    from .scorers import Scorer


def show(
    encoder: Encoder,
    scorer: Scorer,
    name: str,
    pixels: np.ndarray,
    text: str,
    row: RowFormat | None = None,
) -> Shown:
    """Explain the score of a text for a picture (H, W, 3) uint8, as the encoder takes it.

    Args:
        encoder: encodes picture and text.
        scorer: what is explained.
        name: of the picture.
        pixels: (H, W, 3) uint8.
        text: the query.
        row: how an index keeps patches; the score is then that of a query there.

    Raises:
        UsageError: the scorer has no attention to show, or the text no words.
    """
    words = encoder.encode_texts([text])
    return Shown(name, pixels, explain(scorer, words, _look_at(encoder, pixels, row)))


def _look_at(encoder: Encoder, pixels: np.ndarray, row: RowFormat | None) -> PatchBatch:
    """Encode a picture (H, W, 3), and keep it as an index would."""
    from ..indexing.shards import stored_form

    image = encoder.encode_images(np.stack([pixels]))
    pooled = image.pooled.cpu()  # (1, D)
    if row is None:
        return PatchBatch(image.patches.cpu(), None, image.grid, pooled=pooled)
    return dataclasses.replace(stored_form(image.patches, row), pooled=pooled)


class Viewer:
    """Explains and scores pictures that need not be in an index.

    Args:
        encoder: encodes pictures and texts.
        scorer: a scorer's name; None takes the trained head that fits, else "late".
        heads: an index's own heads, ``<index>/heads``.
        row: how the index keeps patches, so that a score is that of a query there.

    Raises:
        ModelError: the scorer does not fit the encoder.
        UsageError: it has no attention to show.
    """

    def __init__(
        self,
        encoder: Encoder,
        scorer: str | None = None,
        heads: Path | None = None,
        row: RowFormat | None = None,
    ) -> None:
        spec = encoder.spec
        name = scorer or default_scorer_name(spec, heads)
        if scorer is None and name == "coarse":
            name = "late"  # the coarse order has nothing to show
        self.encoder, self.row = encoder, row
        self.scorer = load_scorer(name, spec, device=encoder.device, folder=heads)
        require_attention(self.scorer)

    def show(self, path: Path, text: str) -> Shown:
        """Explain one picture for one text.

        Raises:
            InputError: the picture cannot be read.
            UsageError: the text has no words.
        """
        from ..indexing.images import decode

        pixels = decode(path, self.encoder.spec.input_spec).pixels  # (H, W, 3)
        return show(self.encoder, self.scorer, path.name, pixels, text, self.row)

    def score(self, path: Path, texts: Sequence[str]) -> np.ndarray:
        """Return the scores of several texts for one picture, (texts,)."""
        from ..indexing.images import decode

        pixels = decode(path, self.encoder.spec.input_spec).pixels  # (H, W, 3)
        patches = _look_at(self.encoder, pixels, self.row)
        assert patches.pooled is not None
        words: TextFeatures = self.encoder.encode_texts(texts)
        coarse = words.pooled.cpu() @ patches.pooled.T  # (texts, 1)
        rows = torch.zeros(len(texts), 1, dtype=torch.long)  # (texts, 1)
        return self.scorer.score(words, patches, rows, coarse).rank[:, 0].numpy()
