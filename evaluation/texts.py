"""Encoded captions, kept so that any few of them can be handed to a scorer again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.types import TextFeatures

if TYPE_CHECKING:
    from ..indexing.encoder import TextEncoder

TEXTS_AT_ONCE = 256


class TextBank:
    """T encoded texts.

    Args:
        encoder: the index's own.
        texts: what to encode.
        keep_tokens: False keeps the pooled vectors only, all that a coarse search needs.
        on_batch: called with the number of texts that a batch has finished.
    """

    pooled: np.ndarray  # (T, D) float32, L2-normalised

    def __init__(
        self,
        encoder: TextEncoder,
        texts: Sequence[str],
        keep_tokens: bool = True,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.texts = texts
        self._tokens: dict[int, Tensor] = {}  # (its own T', C_text) each: nothing is padded
        self._words: dict[int, tuple[str, ...]] = {}
        by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        rows: list[int] = []
        pooled: list[Tensor] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            batch = by_length[start : start + TEXTS_AT_ONCE]
            features = encoder.encode_texts([texts[row] for row in batch])
            rows += batch
            pooled.append(features.pooled.cpu())
            if keep_tokens:
                for row, tokens, mask, words in zip(
                    batch, features.tokens.cpu(), features.mask.cpu(), features.words, strict=True
                ):
                    self._tokens[row] = tokens[mask]  # a copy: the batch is let go
                    self._words[row] = words
            if on_batch:
                on_batch(len(batch))
        self.pooled = torch.cat(pooled)[np.argsort(rows)].numpy()  # (T, D)

    def take(self, rows: Sequence[int]) -> TextFeatures:
        """Return the texts in `rows` as if they had been encoded together."""
        lengths = torch.tensor([len(self._tokens[row]) for row in rows])  # (Q,)
        return TextFeatures(
            texts=tuple(self.texts[row] for row in rows),
            pooled=torch.from_numpy(self.pooled[list(rows)]),  # (Q, D)
            tokens=pad_sequence([self._tokens[row] for row in rows], batch_first=True),  # (Q, T, C)
            mask=torch.arange(int(lengths.max())) < lengths[:, None],  # (Q, T)
            words=tuple(self._words[row] for row in rows),
        )
