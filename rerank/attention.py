"""Cross-attention from text states to stored patch features: exact, in two forms.

Both forms compute ``softmax(q . k) v`` with ``k = W_k x + b_k`` and ``v = W_v x + b_v``, where a
patch is ``x = gain * code + place[cell]``: the stored code times one number a patch, plus a learned
vector a grid cell. They differ in what they multiply first.

    projected   project every patch to keys and values, then attend (the textbook form)
    absorbed    fold W_k into the query, attend to the raw codes, pool the raw codes, and apply W_v
                after pooling: nothing is ever computed for a patch that depends on the weights

Absorption is an identity, not an approximation: ``q . W_k x = (W_k^T q) . x`` and
``sum a W_v x = W_v sum a x``. ``b_k`` adds the same number to all logits of a query and drops out
of the softmax; ``b_v`` passes through it because the weights sum to one. The gain multiplies logits
and weights, so that int8 codes are only converted, never rescaled.

Shapes: G texts, each with N candidate pictures of P patches; T tokens; H heads of width d; W = H d
the width of a text state; C the width of a patch. States that do not depend on the candidate yet
have n = 1 in place of N, and whatever is computed from them is computed once a text. Likewise a
context whose N pictures are the same for all texts has 1 in place of G. The absorbed form keeps
tokens before heads: then a head's rows lie at even steps in memory, and products a head need no
copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Context:
    """What the text attends to: patch ``p`` is ``gain * code + place[cell]``."""

    codes: Tensor  # (G, N, P, C) int8 or floating point
    gain: Tensor  # (G, N, P) one factor a patch
    place: Tensor  # (cells, C) one learned vector a grid cell
    cells: Tensor | None = None  # (G, N, P) long: the cell of each patch; None: patch p is cell p
    bias: Tensor | None = None  # (G, N, P) added to the logits; -inf hides a patch

    def values(self) -> Tensor:
        """Return the patches written out, (G, N, P, C), in the precision of the places."""
        place = self.place if self.cells is None else self.place[self.cells]  # ([G, N,] P, C)
        gain = self.gain.unsqueeze(-1).to(place.dtype)  # (G, N, P, 1)
        return self.codes.to(place.dtype) * gain + place  # (G, N, P, C)


def normalising_gain(codes: Tensor) -> Tensor:
    """Return the factor that gives every patch the norm sqrt(C), (..., P) from (..., P, C).

    The scale a patch was quantised with cancels, so the codes alone are enough.
    """
    norm = torch.linalg.vector_norm(codes.float(), dim=-1)  # (..., P)
    return codes.shape[-1] ** 0.5 / norm.clamp_min(1e-6)  # (..., P)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``softmax(q . k + bias) v``, by PyTorch's fused kernels, which take four dimensions.

    Args:
        query: (G, N, H, S, d), scaled already.
        key: (G, N, H, R, d).
        value: (G, N, H, R, d).
        bias: added to the logits, of a shape that broadcasts to (G, N, H, S, R).

    Returns:
        (G, N, H, S, d)
    """
    if bias is not None:
        bias = bias.to(query.dtype).expand(*query.shape[:2], -1, -1, -1).flatten(0, 1)
    seen = functional.scaled_dot_product_attention(
        query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), attn_mask=bias, scale=1.0
    )  # (G N, H, S, d)
    return seen.unflatten(0, query.shape[:2])  # (G, N, H, S, d)


