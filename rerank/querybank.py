"""Some pictures are near to every text. A bank of captions shows which, so they can be held back.

In a shared space a few pictures (hubs) are the nearest neighbours of far more texts than they
should be. A picture's popularity is how near it is to a fixed bank of captions,

    popularity(v) = log mean_b exp(s <v, t_b>) / s

and the cosine less the popularity is, but for the scale, the log of an inverted softmax over the
bank: Smith et al., arXiv 1702.03859, for words; Bogolin et al., Cross Modal Retrieval with
Querybank Normalisation, arXiv 2112.12777, for pictures. It depends on the picture alone: never on
the other candidates.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..core.errors import ModelError
from ..core.writing import write_tensors

FILE = "querybank.safetensors"
LARGEST = 5000  # captions; more change little (docs/rerank.md)
PICTURES_AT_ONCE = 4096


class Querybank:
    """Captions to measure pictures by.

    Args:
        pooled: (B, D) text vectors of any length, or the codes of a bank; kept as int8 codes.
    """

    def __init__(self, pooled: Tensor) -> None:
        largest = pooled.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12)  # (B, 1)
        self.codes = (pooled.float() / largest * 127).round().to(torch.int8).cpu()  # (B, D)
        self._unit = functional.normalize(self.codes.float(), dim=1)  # (B, D)

    def popularity(self, pooled: Tensor, scale: float) -> Tensor:
        """Return how near pictures are to the bank, in units of cosine.

        Args:
            pooled: (M, D) float32 unit vectors of pictures.
            scale: s, what cosines are multiplied by before the exponential.

        Returns:
            (M,) float32 on the CPU.
        """
        parts = [
            torch.logsumexp(scale * (some.cpu() @ self._unit.T), dim=1)  # (m,)
            for some in pooled.split(PICTURES_AT_ONCE)
        ]
        return (torch.cat(parts) - math.log(len(self._unit))) / scale

    def save(self, folder: Path) -> None:
        """Write the bank beside a head."""
        write_tensors(folder / FILE, {"codes": self.codes})

    @classmethod
    def load(cls, folder: Path) -> Querybank:
        """Read the bank of a head.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cls(load_file(folder / FILE)["codes"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(
                f"the caption bank in {folder / FILE} cannot be read: {error}",
                "Train the head again.",
            ) from error
