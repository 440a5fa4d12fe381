"""What travels between the encoder, the index and the scorers.

Letters used for shapes everywhere: N images, M distinct images, Q queries, P patches, T text
tokens, D width of the shared image-text space, C width of a patch or token feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch


class Grid(NamedTuple):
    """How the P = height x width patches of an image lie, row by row."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def size(self) -> int:
        """The number of patches, P."""
        return self.height * self.width

    def refine(self, cells: Grid) -> Grid:
        """Return the grid that has ``cells`` in place of each cell of this one."""
        return Grid(self.height * cells.height, self.width * cells.width)

    def divides(self, finer: Grid) -> bool:
        """Whether each cell of this grid holds whole cells of ``finer``, equally many."""
        return finer.height % self.height == 0 and finer.width % self.width == 0


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """One batch of encoded images."""

    pooled: torch.Tensor  # (N, D) float32, L2-normalised
    patches: torch.Tensor  # (N, P, C) float32, as the encoder gives them (not normalised)
    grid: Grid


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """A batch of encoded texts; padding is trimmed to the longest and marked in the mask."""

    texts: tuple[str, ...]
    pooled: torch.Tensor  # (Q, D) float32, L2-normalised
    tokens: torch.Tensor  # (Q, T, C_text) float32, the text tower's last hidden states
    mask: torch.Tensor  # (Q, T) bool, True where there is a token
    words: tuple[tuple[str, ...], ...]  # per query its T' <= T token strings, for attention maps


@dataclass(frozen=True, slots=True)
class PatchBatch:
    """Stored patch features of M images: ``codes * scales[..., None]`` gives the values.

    ``codes`` is int8 with one fp16 scale a patch, or floating point with ``scales`` None.
    """

    codes: torch.Tensor  # (M, P, C) int8 | float16 | float32
    scales: torch.Tensor | None  # (M, P) float16 or None
    grid: Grid
    present: torch.Tensor | None = None  # (M,) bool, False where there are none; None: all are
    pooled: torch.Tensor | None = None  # (M, D) float32, unit vectors of the same images
    alike: Grid | None = None  # cells of this coarser grid hold one vector each, repeated

    def one_per_cell(self) -> torch.Tensor:
        """Return the first patch of each cell of ``alike``, (M, cells, C)."""
        assert self.alike is not None
        down = self.grid.height // self.alike.height
        across = self.grid.width // self.alike.width
        codes = self.codes.unflatten(1, tuple(self.grid))  # (M, h, w, C)
        return codes[:, ::down, ::across].flatten(1, 2)  # (M, cells, C)

    def values(self) -> torch.Tensor:
        """Return the patches widened to float32, (M, P, C)."""
        values = self.codes.float()  # (M, P, C)
        return values if self.scales is None else values * self.scales.float().unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The coarse stage's answer, best first. Short rows are padded with id -1 and score -inf."""

    ids: np.ndarray  # (Q, N) int64
    scores: np.ndarray  # (Q, N) float32, cosine similarity


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One indexed image as the catalog knows it."""

    id: int
    path: str  # absolute; "archive.tar!member" for a picture inside a tar
    size: int  # bytes
    mtime_ns: int
    width: int  # pixels of the original, after EXIF orientation
    height: int