class CrossAttention(nn.Module):
    """Multi-head cross-attention, equal to ``nn.MultiheadAttention`` with the same weights.

    Args:
        width: W, width of the text states; a multiple of ``heads``.
        context_width: C, width of a patch.
        heads: H; few wide heads make absorption pay.
    """

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(context_width, width)
        self.v_proj = nn.Linear(context_width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, states: Tensor, context: Context) -> Tensor:
        """Attend by whichever form costs fewer operations at these shapes.

        Args:
            states: (G, n, T, W) with n = N, or n = 1 for states shared by a text's candidates.

        Returns:
            (G, N, T, W)
        """
        tokens, (patches, width) = states.shape[2], context.codes.shape[2:]
        texts = states.shape[0] / context.codes.shape[0]  # that share a projected picture
        cheaper = absorption_is_cheaper(tokens, patches, width, states.shape[3], self.heads, texts)
        return self.absorbed(states, context) if cheaper else self.projected(states, context)

    def projected(self, states: Tensor, context: Context) -> Tensor:
        """Project every patch to keys and values, then attend. Shapes as in ``forward``."""
        pictures = context.codes.shape[1]
        query = self._query(states).expand(-1, pictures, -1, -1, -1)  # (G, N, T, H, d)
        patches = context.values()  # (G, N, P, C), or (1, N, P, C) if all texts share them
        key, value = self._split(self.k_proj(patches)), self._split(self.v_proj(patches))
        # Texts that share their pictures ask as one, S T queries long: nothing is copied for them.
        query = query.unflatten(0, (len(patches), -1))  # (G/S, S, N, T, H, d)
        pooled = attend(
            query.permute(0, 2, 4, 1, 3, 5).flatten(3, 4),  # (G/S, N, H, S T, d)
            key.transpose(2, 3),  # (G/S, N, H, P, d)
            value.transpose(2, 3),  # (G/S, N, H, P, d)
            None if context.bias is None else context.bias[:, :, None, None],  # (G/S, N, 1, 1, P)
        )  # (G/S, N, H, S T, d)
        pooled = pooled.unflatten(3, query.shape[1:4:2])  # (G/S, N, H, S, T, d)
        return self.out_proj(pooled.permute(0, 3, 1, 4, 2, 5).flatten(0, 1).flatten(3))

    def absorbed(self, states: Tensor, context: Context) -> Tensor:
        """Attend to the raw codes and project what was pooled. Shapes as in ``forward``."""
        codes = context.codes.to(states.dtype)  # (G, N, P, C)
        weights = self._weights(self._query(states), codes, context)  # (G, N, T, H, P)
        scaled = weights * context.gain[:, :, None, None].to(weights.dtype)  # (G, N, T, H, P)
        pooled = (scaled.flatten(2, 3) @ codes).unflatten(2, (-1, self.heads))  # (G, N, T, H, C)
        matrix = self.v_proj.weight.unflatten(0, (self.heads, -1))  # (H, d, C)
        value = torch.einsum("gnthc,hdc->gnthd", pooled, matrix)  # (G, N, T, H, d)
        if context.cells is not None:  # cells' weights, that their vectors need not be copied
            cells = context.cells[:, :, None, None].expand_as(weights)  # (G, N, T, H, P)
            none = weights.new_zeros(*weights.shape[:-1], len(context.place))
            weights = none.scatter_add(4, cells, weights)  # (G, N, T, H, cells)
        place = self._split(self._place(self.v_proj, context))  # (cells, H, d)
        value = value + torch.einsum("gnthp,phd->gnthd", weights, place)  # (G, N, T, H, d)
        return self.out_proj(value.flatten(3) + self.v_proj.bias)  # (G, N, T, W)

    def weights(self, states: Tensor, context: Context) -> Tensor:
        """Return where each token looks: (G, N, H, T, P), rows summing to one."""
        codes = context.codes.to(states.dtype)  # (G, N, P, C)
        return self._weights(self._query(states), codes, context).transpose(2, 3)

    def _weights(self, query: Tensor, codes: Tensor, context: Context) -> Tensor:
        """Where the queries (G, n, T, H, d) look among the codes (G, N, P, C): (G, N, T, H, P)."""
        logits = self._logits(query, codes, context)  # (G, N, T, H, P)
        if context.bias is not None:
            bias = context.bias.to(logits.dtype)  # (G, N, P)
            logits = logits + bias[:, :, None, None]  # (G, N, T, H, P)
        return logits.softmax(dim=-1)  # (G, N, T, H, P)

    def _logits(self, query: Tensor, codes: Tensor, context: Context) -> Tensor:
        """Return the absorbed logits (G, N, T, H, P), less ``b_k``'s share, before the bias."""
        matrix = self.k_proj.weight.unflatten(0, (self.heads, -1))  # (H, d, C)
        folded = torch.einsum("gnthd,hdc->gnthc", query, matrix).flatten(2, 3)  # (G, n, T*H, C)
        if folded.shape[1] == 1:  # one product for all candidates of a text
            flat = folded.squeeze(1) @ codes.flatten(1, 2).transpose(1, 2)  # (G, T*H, N*P)
            raw = flat.unflatten(2, codes.shape[1:3]).transpose(1, 2)  # (G, N, T*H, P)
        else:
            raw = folded @ codes.transpose(2, 3)  # (G, N, T*H, P)
        raw = raw * context.gain.unsqueeze(2).to(raw.dtype)  # (G, N, T*H, P)
        raw = raw.unflatten(2, (-1, self.heads))  # (G, N, T, H, P)
        place = self._split(self._place(self.k_proj, context))  # (cells, H, d)
        placed = torch.einsum("gnthd,phd->gnthp", query, place)  # (G, n, T, H, cells)
        if context.cells is not None:
            cells = context.cells[:, :, None, None].expand_as(raw)  # (G, N, T, H, P)
            placed = placed.expand(-1, raw.shape[1], -1, -1, -1).gather(4, cells)
        return raw + placed  # (G, N, T, H, P)

    def _query(self, states: Tensor) -> Tensor:
        """Project and scale the states: (G, n, T, W) -> (G, n, T, H, d)."""
        query = self._split(self.q_proj(states))  # (G, n, T, H, d)
        return query * query.shape[-1] ** -0.5  # (G, n, T, H, d)

    def _split(self, rows: Tensor) -> Tensor:
        """Give each head its part: (..., R, W) -> (..., R, H, d)."""
        return rows.unflatten(-1, (self.heads, -1))  # (..., R, H, d)

    def _place(self, projection: nn.Linear, context: Context) -> Tensor:
        """Project the grid cells' vectors: (cells, W)."""
        return functional.linear(context.place, projection.weight)  # (cells, W)


def absorption_is_cheaper(
    tokens: int, patches: int, context: int, width: int, heads: int, texts: float = 1.0
) -> bool:
    """Compare the multiplications of the two forms for one text and one picture.

    Projected: keys and values of every patch, shared by ``texts`` texts, then attention at width W.
    Absorbed: the query folded and the pooled vectors projected, and attention at width H C.
    """
    projected = 2 * patches * context * width / texts + 2 * tokens * patches * width
    absorbed = 2 * tokens * context * width + 2 * tokens * patches * (heads * context + width)
    return absorbed < projected
