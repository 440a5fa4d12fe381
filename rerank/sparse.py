"""Attention to a part of the patches, for encoders that give hundreds of them.

Both ways first look at one patch in each cell of a coarser grid, with the head's own first block,
and read more only where that look was drawn to. They choose patches; the attention over what was
chosen stays exact.

    local          only windows around the strongest cells (sparse attention)
    hierarchical   the strongest cells patch by patch; each other cell through the one patch looked
                   at, standing for all of its cell
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.types import Grid
from .attention import Context, CrossAttention, normalising_gain

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Selection(ABC):
    """A rule that chooses which patches a text attends to in a picture.

    Args:
        stride: side of a coarse cell, in patches.
        cells: how many of the strongest cells are read further.
    """

    stride: int = 3
    cells: int = 8

    def choose(
        self,
        attention: CrossAttention,
        states: Tensor,
        mask: Tensor,
        codes: Tensor,
        place: Tensor,
        grid: Grid,
    ) -> Context:
        """Return the chosen patches as a context; only they are widened.

        Args:
            attention: what decides where to read on.
            states: (G, 1, T, W), what that attention would be given.
            mask: (G, T) bool, True where there is a token.
            codes: (G, N, P, C), or (1, N, P, C) for pictures that all texts share.
            place: (P, C).
            grid: how the P patches lie.
        """
        looked, members = _layout(grid, self.stride, codes.device)  # (R,), (R, stride^2)
        log_count = (members >= 0).sum(dim=1).to(states.dtype).log()  # (R,)
        everywhere = looked.expand(len(states), codes.shape[1], -1)  # (G, N, R)
        coarse = _gather(codes, everywhere, place, log_count.expand(everywhere.shape), states.dtype)
        weights = attention.weights(states, coarse)  # (G, N, H, T, R)
        drawn = (weights * mask[:, None, None, :, None]).sum(dim=(2, 3))  # (G, N, R)
        strongest = drawn.topk(min(self.cells, len(looked)), dim=-1).indices  # (G, N, F)
        return self.read_on(coarse, strongest, codes, grid)

    @abstractmethod
    def reads(self, grid: Grid) -> int:
        """Return how many patches of a picture are widened at most."""

    @abstractmethod
    def read_on(self, coarse: Context, strongest: Tensor, codes: Tensor, grid: Grid) -> Context:
        """Read further at the strongest cells (G, N, F) of the coarse look."""


@dataclass(frozen=True)
class Hierarchical(Selection):
    """All patches of the strongest cells; one patch, counted as many, for each other cell."""

    def reads(self, grid: Grid) -> int:
        """Return R + F * stride^2."""
        count = len(_layout(grid, self.stride).looked)
        return count + min(self.cells, count) * self.stride**2

    def read_on(self, coarse: Context, strongest: Tensor, codes: Tensor, grid: Grid) -> Context:
        """Return S = R + F * stride^2 patches; those seen twice are hidden once."""
        assert coarse.bias is not None
        assert coarse.cells is not None
        members = _layout(grid, self.stride, codes.device).members  # (R, stride^2)
        fine = _present(members[strongest].flatten(2), codes, coarse)  # (G, N, F * stride^2)
        hidden = coarse.bias.scatter(2, strongest, -torch.inf)  # (G, N, R)
        return Context(
            torch.cat([coarse.codes, fine.codes], dim=2),  # (G, N, S, C)
            torch.cat([coarse.gain, fine.gain], dim=2),  # (G, N, S)
            coarse.place,
            torch.cat([coarse.cells, _cells(fine)], dim=2),  # (G, N, S)
            torch.cat([hidden, _bias(fine)], dim=2),  # (G, N, S)
        )


@dataclass(frozen=True)
class Local(Selection):
    """Square windows around the strongest cells, overlaps read once.

    Args:
        radius: a window is 2 * radius + 1 patches wide.
    """

    radius: int = 2

    def reads(self, grid: Grid) -> int:
        """Return F * (2 * radius + 1)^2, or R if that is more."""
        count = len(_layout(grid, self.stride).looked)
        return max(count, min(self.cells, count) * (2 * self.radius + 1) ** 2)

    def read_on(self, coarse: Context, strongest: Tensor, codes: Tensor, grid: Grid) -> Context:
        """Return S = F * (2 * radius + 1)^2 patches; repeats and what lies outside are hidden."""
        windows = _windows(grid, self.stride, self.radius, codes.device)  # (R, width^2)
        cells = windows[strongest].flatten(2).sort(dim=-1).values  # (G, N, S)
        repeated = torch.zeros_like(cells, dtype=torch.bool)  # (G, N, S)
        repeated[..., 1:] = cells[..., 1:] == cells[..., :-1]
        return _present(cells.masked_fill(repeated, -1), codes, coarse)


SELECTIONS: dict[str, type[Selection]] = {"local": Local, "hierarchical": Hierarchical}


class _Layout(NamedTuple):
    looked: Tensor  # (R,) the patch looked at in each coarse cell
    members: Tensor  # (R, stride^2) the patches of each coarse cell, -1 where it is cut off


@functools.cache
def _layout(grid: Grid, stride: int, device: torch.device = CPU) -> _Layout:
    index = torch.arange(grid.size).view(grid)  # (h, w)
    down, right = -grid.height % stride, -grid.width % stride
    padded = torch.nn.functional.pad(index, (0, right, 0, down), value=-1)  # multiples of stride
    members = padded.unfold(0, stride, stride).unfold(1, stride, stride).flatten(2).flatten(0, 1)
    middles = [row[row >= 0][int((row >= 0).sum()) // 2] for row in members]
    return _Layout(torch.stack(middles).to(device), members.to(device))


@functools.cache
def _windows(grid: Grid, stride: int, radius: int, device: torch.device = CPU) -> Tensor:
    """The patches around each patch looked at, (R, (2 * radius + 1)^2), -1 outside the picture."""
    looked = _layout(grid, stride).looked  # (R,)
    steps = torch.arange(-radius, radius + 1)  # (width,)
    rows = (looked // grid.width)[:, None, None] + steps[:, None]  # (R, width, 1)
    columns = (looked % grid.width)[:, None, None] + steps[None, :]  # (R, 1, width)
    inside = (rows >= 0) & (rows < grid.height) & (columns >= 0) & (columns < grid.width)
    return torch.where(inside, rows * grid.width + columns, -1).flatten(1).to(device)


def _present(cells: Tensor, codes: Tensor, like: Context) -> Context:
    """Gather patches by cells (G, N, S), hiding those marked -1."""
    bias = torch.zeros_like(cells, dtype=like.codes.dtype).masked_fill(cells < 0, -torch.inf)
    return _gather(codes, cells.clamp_min(0), like.place, bias, like.codes.dtype)


def _gather(
    codes: Tensor, cells: Tensor, place: Tensor, bias: Tensor, dtype: torch.dtype
) -> Context:
    """Take patches by cells (G, N, S) from codes (G or 1, N, P, C) and widen them."""
    count, patches = codes.shape[:2].numel(), codes.shape[2]
    first = torch.arange(count, device=codes.device).view(*codes.shape[:2], 1) * patches
    rows = codes.flatten(0, 2).index_select(0, (first + cells).flatten())  # (G * N * S, C)
    chosen = rows.view(*cells.shape, -1).to(dtype)  # (G, N, S, C)
    return Context(chosen, normalising_gain(chosen), place, cells, bias)


def _cells(context: Context) -> Tensor:
    assert context.cells is not None
    return context.cells


def _bias(context: Context) -> Tensor:
    assert context.bias is not None
    return context.bias
