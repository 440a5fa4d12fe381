"""Start a cross head from its encoder's contrastive space, so that words look at what they name.

Half of a state's width holds the token, s, in the directions of that space that matter most; the
other half what its attention brought back, v. In the first feed-forward network
``z gelu(z) + (-z) gelu(-z) = z^2``, so with z = s_i + v_i the sum over i holds s . v, a similarity.
It is written along one direction, which the rank layer reads. The network's other units start at
random and are hardly heard; later looks at the picture and later networks add next to nothing.

Such a similarity cannot hear "left of". So every eighth number of s holds what the contrastive
space does not know of the token, and that of v where attention looked: across the picture or down
it, in turn. Places start as a ramp along the two directions that patches use least. The first
self-attention brings each word the spare numbers of the words before it and after it, so that the
squares hold products of what a neighbour said ("left") and where a word looked; later
self-attention starts at full strength, to bring together what two words saw. Without this, heads
learned colours but hardly left from right (docs/rerank.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention import normalising_gain
from .heads import CrossBlock, CrossHead

# How sharply and softly the two halves of the heads attend, what the rank term begins as, and the
# size of what is to start near nothing.
SHARP, SOFT, RANK_SCALE, FAINT = 1.5, 0.2, 8.0, 0.02
# How far the edges lie from the middle of the picture, in a patch and as attention reads it.
EDGE, EDGE_READ = 3.0, 4.0
HEARD = 2.0  # how loudly a word hears its neighbours' spare numbers
NARROWEST = 32  # a head's width, that there be a spare number across the picture and one down it


@torch.no_grad()
def align(head: CrossHead, captions: Sequence[Tensor], pooled: Tensor, patches: Tensor) -> None:
    """Set an untrained head's weights as the module says, in place of ``fit_context``.

    Args:
        head: of an even width from NARROWEST on, on the CPU; takes patches that lie in the
            encoder's contrastive space.
        captions: K captions' token states, (T_k, C_text) each.
        pooled: (K, C) their vectors in the contrastive space.
        patches: (M, P, C) of a sample of pictures.
    """
    half = head.config.width // 2
    spare = torch.arange(7, half, 8)  # of s and v, for what is no similarity
    unit = (patches.float() * normalising_gain(patches).unsqueeze(-1)).flatten(0, 1)  # (MP, C)
    mean = unit.mean(dim=0)  # (C,)
    unit -= mean  # (MP, C)
    seen = unit.T @ unit / len(unit)  # (C, C)
    normal = [nn.functional.layer_norm(each.float(), each.shape[1:]) for each in captions]
    to_space = _ridge(torch.stack([each.mean(dim=0) for each in normal]), pooled.float())
    tokens = torch.cat(normal)  # (L, C_text)
    said = (tokens - tokens.mean(dim=0)) @ to_space  # (L, C)
    spread = said.T @ said / said.pow(2).mean() / len(said) + seen  # (C, C)
    basis = torch.linalg.eigh(spread).eigenvectors[:, -half:].T  # (W/2, C), as far as C goes
    basis = nn.functional.pad(basis, (0, 0, 0, half - len(basis)))  # (W/2, C)
    basis = torch.linalg.qr(torch.randn(half, half)).Q @ basis  # (W/2, C), heads share alike
    _start_tokens(head, tokens, basis @ to_space.T, spare)
    across, down = torch.linalg.eigh(seen).eigenvectors[:, :2].T  # (C,) each, used least
    _start_places(head, mean, across, down)
    keys, values = basis.clone(), basis.clone()  # (W/2, C)
    keys[spare] = 0
    values[spare[::2]] = across * EDGE_READ / EDGE
    values[spare[1::2]] = down * EDGE_READ / EDGE
    _start_attention(head, keys, values)
    _start_words(head, spare)
    _start_similarity(head, spare)


def _start_tokens(head: CrossHead, tokens: Tensor, into: Tensor, spare: Tensor) -> None:
    """Let s be what ``into`` (W/2, C_text) makes of tokens (L, C_text), but for the spare ones."""
    half = len(into)
    into = into / (tokens @ into.T).std(dim=0).mean()  # (W/2, C_text)
    unsaid = _unsaid(tokens, into, len(spare))  # (spare, C_text)
    into[spare] = unsaid
    head.text_proj.weight.zero_()
    head.text_proj.bias.zero_()
    head.text_proj.weight[:half] = into
    head.text_proj.bias[:half] = -(tokens @ into.T).mean(dim=0)


def _unsaid(tokens: Tensor, into: Tensor, count: int) -> Tensor:
    """Return directions (count, C_text) in which tokens (L, C_text) differ most beside ``into``."""
    centred = tokens - tokens.mean(dim=0)  # (L, C_text)
    known = torch.linalg.qr(into.T).Q  # (C_text, W/2)
    rest = centred - centred @ known @ known.T  # (L, C_text)
    variance, ways = torch.linalg.eigh(rest.T @ rest / len(rest))  # (C_text,), (C_text, C_text)
    white = ways[:, -4 * count :] / variance[-4 * count :].clamp_min(1e-6).sqrt()
    mixture = torch.linalg.qr(torch.randn(white.shape[1], count)).Q  # (4 * count, count)
    chosen = (white @ mixture).T  # (count, C_text)
    return chosen / (tokens @ chosen.T).std(dim=0).unsqueeze(1).clamp_min(1e-6)  # (count, C_text)


def _start_places(head: CrossHead, mean: Tensor, across: Tensor, down: Tensor) -> None:
    """Centre the patches and add how far right and how far down each lies; (C,) each."""
    height, width = head.config.grid
    head.rows.add_(_ramp(height).unsqueeze(1) * down - mean)  # (h, C)
    head.columns.add_(_ramp(width).unsqueeze(1) * across)  # (w, C)


def _ramp(cells: int) -> Tensor:
    """Return where each of some cells lies, (cells,): from one edge to the other; one lies amid."""
    return torch.linspace(-EDGE, EDGE, cells) if cells > 1 else torch.zeros(1)


def _start_attention(head: CrossHead, keys: Tensor, values: Tensor) -> None:
    """Let the first block bring back v from where keys (W/2, C) are like s; quieten later looks."""
    half = len(keys)
    eye = torch.eye(half)
    for at, block in enumerate(head.blocks):
        assert isinstance(block, CrossBlock)
        attention = block.attention
        attention.q_proj.weight[:, :half] = torch.cat([eye * SHARP, eye * SOFT])
        attention.k_proj.weight.copy_(torch.cat([keys, keys]))
        attention.v_proj.weight.copy_(torch.cat([values, values]))
        quiet = [attention.out_proj]
        if at:
            quiet.append(block.ffn.out)
        elif block.words is not None:
            quiet.append(block.words.attention.out_proj)
        for layer in quiet:
            layer.weight.mul_(FAINT)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj, *quiet):
            layer.bias.zero_()
        if not at:
            # The mean of what sharp and soft heads brought.
            attention.out_proj.weight[half:] += 0.5 * torch.cat([eye, eye], dim=1)


def _start_words(head: CrossHead, spare: Tensor) -> None:
    """Let the spare numbers hear those of the words before and after, in turn by twos.

    So each of the two directions in the picture meets both, see ``start_of_distance_bias``.
    """
    first = head.blocks[0]
    assert isinstance(first, CrossBlock)
    if first.words is None:
        return
    attention = first.words.attention
    attention.v_proj.bias.zero_()
    for at in range(min(2, attention.heads)):  # one looks back, one ahead
        start = at * head.config.width // attention.heads
        for place, number in enumerate(spare.tolist()):
            attention.v_proj.weight[start + place] = 0
            attention.v_proj.weight[start + place, number] = 1
            if place // 2 % 2 == at:
                attention.out_proj.weight[number, start + place] = HEARD


def _start_similarity(head: CrossHead, spare: Tensor) -> None:
    """Let the first feed-forward network hold s . v, and the rank layer read all but the spare."""
    first = head.blocks[0]
    assert isinstance(first, CrossBlock)
    ffn, width, half = first.ffn, head.config.width, head.config.width // 2
    both = torch.eye(half).repeat(1, 2)  # (W/2, W)
    squares = torch.cat([both, -both])  # (W, W)
    value, gate = ffn.into.weight.mul_(2).chunk(2)  # (ratio * W, W) each; random, but not faint
    value[:width], gate[:width] = squares, squares
    ffn.into.bias.zero_()
    direction = torch.zeros(width)  # (W,)
    direction[:half] = torch.randint(0, 2, (half,)) * 2.0 - 1
    ffn.out.weight.mul_(FAINT)
    ffn.out.weight[:, :width] = direction[:, None] / width
    ffn.out.weight[:, torch.cat([spare, half + spare])] = 0
    ffn.out.bias.zero_()
    head.pool.weight.zero_()
    head.rank.weight.copy_(direction[None] * RANK_SCALE / half)


def _ridge(given: Tensor, wanted: Tensor) -> Tensor:
    """Return the matrix (A, B) that best turns what is given (K, A) into what is wanted (K, B)."""
    given, wanted = given - given.mean(dim=0), wanted - wanted.mean(dim=0)
    gram = given.T @ given  # (A, A)
    added = 1e-2 * gram.diagonal().mean().clamp_min(1e-6) * torch.eye(len(gram))  # (A, A)
    return torch.linalg.solve(gram + added, given.T @ wanted)  # (A, B)
