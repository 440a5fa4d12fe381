"""Reading the precomputed views."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

SHAPE = (14, 14, 120)


class Views:
    """Memory-mapped stage-4 outputs, (views, pictures, 14, 14, 120) bfloat16."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "views.json").read_text())
        self.folder = folder
        shape = (meta["views"], meta["pictures"], *SHAPE)
        self.map = np.memmap(folder / "views.u16", np.uint16, "r", shape=shape)

    def ready(self) -> int:
        """How many views every process has finished (in order)."""
        parts = len(list(self.folder.glob("done.0.*")))
        n = 0
        while parts and len(list(self.folder.glob(f"done.{n}.*"))) == parts:
            n += 1
        return n

    def get(self, view: list[int], picture: list[int]) -> torch.Tensor:
        """(B, 14, 14, 120) bfloat16."""
        return torch.from_numpy(self.map[view, picture]).view(torch.bfloat16)
