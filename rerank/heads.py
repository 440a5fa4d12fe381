"""The trained part of a scorer: a small network over one text's tokens and one picture's patches.

Three kinds share one interface and differ in who attends to whom:

    cross    text attends to patches; the patches stay as stored (ALBEF, BLIP)
    co       both streams attend to each other in turn (ViLBERT)
    shared   one stream of text and patches attends to itself (VisualBERT, UNITER, ViLT)
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.types import Grid
from .attention import Context, CrossAttention, attend, normalising_gain
from .sparse import Selection

REACH = 8  # words further apart than this are all equally far


@dataclass(frozen=True)
class HeadConfig:
    """The shape of a head."""

    kind: str  # "cross" | "co" | "shared"
    text_dim: int  # C_text, width of a text token
    patch_dim: int  # C, width of a patch
    grid: Grid
    width: int = 256  # W
    heads: int = 4
    depth: int = 2
    ffn_ratio: int = 2
    dropout: float = 0.0  # while training, on what each block adds
    self_attention: bool = False  # "cross": tokens attend to each other in each block, too

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "grid": list(self.grid)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadConfig:
        """Read back what ``to_dict`` gave."""
        return cls(**{**values, "grid": Grid(*values["grid"])})


class HeadOutput(NamedTuple):
    """What a head says of pairs of a text and a picture; shapes (B, ...) or (G, N, ...)."""

    rank: Tensor  # (B,) added to the scaled coarse score; zero before training, unless aligned
    match: Tensor  # (B,) logit that the text describes the picture
    token_weights: Tensor  # (B, T) share of each token in the pooling; zero on padding


class Head(nn.Module, ABC):
    """What every kind of head shares: the way in, the places of the grid, and the way out."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.finer = 1  # patches now in the place of one that it was trained on, see ``for_grid``
        self.text_norm = nn.LayerNorm(config.text_dim)
        self.text_proj = nn.Linear(config.text_dim, config.width)
        self.rows = nn.Parameter(torch.randn(config.grid.height, config.patch_dim) * 0.1)
        self.columns = nn.Parameter(torch.randn(config.grid.width, config.patch_dim) * 0.1)
        self.out_norm = nn.LayerNorm(config.width)
        self.pool = nn.Linear(config.width, 1)
        self.rank = nn.Linear(config.width, 1)
        self.match = nn.Linear(config.width, 1)
        nn.init.zeros_(self.rank.weight)  # untrained, it leaves the coarse order alone
        nn.init.zeros_(self.rank.bias)

    def forward(self, tokens: Tensor, mask: Tensor, patches: Tensor) -> HeadOutput:
        """Judge B pairs: text i with picture i.

        Args:
            tokens: (B, T, C_text), the text tower's last hidden states.
            mask: (B, T) bool, True where there is a token.
            patches: (B, P, C), stored patch features, codes or values.
        """
        output = self.judge(tokens, mask, patches.unsqueeze(1))  # (B, 1, ...)
        return HeadOutput(*(part.squeeze(1) for part in output))

    def judge(self, tokens: Tensor, mask: Tensor, patches: Tensor) -> HeadOutput:
        """Judge each of G texts with its own N candidates.

        Args:
            tokens: (G, T, C_text).
            mask: (G, T) bool.
            patches: (G, N, P, C), codes or values: only their direction counts; (1, N, P, C) for
                candidates that all texts share.

        Returns:
            rank (G, N), match (G, N), token_weights (G, N, T).
        """
        return self.read(self.states(tokens, mask, self.context(tokens, mask, patches)), mask)

    @abstractmethod
    def states(self, tokens: Tensor, mask: Tensor, context: Context) -> Tensor:
        """Return the text states after looking at the pictures, (G, N, T, W)."""

    @abstractmethod
    def context_layers(self) -> list[nn.Linear]:
        """Return the layers that read patches, for ``fit_context``."""

    def context(self, tokens: Tensor, mask: Tensor, patches: Tensor) -> Context:
        """Widen the patches (G, N, P, C), of these candidates only and once for all layers."""
        codes = patches.to(tokens.dtype)  # (G, N, P, C)
        return Context(codes, normalising_gain(codes), self.place())

    def patches_read(self) -> int:
        """Return how many patches of a picture are widened."""
        return self.config.grid.size

    def place(self) -> Tensor:
        """Return the learned vector of every grid cell, (P, C)."""
        return (self.rows.unsqueeze(1) + self.columns.unsqueeze(0)).flatten(0, 1)  # (P, C)

    def for_grid(self, grid: Grid) -> Head:
        """Return this head for pictures with finer patches: all in a cell get that cell's place.

        A picture whose finer patches are those of its coarser grid, repeated, scores as before.

        Args:
            grid: the head's own, or one with a whole number of cells in each of its cells.

        Raises:
            ModelError: the grids do not divide.
        """
        own = self.config.grid
        if grid == own:
            return self
        if not own.divides(grid):
            raise ModelError(
                f"a head of {own} patches cannot judge pictures of {grid}",
                f"The grid must be a multiple of {own}; or train a head for it: mmsearch train.",
            )
        down, across = grid.height // own.height, grid.width // own.width
        finer = copy.deepcopy(self)
        finer.config = replace(self.config, grid=grid)
        finer.finer = self.finer * down * across
        finer.rows = nn.Parameter(self.rows.detach().repeat_interleave(down, 0))  # (h, C)
        finer.columns = nn.Parameter(self.columns.detach().repeat_interleave(across, 0))  # (w, C)
        return finer

    def embed(self, tokens: Tensor) -> Tensor:
        """Bring tokens to the head's width: (G, T, C_text) -> (G, 1, T, W)."""
        return self.text_proj(self.text_norm(tokens)).unsqueeze(1)  # (G, 1, T, W)

    def read(self, states: Tensor, mask: Tensor) -> HeadOutput:
        """Pool the states (G, N, T, W) over tokens and give rank, match and the weights."""
        states = self.out_norm(states)  # (G, N, T, W)
        logits = self.pool(states).squeeze(-1)  # (G, N, T)
        weights = logits.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(dim=-1)  # (G, N, T)
        pooled = (weights.unsqueeze(2) @ states).squeeze(2)  # (G, N, W)
        return HeadOutput(self.rank(pooled).squeeze(-1), self.match(pooled).squeeze(-1), weights)

    @torch.no_grad()
    def fit_context(self, patches: Tensor) -> None:
        """Start from whitened patches: call once, before training, on a sample (M, P, C).

        Patch features of real encoders share a large mean and have channels of very different
        spread. The mean goes into the places and the spread into the weights that read patches,
        so nothing is added to the computation.
        """
        unit = patches.float() * normalising_gain(patches).unsqueeze(-1)  # (M, P, C)
        spread, mean = torch.std_mean(unit.flatten(0, 1), dim=0)  # (C,), (C,)
        self.rows -= mean
        for layer in self.context_layers():
            layer.weight /= spread.clamp_min(0.05)  # (W, C)


