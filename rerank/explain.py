"""Why a picture scores as it does for a text: where each word looks, and what that was worth.

    maps            (words, h, w) where each word looks, each summing to one
    whole           (h, w)        the same, weighted as the head pools the words
    contributions   (h, w)        what each patch is worth to the score
    word_shares     (words,)      what each word adds to the score
    terms                         what else is in the score: with the words' shares, the sum is it

A patch's worth is exact where the form of the scorer allows it. The training-free scorer is a sum
over patches. For a cross head it is the change in the rank term when the patch is hidden, found by
hiding each in turn; beyond HIDEABLE patches it is gradient x attention: the derivative of the rank
term with respect to a bias on all attention logits of the patch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UsageError
from .attention import Context, normalising_gain
from .heads import CoHead, CrossBlock, CrossHead, Head, SharedHead, StreamBlock, hiding_bias
from .late import NEUTRAL, LateScorer, looked_for
from .scorers import HeadScorer, Scorer

if TYPE_CHECKING:
    from ..core.types import Grid, PatchBatch, TextFeatures

HIDEABLE = 256
SPECIAL = frozenset({"[CLS]", "[SEP]", "<start_of_text>", "<end_of_text>", "<s>", "</s>"})


@dataclass(frozen=True)
class Explanation:
    """One text and one picture; shapes as at the top of this module."""

    words: tuple[str, ...]
    maps: np.ndarray  # (words, h, w)
    word_weights: np.ndarray  # (words,) share of each in the pooling; sums to at most one
    word_shares: np.ndarray | None  # (words,) None where the scorer has no such sum
    whole: np.ndarray  # (h, w)
    contributions: np.ndarray  # (h, w)
    method: str  # how contributions were found: "sum", "hiding" or "gradient"
    cosine: float
    score: float  # the scorer's, as in a query
    probability: float | None
    terms: dict[str, float] = field(default_factory=dict)  # "cosine", "popularity", ...

    def peak(self, word: str) -> tuple[float, float]:
        """Return where a word looks most, as (x, y) shares of width and height."""
        each = self.maps[self.words.index(word)]  # (h, w)
        row, column = np.unravel_index(int(each.argmax()), each.shape)
        return (float(column) + 0.5) / each.shape[1], (float(row) + 0.5) / each.shape[0]


def explain(scorer: Scorer, text: TextFeatures, image: PatchBatch) -> Explanation:
    """Explain the score of one text (Q = 1) for one picture (M = 1), with its pooled vector.

    Raises:
        UsageError: the scorer has no attention to show, or the text no words.
    """
    require_attention(scorer)
    if not merge_pieces(text.words[0])[0]:
        raise UsageError("the text has no words to look for", "Give some words.")
    if isinstance(scorer, HeadScorer):
        return _explain_head(scorer, text, image)
    assert isinstance(scorer, LateScorer)
    return _explain_late(scorer, text, image)


def require_attention(scorer: Scorer) -> None:
    """Refuse a scorer that ``explain`` cannot look into.

    Raises:
        UsageError: the scorer has no attention to show.
    """
    if not isinstance(scorer, (HeadScorer, LateScorer)):
        raise UsageError(
            f"scorer {scorer.name!r} has no attention to show",
            "Use a trained head, or --scorer late.",
        )
    if isinstance(scorer, HeadScorer) and getattr(scorer.head, "selection", None) is not None:
        name = scorer.name.rpartition(":")[0]
        raise UsageError(
            f"scorer {scorer.name!r} reads a part of the patches only", f"Explain with {name}."
        )


def looks(head: Head, tokens: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
    """Return where tokens look, mean over heads and blocks.

    Args:
        head: of any kind.
        tokens: (G, T, C_text).
        mask: (G, T).
        patches: (G, N, P, C).

    Returns:
        (G, N, T, P), rows summing to one.
    """
    codes = patches.to(tokens.dtype)  # (G, N, P, C)
    context = Context(codes, normalising_gain(codes), head.place())
    seen: list[Tensor] = []  # of (G, N, H, T, P)
    if isinstance(head, CrossHead):
        states = head.embed(tokens)  # (G, 1, T, W)
        for block in head.blocks:
            assert isinstance(block, CrossBlock)
            seen.append(block.looks(states, mask, context))
            states = block(states, mask, context)  # (G, N, T, W)
    elif isinstance(head, CoHead):
        states, image = head.streams(tokens, context)  # (G, N, T, W), (G, N, P, W)
        bias = hiding_bias(mask, states)  # (G, 1, 1, 1, T)
        for up, down in zip(head.image_blocks, head.text_blocks, strict=True):
            assert isinstance(down, StreamBlock)
            image = up(image, states, bias)  # (G, N, P, W)
            seen.append(down.weights(states, image, None))
            states = down(states, image, None)  # (G, N, T, W)
    else:
        assert isinstance(head, SharedHead)
        states, image = head.streams(tokens, context)  # (G, N, T, W), (G, N, P, W)
        count = tokens.shape[1]
        bias = head.stream_bias(mask, image)  # (G, 1, 1, 1, T+P)
        stream = torch.cat([states, image], dim=2)  # (G, N, T+P, W)
        for block in head.blocks:
            assert isinstance(block, StreamBlock)
            weights = block.weights(stream, stream, bias)[..., :count, count:]  # (G, N, H, T, P)
            seen.append(weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-9))
            stream = block(stream, stream, bias)  # (G, N, T+P, W)
    return torch.stack(seen).mean(dim=(0, 3))  # (G, N, T, P)


def _explain_head(scorer: HeadScorer, text: TextFeatures, image: PatchBatch) -> Explanation:
    head, codes = scorer.without_repeats(image)  # codes (1, P, C)
    grid = head.config.grid
    if scorer.dtype != torch.float32:  # what a patch is worth is a small difference of scores
        head = copy.deepcopy(head).float()
    assert image.pooled is not None
    fusion = scorer.card.fusion
    length = int(text.mask[0].sum())
    parameters = next(head.parameters())
    tokens = text.tokens[:1, :length].to(parameters)  # (1, T, C_text)
    mask = torch.ones(1, length, dtype=torch.bool, device=tokens.device)  # (1, T)
    patches = codes[:1].to(parameters).clone().unsqueeze(0)  # (1, 1, P, C)
    words, groups = merge_pieces(text.words[0][:length])
    with torch.no_grad():
        maps = looks(head, tokens, mask, patches)[0, 0]  # (T, P)
        context = head.context(tokens, mask, patches)
        states = head.states(tokens, mask, context)  # (1, 1, T, W)
        weights = head.read(states, mask).token_weights[0, 0]  # (T,)
        shares = weights * head.rank(head.out_norm(states))[0, 0, :, 0]  # (T,)
        shares = fusion.weight * shares  # (T,)
    if isinstance(head, CrossHead) and patches.shape[2] <= HIDEABLE:
        worth, method = _by_hiding(head, tokens, mask, patches), "hiding"
    else:
        worth, method = _by_gradient(head, tokens, mask, patches), "gradient"
    cosine = (text.pooled[:1] @ image.pooled[:1].to(text.pooled).T).cpu()  # (1, 1)
    scores = scorer.score(text, image, torch.zeros(1, 1, dtype=torch.long), cosine)
    by_word = np.array([float(shares[each].sum()) for each in groups])  # (words,)
    return Explanation(
        words=words,
        maps=_grid(torch.stack([_mean(maps, weights, each) for each in groups]), grid),
        word_weights=np.array([float(weights[each].sum()) for each in groups]),
        word_shares=by_word,
        whole=_grid(weights @ maps, grid),
        contributions=_grid(fusion.weight * worth, grid),
        method=method,
        cosine=float(cosine),
        score=float(scores.rank),
        probability=None if scores.probability is None else float(scores.probability),
        terms={
            "cosine": fusion.scale * float(cosine),
            "popularity": -float(scorer.held_back(image.pooled)),
            "marks of the text's ends": float(shares.sum()) - float(by_word.sum()),
        },
    )


def _by_hiding(head: CrossHead, tokens: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
    """What the rank term loses when a patch is hidden, (P,)."""
    count = patches.shape[2]
    with torch.no_grad():
        base = head.context(tokens, mask, patches)
        bias = base.gain.new_zeros(1, count, count)  # (1, N = P, P)
        bias[0].fill_diagonal_(-torch.inf)
        wide = Context(
            base.codes.expand(-1, count, -1, -1),
            base.gain.expand(-1, count, -1),
            base.place,
            bias=bias if count > 1 else None,
        )
        full = head.read(head.states(tokens, mask, base), mask).rank  # (1, 1)
        without = head.read(head.states(tokens, mask, wide), mask).rank  # (1, P)
    return (full - without)[0].float().cpu()


def _by_gradient(head: Head, tokens: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
    """Gradient x attention for a cross head, gradient x input for the others, (P,)."""
    with torch.enable_grad():
        if isinstance(head, CrossHead):
            codes = patches.to(tokens.dtype)  # (1, 1, P, C)
            bias = torch.zeros(codes.shape[:3], device=codes.device, requires_grad=True)
            context = Context(codes, normalising_gain(codes), head.place(), bias=bias)
            rank = head.read(head.states(tokens, mask, context), mask).rank.sum()
            (worth,) = torch.autograd.grad(rank, bias)  # (1, 1, P)
        else:
            source = patches.clone().requires_grad_()  # (1, 1, P, C)
            codes = source * normalising_gain(source.detach()).unsqueeze(-1)  # (1, 1, P, C)
            context = Context(codes, torch.ones_like(codes[..., 0]), head.place())
            rank = head.read(head.states(tokens, mask, context), mask).rank.sum()
            (slope,) = torch.autograd.grad(rank, source)  # (1, 1, P, C)
            worth = (slope * source.detach()).sum(dim=-1)  # (1, 1, P)
    return worth[0, 0].float().cpu()


def _explain_late(scorer: LateScorer, text: TextFeatures, image: PatchBatch) -> Explanation:
    assert image.pooled is not None
    sentence = text.texts[0]
    phrases = looked_for(sentence)
    vectors = scorer.vectors([sentence])
    said = torch.stack([vectors[each] for each in phrases])  # (F, D)
    sight = scorer.look(said, vectors[NEUTRAL], image.codes[:1].to(said))
    maps = sight.weights[:, 0].cpu()  # (F, P)
    shares = (sight.weights * sight.evidence).sum(-1)[:, 0].cpu() / len(phrases)  # (F,)
    cosine = float((text.pooled[:1] @ image.pooled[:1].to(text.pooled).T).cpu())
    worth = sight.contributions()[0].cpu()  # (P,)
    return Explanation(
        words=tuple(phrases),
        maps=_grid(maps, image.grid),
        word_weights=np.full(len(phrases), 1 / len(phrases)),
        word_shares=scorer.weight * shares.numpy(),
        whole=_grid(maps.mean(dim=0), image.grid),
        contributions=_grid(scorer.weight * worth, image.grid),
        method="sum",
        cosine=cosine,
        score=cosine + scorer.weight * float(worth.sum()),
        probability=None,
        terms={"cosine": cosine},
    )


def merge_pieces(pieces: tuple[str, ...]) -> tuple[tuple[str, ...], list[list[int]]]:
    """Join word pieces to words and leave out special tokens.

    Knows BERT's ``##ing``, CLIP's ``dog</w>`` and SentencePiece's ``▁dog``.

    >>> merge_pieces(("[CLS]", "a", "snow", "##board", "[SEP]"))
    (('a', 'snowboard'), [[1], [2, 3]])
    """
    words: list[str] = []
    groups: list[list[int]] = []
    closed = True  # CLIP marks the end of a word, the others its beginning
    ends = any(piece.endswith("</w>") for piece in pieces)
    for at, piece in enumerate(pieces):
        if piece in SPECIAL:
            continue
        joins = not closed if ends else piece.startswith("##")
        closed = piece.endswith("</w>")
        plain = piece.removesuffix("</w>").removeprefix("##").removeprefix("▁")
        if joins and words:
            words[-1] += plain
            groups[-1].append(at)
        else:
            words.append(plain)
            groups.append([at])
    return tuple(words), groups


def _mean(maps: Tensor, weights: Tensor, group: list[int]) -> Tensor:
    """Mean map of a word's pieces, weighted as they are pooled: (P,)."""
    share = weights[group] / weights[group].sum().clamp_min(1e-9)  # (pieces,)
    return share @ maps[group]  # (P,)


def _grid(maps: Tensor, grid: Grid) -> np.ndarray:
    """(..., P) -> (..., h, w)."""
    return maps.detach().float().cpu().unflatten(-1, tuple(grid)).numpy()
