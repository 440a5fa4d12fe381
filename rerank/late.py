"""``late``: phrases of the query against text-aligned patches, for any CLIP, without training.

Each phrase attends over the patches with weights ``softmax(scale * cos)`` and scores the weighted
mean of its cosines; an infinite scale gives the maximum, as in ColBERT's MaxSim (arXiv 2004.12832).
What any text would score at a patch is taken off first: the cosine of a text that says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..core.errors import ModelError
from .attention import normalising_gain
from .phrases import split_phrases
from .scorers import Place, Scorer, Scores, refuse_argument, register

if TYPE_CHECKING:
    from ..core.types import PatchBatch, TextFeatures

NEUTRAL = "a photo"  # what a patch has in common with any text


class Sight(NamedTuple):
    """How F phrases see N pictures."""

    weights: Tensor  # (F, N, P) attention, rows summing to one
    evidence: Tensor  # (F, N, P) cosine of phrase and patch, less the neutral text's

    def scores(self) -> Tensor:
        """Return the mean over phrases of the attended evidence, (N,)."""
        return (self.weights * self.evidence).sum(dim=-1).mean(dim=0)  # (N,)

    def contributions(self) -> Tensor:
        """Return each patch's exact share of the score, (N, P); it sums to ``scores``."""
        return (self.weights * self.evidence).mean(dim=0)  # (N, P)


class LateScorer:
    """Adds ``weight`` times the phrases' mean evidence to the cosine similarity.

    Args:
        encode: texts to unit vectors (F, D), in the space of the patches.
        weight: fitted on Flickr8k with the bundled encoder; see docs/rerank.md.
        scale: sharpness of the attention; infinite for MaxSim.
        device: where to compute.
    """

    name = "late"
    needs_patches = True

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Tensor],
        weight: float = 0.2,
        scale: float = 20.0,
        device: torch.device | None = None,
    ) -> None:
        self.weight, self.scale = weight, scale
        self.device = device or torch.device("cpu")
        self._encode = encode

    @torch.inference_mode()
    def score(
        self, text: TextFeatures, patches: PatchBatch | None, rows: Tensor, coarse: Tensor
    ) -> Scores:
        """Score pair by pair; a picture without patches keeps its cosine."""
        assert patches is not None
        vectors = self.vectors(text.texts)  # {text: (D,)}
        codes = patches.codes.to(self.device)  # (M, P, D)
        evidence = torch.zeros_like(coarse)  # (Q, N)
        for query, sentence in enumerate(text.texts):
            there = (rows[query] >= 0).nonzero().squeeze(1)  # (n,)
            chosen = codes[rows[query, there].to(self.device)]  # (n, P, D)
            said = torch.stack([vectors[each] for each in looked_for(sentence)])  # (F, D)
            sight = self.look(said, vectors[NEUTRAL], chosen)
            evidence[query, there] = sight.scores().cpu()
        return Scores(coarse + self.weight * evidence, None)

    def vectors(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode all phrases of all texts at once, each a unit vector (D,)."""
        wanted = [phrase for text in texts for phrase in looked_for(text)]
        distinct = list(dict.fromkeys([NEUTRAL, *wanted]))
        encoded = self._encode(distinct).to(self.device)  # (F, D)
        return dict(zip(distinct, encoded, strict=True))

    def look(self, phrases: Tensor, neutral: Tensor, codes: Tensor) -> Sight:
        """Let phrases (F, D) attend over the patches (N, P, D) of N pictures."""
        unit = normalising_gain(codes) / codes.shape[-1] ** 0.5  # (N, P), brings norms to one
        values = codes.float()  # (N, P, D)
        cosine = torch.einsum("fd,npd->fnp", phrases, values) * unit  # (F, N, P)
        if self.scale == torch.inf:
            weights = torch.zeros_like(cosine).scatter(-1, cosine.argmax(-1, keepdim=True), 1.0)
        else:
            weights = (self.scale * cosine).softmax(dim=-1)  # (F, N, P)
        return Sight(weights, cosine - (values @ neutral) * unit)


def looked_for(text: str) -> list[str]:
    """Return the phrases of a text, and the whole."""
    return [*split_phrases(text), text]


@register("late")
def _late(argument: str, place: Place) -> Scorer:
    refuse_argument("late", argument)
    encoder = place.encoder
    if encoder.patch_kind != "aligned" or encoder.patch_dim != encoder.embed_dim:
        raise ModelError(
            "scorer 'late' needs patches aligned with text, and this index keeps other ones",
            "Index with the default patch kind, or use --no-rerank.",
        )
    from ..indexing.encoder import load_text_encoder

    text = load_text_encoder(encoder, str(place.device))
    return LateScorer(lambda texts: text.encode_texts(texts).pooled, device=place.device)