class GatedFeedForward(nn.Module):
    """``out(a * gelu(b))``: the product lets what was seen meet what was said."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, 2 * ratio * width)
        self.out = nn.Linear(ratio * width, width)

    def forward(self, states: Tensor) -> Tensor:
        """(..., W) -> (..., W)."""
        value, gate = self.into(states).chunk(2, dim=-1)  # (..., ratio * W) twice
        return self.out(value * nn.functional.gelu(gate))  # (..., W)


class StreamAttention(nn.Module):
    """Multi-head attention from one stream of width W to another of the same width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor, others: Tensor, bias: Tensor | None) -> Tensor:
        """Attend from (G, N, S, W) to (G, N, R, W) under a bias for (G, N, H, S, R)."""
        query, key = self._project(states, others)  # (G, N, H, S, d), (G, N, H, R, d)
        seen = attend(query, key, self._split(self.v_proj(others)), bias)  # (G, N, H, S, d)
        return self.out_proj(seen.transpose(2, 3).flatten(3))  # (G, N, S, W)

    def weights(self, states: Tensor, others: Tensor, bias: Tensor | None) -> Tensor:
        """Return where the states look: (G, N, H, S, R), rows summing to one."""
        query, key = self._project(states, others)  # (G, N, H, S, d), (G, N, H, R, d)
        logits = query @ key.transpose(3, 4)  # (G, N, H, S, R)
        return (logits if bias is None else logits + bias).softmax(dim=-1)  # (G, N, H, S, R)

    def _project(self, states: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled queries (G, N, H, S, d) and keys (G, N, H, R, d)."""
        query = self._split(self.q_proj(states))  # (G, N, H, S, d)
        return query * query.shape[-1] ** -0.5, self._split(self.k_proj(others))

    def _split(self, stream: Tensor) -> Tensor:
        """(G, N, S, W) -> (G, N, H, S, d)."""
        return stream.unflatten(3, (self.heads, -1)).transpose(2, 3)


class WordAttention(nn.Module):
    """Pre-norm self-attention among the tokens of a text, which know how far apart they are.

    A bias is learned for each head and distance (Raffel et al., arXiv 1910.10683, 2.1), so that
    "left" can tell the thing before it from the thing after it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = StreamAttention(width, heads)
        self.distance_bias = nn.Parameter(start_of_distance_bias(heads))  # (H, 2 * REACH + 1)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return what tokens (G, n, T, W) learn of each other under a mask (G, T)."""
        places = torch.arange(states.shape[2], device=states.device)  # (T,)
        distance = (places - places.unsqueeze(1)).clamp(-REACH, REACH)  # (T, T) of key from query
        by_distance = self.distance_bias[:, distance + REACH]  # (H, T, T)
        bias = hiding_bias(mask, states) + by_distance  # (G, 1, H, T, T)
        states = self.norm(states)  # (G, n, T, W)
        return self.attention(states, states, bias)  # (G, n, T, W)


class CrossBlock(nn.Module):
    """Pre-norm attention among the tokens (if asked for), to the patches, then feed-forward.

    The order is ALBEF's (arXiv 2107.07651). Before the first look at a picture the states do not
    depend on it, so the first block's self-attention is computed once a text.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.words = WordAttention(config.width, config.heads) if config.self_attention else None
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = CrossAttention(config.width, config.patch_dim, config.heads)
        self.ffn_norm = nn.LayerNorm(config.width)
        self.ffn = GatedFeedForward(config.width, config.ffn_ratio)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, mask: Tensor, context: Context) -> Tensor:
        """(G, n, T, W) under a mask (G, T) -> (G, N, T, W)."""
        states = self.mix(states, mask)  # (G, n, T, W)
        seen = self.attention(self.attention_norm(states), context)  # (G, N, T, W)
        states = states + self.dropout(seen)  # (G, N, T, W)
        return states + self.dropout(self.ffn(self.ffn_norm(states)))  # (G, N, T, W)

    def mix(self, states: Tensor, mask: Tensor) -> Tensor:
        """Let the tokens (G, n, T, W) look at each other under a mask (G, T); (G, n, T, W)."""
        if self.words is None:
            return states
        return states + self.dropout(self.words(states, mask))  # (G, n, T, W)

    def looks(self, states: Tensor, mask: Tensor, context: Context) -> Tensor:
        """Return where this block's attention looks, (G, N, H, T, P)."""
        return self.attention.weights(self.attention_norm(self.mix(states, mask)), context)


class CrossHead(Head):
    """Text attends to the patches, which are never updated and so can be stored."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.depth))
        self.selection: Selection | None = None  # attend to all patches

    def context(self, tokens: Tensor, mask: Tensor, patches: Tensor) -> Context:
        """Widen all patches, or those that the selection chooses with the first block."""
        if self.selection is None:
            return super().context(tokens, mask, patches)
        first = self.blocks[0]
        assert isinstance(first, CrossBlock)
        states = first.attention_norm(first.mix(self.embed(tokens), mask))  # (G, 1, T, W)
        return self.selection.choose(
            first.attention, states, mask, patches, self.place(), self.config.grid
        )

    def patches_read(self) -> int:
        """Return how many patches of a picture are widened: all, or what the selection reads."""
        grid = self.config.grid
        return grid.size if self.selection is None else self.selection.reads(grid)

    def states(self, tokens: Tensor, mask: Tensor, context: Context) -> Tensor:
        """Return the text states after the last block, (G, N, T, W)."""
        states = self.embed(tokens)  # (G, 1, T, W)
        for block in self.blocks:
            states = block(states, mask, context)  # (G, N, T, W)
        return states

    def context_layers(self) -> list[nn.Linear]:
        """Return the key and value projections."""
        layers = []
        for block in self.blocks:
            assert isinstance(block, CrossBlock)
            layers += [block.attention.k_proj, block.attention.v_proj]
        return layers


class StreamBlock(nn.Module):
    """Pre-norm attention from a stream to another (or itself), then a feed-forward network."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.other_norm = nn.LayerNorm(config.width)
        self.attention = StreamAttention(config.width, config.heads)
        self.ffn_norm = nn.LayerNorm(config.width)
        self.ffn = GatedFeedForward(config.width, config.ffn_ratio)
        self.dropout = nn.Dropout(config.dropout)

    def weights(self, states: Tensor, others: Tensor, bias: Tensor | None) -> Tensor:
        """Return where this block's attention looks, (G, N, H, S, R)."""
        return self.attention.weights(self.norm(states), self.other_norm(others), bias)

    def forward(self, states: Tensor, others: Tensor, bias: Tensor | None) -> Tensor:
        """(G, N, S, W) looking at (G, N, R, W) -> (G, N, S, W)."""
        seen = self.attention(self.norm(states), self.other_norm(others), bias)  # (G, N, S, W)
        states = states + self.dropout(seen)  # (G, N, S, W)
        return states + self.dropout(self.ffn(self.ffn_norm(states)))  # (G, N, S, W)


class TwoStreamHead(Head):
    """What ``co`` and ``shared`` have in common: patches become states, anew for each pair."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.image_proj = nn.Linear(config.patch_dim, config.width)

    def streams(self, tokens: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Return text states (G, N, T, W) and image states (G, N, P, W) before any block."""
        image = self.image_proj(context.values())  # (G or 1, N, P, W)
        text = self.embed(tokens).expand(-1, image.shape[1], -1, -1)  # (G, N, T, W)
        return text, image.expand(len(tokens), -1, -1, -1)

    def context_layers(self) -> list[nn.Linear]:
        """Return the image projection."""
        return [self.image_proj]


class CoHead(TwoStreamHead):
    """Patches attend to the text, then the text to the patches so informed; block after block."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.image_blocks = nn.ModuleList(StreamBlock(config) for _ in range(config.depth))
        self.text_blocks = nn.ModuleList(StreamBlock(config) for _ in range(config.depth))

    def states(self, tokens: Tensor, mask: Tensor, context: Context) -> Tensor:
        """Return the text states after the last block, (G, N, T, W)."""
        text, image = self.streams(tokens, context)  # (G, N, T, W), (G, N, P, W)
        bias = hiding_bias(mask, text)  # (G, 1, 1, 1, T)
        for look_up, look_down in zip(self.image_blocks, self.text_blocks, strict=True):
            image = look_up(image, text, bias)  # (G, N, P, W)
            text = look_down(text, image, None)  # (G, N, T, W)
        return text


class SharedHead(TwoStreamHead):
    """One stream of text and patches with shared layers, attending to itself."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(StreamBlock(config) for _ in range(config.depth))

    def states(self, tokens: Tensor, mask: Tensor, context: Context) -> Tensor:
        """Return the text states after the last block, (G, N, T, W)."""
        text, image = self.streams(tokens, context)  # (G, N, T, W), (G, N, P, W)
        bias = self.stream_bias(mask, image)  # (G, 1, 1, 1, T+P)
        stream = torch.cat([text, image], dim=2)  # (G, N, T+P, W)
        for block in self.blocks:
            stream = block(stream, stream, bias)  # (G, N, T+P, W)
        return stream[:, :, : tokens.shape[1]]  # (G, N, T, W)

    def stream_bias(self, mask: Tensor, image: Tensor) -> Tensor:
        """Hide padding (G, T), and let finer patches (G, N, P, W) together weigh as one did."""
        share = image.new_full((len(mask), image.shape[2]), -math.log(self.finer))  # (G, P)
        text = hiding_bias(mask, image)  # (G, 1, 1, 1, T)
        return torch.cat([text, share[:, None, None, None]], dim=-1)  # (G, 1, 1, 1, T+P)


def start_of_distance_bias(heads: int) -> Tensor:
    """Return (H, 2 * REACH + 1): of four heads, one looks back, one ahead and two at all alike.

    The nearer a word, the more it counts, as in ALiBi (Press et al., arXiv 2108.12409).
    """
    distance = torch.arange(-REACH, REACH + 1.0)  # (2 * REACH + 1,), of key from query
    back = torch.where(distance < 0, 1 + distance / 2, -3.0)  # (2 * REACH + 1,)
    even = torch.zeros_like(back)  # (2 * REACH + 1,)
    kinds = (back, back.flip(0), even, even)
    return torch.stack([kinds[head % 4] for head in range(heads)])  # (H, 2 * REACH + 1)


def hiding_bias(mask: Tensor, like: Tensor) -> Tensor:
    """Turn a mask (G, R), True where something is, into logits (G, 1, 1, 1, R): 0 or -inf."""
    zeros = like.new_zeros(mask.shape)  # (G, R)
    return zeros.masked_fill(~mask, -torch.inf)[:, None, None, None]  # (G, 1, 1, 1, R)


HEADS: dict[str, type[Head]] = {"cross": CrossHead, "co": CoHead, "shared": SharedHead}


def build_head(config: HeadConfig) -> Head:
    """Return an untrained head of the kind that ``config`` names.

    Raises:
        ModelError: there is no such kind.
    """
    if config.kind not in HEADS:
        raise ModelError(f"unknown kind of head {config.kind!r}", f"Known: {', '.join(HEADS)}.")
    return HEADS[config.kind](config)
