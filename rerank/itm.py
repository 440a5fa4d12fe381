"""``itm:MODEL``: a Hugging Face cross-encoder over the candidates' pixels.

The dear, strong baseline: picture and text go through the whole model together, pair by pair.
BLIP's image-text matching (arXiv 2201.12086) and ViLT's retrieval head (arXiv 2102.03334) are
known, by model name or local folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ModelError, UsageError
from .scorers import Place, Scorer, Scores, register

if TYPE_CHECKING:
    from ..core.types import PatchBatch, TextFeatures

PAIRS_AT_ONCE = 16


class ItmScorer:
    """Scores by the cross-encoder's match logit alone.

    Args:
        model: name on the Hugging Face hub, or a folder with model and processor.
        device: where to compute.

    Raises:
        ModelError: no such model, one of another kind, or weights that do not fill it.
    """

    needs_patches = False

    def __init__(self, model: str, device: torch.device) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ModelError(
                "scorer 'itm' needs transformers", "pip install 'mmsearch[transformers]'"
            ) from error
        self.name = f"itm:{Path(model).name}"
        self.device = device
        transformers.utils.logging.disable_progress_bar()  # the command line has its own
        try:
            kind = transformers.AutoConfig.from_pretrained(model).model_type
            if kind not in ("blip", "vilt"):
                raise ModelError(
                    f"{model} is a {kind} model; itm knows BLIP and ViLT for retrieval",
                    "For example --scorer itm:Salesforce/blip-itm-base-coco.",
                )
            name = "BlipForImageTextRetrieval" if kind == "blip" else "ViltForImageAndTextRetrieval"
            loaded = getattr(transformers, name).from_pretrained(model, output_loading_info=True)
            self._processor: Any = transformers.AutoProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot load {model}: {str(error).strip().splitlines()[0]}",
                "Give a model on the hub, or a folder that holds one with its processor.",
            ) from error
        network, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ModelError(
                f"{model} lacks weights for {', '.join(missing[:5])}",
                "Take a checkpoint made for image-text retrieval.",
            )
        self._blip = kind == "blip"
        self._model: Any = network.eval().to(device)

    def score(
        self, text: TextFeatures, patches: PatchBatch | None, rows: Tensor, coarse: Tensor
    ) -> Scores:
        """Refuse: this scorer looks at pictures, see ``score_pictures``."""
        raise UsageError(
            "scorer 'itm' looks at the pictures themselves, and they are not at hand here",
            "Use it with mmsearch query, or mmsearch eval CAPTIONS.",
        )

    @torch.inference_mode()
    def score_pictures(
        self, texts: Sequence[str], pictures: Sequence[np.ndarray | None], rows: Tensor
    ) -> Scores:
        """Score every pair; a picture that cannot be read gets its query's lowest score.

        Args:
            texts: Q texts.
            pictures: M pictures, each (H, W, 3) uint8, or None where it cannot be read.
            rows: (Q, N) long, the picture of each pair; -1 for none.
        """
        readable = torch.tensor([each is not None for each in pictures] + [False])  # (M + 1,)
        there = readable[rows]  # (Q, N); row -1 is the last one, which is never readable
        logits = torch.full(rows.shape, torch.nan)  # (Q, N)
        pairs = there.nonzero()  # (pairs, 2)
        for some in pairs.split(PAIRS_AT_ONCE):
            chosen = [pictures[int(rows[q, n])] for q, n in some.tolist()]
            said = [texts[int(q)] for q, _ in some.tolist()]
            logits[some[:, 0], some[:, 1]] = self._judge(said, chosen).float().cpu()
        lowest = logits.nan_to_num(torch.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
        probability = logits.sigmoid() if self._blip else None  # ViLT's logit is not calibrated
        return Scores(torch.where(there, logits, lowest), probability)

    def _judge(self, texts: Sequence[str], pictures: Sequence[Any]) -> Tensor:
        """Return the log odds of a match of B pairs, (B,)."""
        inputs = self._processor(
            images=list(pictures),
            text=list(texts),
            return_tensors="pt",
            padding=True,
            truncation=True,
        ).to(self.device)
        if self._blip:
            scores = self._model(**inputs, use_itm_head=True).itm_score  # (B, 2): no match, match
            return scores[:, 1] - scores[:, 0]  # (B,)
        return self._model(**inputs).logits[:, 0]  # (B,)


@register("itm")
def _itm(argument: str, place: Place) -> Scorer:
    if not argument:
        raise UsageError(
            "scorer 'itm' needs a model", "Say --scorer itm:MODEL, a name on the hub or a folder."
        )
    return ItmScorer(argument, place.device)
