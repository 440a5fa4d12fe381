"""Single pictures through an encoder and a scorer: what ``explain`` and ``ask`` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .explain import explain
from .scorers import default_scorer_name, load_scorer
from .sheets import Shown

if TYPE_CHECKING:
    from ..core.types import TextFeatures
    from ..indexing.encoder import Encoder
    from .scorers import Scorer


def show(encoder: Encoder, scorer: Scorer, name: str, pixels: np.ndarray, text: str) -> Shown:
    """Explain the score of a text for a picture (H, W, 3) uint8, as the encoder takes it.

    Raises:
        UsageError: the scorer has no attention to show.
    """
    image = encoder.encode_images(np.stack([pixels]))
    words = encoder.encode_texts([text])
    return Shown(name, pixels, explain(scorer, words, image))


class Viewer:
    """Explains and scores pictures that need not be in an index.

    Args:
        encoder: encodes pictures and texts.
        scorer: a scorer's name; None takes the trained head that fits, else "late".
        heads: an index's own heads, ``<index>/heads``.

    Raises:
        ModelError: the scorer does not fit the encoder.
    """

    def __init__(
        self, encoder: Encoder, scorer: str | None = None, heads: Path | None = None
    ) -> None:
        spec = encoder.spec
        name = scorer or default_scorer_name(spec, heads)
        if scorer is None and name == "coarse":
            name = "late"  # the coarse order has nothing to show
        self.encoder = encoder
        self.scorer = load_scorer(name, spec, device=encoder.device, folder=heads)

    def show(self, path: Path, text: str) -> Shown:
        """Explain one picture for one text.

        Raises:
            InputError: the picture cannot be read.
            UsageError: the scorer has no attention to show.
        """
        from ..indexing.images import decode

        pixels = decode(path, self.encoder.spec.input_spec).pixels  # (H, W, 3)
        return show(self.encoder, self.scorer, path.name, pixels, text)

    def score(self, path: Path, texts: Sequence[str]) -> np.ndarray:
        """Return the scores of several texts for one picture, (texts,)."""
        from ..core.types import PatchBatch
        from ..indexing.images import decode

        pixels = decode(path, self.encoder.spec.input_spec).pixels  # (H, W, 3)
        image = self.encoder.encode_images(np.stack([pixels]))
        words: TextFeatures = self.encoder.encode_texts(texts)
        coarse = words.pooled.cpu() @ image.pooled.cpu().T  # (texts, 1)
        rows = torch.zeros(len(texts), 1, dtype=torch.long)  # (texts, 1)
        patches = PatchBatch(image.patches.cpu(), None, image.grid, pooled=image.pooled.cpu())
        return self.scorer.score(words, patches, rows, coarse).rank[:, 0].numpy()
