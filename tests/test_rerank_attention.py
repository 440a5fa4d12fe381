"""Both forms of cross-attention are nn.MultiheadAttention; heads judge each pair alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmsearch.core.types import Grid
from mmsearch.rerank.alignment import align
from mmsearch.rerank.attention import Context, CrossAttention, normalising_gain
from mmsearch.rerank.heads import HEADS, CrossHead, HeadConfig, build_head
from torch import nn

SHAPES = {
    "texts": st.integers(1, 3),
    "candidates": st.integers(1, 4),
    "tokens": st.integers(1, 9),
    "patches": st.integers(1, 12),
    "heads": st.sampled_from([1, 2, 4]),
    "context_width": st.integers(3, 40),
    "shared": st.booleans(),
    "int8": st.booleans(),
    "seed": st.integers(0, 2**16),
}


def reference(attention: CrossAttention, states, context: Context):
    """The same weights in torch's own module, patches written out."""
    width = attention.q_proj.in_features
    values = context.values().flatten(0, 1)
    other = nn.MultiheadAttention(
        width, attention.heads, kdim=values.shape[-1], vdim=values.shape[-1], batch_first=True
    )
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        if other.in_proj_weight is None:
            for name, layer in zip("qkv", projections, strict=True):
                getattr(other, f"{name}_proj_weight").copy_(layer.weight)
        else:
            other.in_proj_weight.copy_(torch.cat([layer.weight for layer in projections]))
        other.in_proj_bias.copy_(torch.cat([layer.bias for layer in projections]))
    other.out_proj.load_state_dict(attention.out_proj.state_dict())
    wide = states.expand(-1, context.codes.shape[1], -1, -1).flatten(0, 1)
    hidden = None if context.bias is None else context.bias.flatten(0, 1) == -torch.inf
    seen, weights = other(wide, values, values, key_padding_mask=hidden, average_attn_weights=False)
    shape = context.codes.shape[:2]
    return seen.unflatten(0, shape), weights.unflatten(0, shape)


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_both_forms_equal_multihead_attention(
    texts, candidates, tokens, patches, heads, context_width, shared, int8, seed
):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    attention = CrossAttention(16, context_width, heads)
    shape = (texts, candidates, patches, context_width)
    codes = (
        torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        if int8
        else torch.randn(shape, generator=generator)
    )
    hidden = torch.rand(shape[:3], generator=generator) < 0.3
    hidden[..., 0] = False
    bias = torch.zeros(shape[:3]).masked_fill(hidden, -torch.inf)
    place = torch.randn(patches, context_width, generator=generator)
    context = Context(codes, normalising_gain(codes), place, bias=bias)
    states = torch.randn(texts, 1 if shared else candidates, tokens, 16, generator=generator)
    expected, weights = reference(attention, states, context)
    for form in (attention, attention.projected, attention.absorbed):
        torch.testing.assert_close(form(states, context), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention.weights(states, context), weights, atol=1e-5, rtol=1e-5)
    first = Context(codes[:1], context.gain[:1], place, bias=bias[:1])  # all texts share these
    expected, _ = reference(
        attention,
        states,
        Context(
            *(each.expand(texts, *each.shape[1:]) for each in (codes[:1], context.gain[:1])),
            place,
            bias=bias[:1].expand(texts, -1, -1),
        ),
    )
    for form in (attention.projected, attention.absorbed):
        torch.testing.assert_close(form(states, first), expected, atol=1e-5, rtol=1e-5)


def test_hidden_patches_get_no_weight_and_do_not_matter():
    torch.manual_seed(0)
    attention = CrossAttention(16, 8, 2)
    codes = torch.randn(1, 1, 6, 8)
    bias = torch.tensor([0, 0, 0, 0, -torch.inf, -torch.inf]).view(1, 1, 6)
    states = torch.randn(1, 1, 3, 16)
    place = torch.randn(6, 8)
    gain = torch.ones(1, 1, 6)
    full = attention(states, Context(codes, gain, place, bias=bias))
    short = attention(states, Context(codes[:, :, :4], gain[:, :, :4], place[:4]))
    torch.testing.assert_close(full, short, atol=1e-6, rtol=1e-6)


def test_chosen_cells_equal_hiding_the_rest():
    torch.manual_seed(0)
    attention = CrossAttention(16, 8, 2)
    codes = torch.randn(1, 2, 6, 8)
    gain = normalising_gain(codes)
    place = torch.randn(6, 8)
    states = torch.randn(1, 2, 3, 16)
    cells = torch.tensor([[[0, 2, 5], [1, 3, 4]]])
    picked = codes.gather(2, cells.unsqueeze(-1).expand(-1, -1, -1, 8))
    few = Context(picked, gain.gather(2, cells), place, cells=cells)
    bias = torch.full((1, 2, 6), -torch.inf).scatter(2, cells, 0.0)
    expected = attention(states, Context(codes, gain, place, bias=bias))
    for form in (attention.absorbed, attention.projected):
        torch.testing.assert_close(form(states, few), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=[*sorted(HEADS), "cross with self-attention"])
def head(request):
    torch.manual_seed(0)
    kind, _, mixing = request.param.partition(" ")
    config = HeadConfig(
        kind, text_dim=12, patch_dim=10, grid=Grid(2, 3), width=16, self_attention=bool(mixing)
    )
    head = build_head(config).eval()
    nn.init.normal_(head.rank.weight)
    return head


def test_untrained_heads_add_nothing_to_the_order():
    for kind in HEADS:
        head = build_head(HeadConfig(kind, 12, 10, Grid(2, 3), width=16)).eval()
        output = head(
            torch.randn(4, 5, 12), torch.ones(4, 5, dtype=torch.bool), torch.randn(4, 6, 10)
        )
        assert output.rank.abs().max() == 0
        assert output.match.shape == (4,)
        torch.testing.assert_close(output.token_weights.sum(1), torch.ones(4))


def test_a_score_depends_on_its_own_pair_only(head):
    tokens = torch.randn(4, 7, 12)
    mask = torch.arange(7) < torch.tensor([[7], [3], [5], [1]])
    patches = torch.randn(4, 6, 10)
    together = head(tokens, mask, patches)
    for i in range(4):
        length = int(mask[i].sum())
        alone = head(
            tokens[i : i + 1, :length], torch.ones(1, length, dtype=torch.bool), patches[i : i + 1]
        )
        torch.testing.assert_close(together.rank[i], alone.rank[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.match[i], alone.match[0], atol=1e-5, rtol=1e-5)
        assert (together.token_weights[i, length:] == 0).all()


def test_judging_many_candidates_equals_judging_pairs(head):
    tokens = torch.randn(2, 4, 12)
    mask = torch.ones(2, 4, dtype=torch.bool)
    patches = torch.randn(2, 3, 6, 10)
    many = head.judge(tokens, mask, patches)
    for n in range(3):
        pairs = head(tokens, mask, patches[:, n])
        torch.testing.assert_close(many.rank[:, n], pairs.rank, atol=1e-5, rtol=1e-5)


def test_texts_may_share_their_candidates(head):
    tokens, mask = torch.randn(4, 5, 12), torch.ones(4, 5, dtype=torch.bool)
    patches = torch.randn(1, 3, 6, 10)
    shared = head.judge(tokens, mask, patches).rank
    own = head.judge(tokens, mask, patches.expand(4, -1, -1, -1)).rank
    torch.testing.assert_close(shared, own, atol=1e-5, rtol=1e-5)


def test_only_the_direction_of_a_patch_counts(head):
    tokens, mask = torch.randn(2, 4, 12), torch.ones(2, 4, dtype=torch.bool)
    codes = torch.randint(-127, 128, (2, 6, 10), dtype=torch.int8)
    values = codes.float() * torch.rand(2, 6, 1)
    torch.testing.assert_close(
        head(tokens, mask, codes).rank, head(tokens, mask, values).rank, atol=1e-4, rtol=1e-4
    )


def test_fit_context_whitens_what_the_layers_read(head):
    torch.manual_seed(1)
    patches = torch.randn(200, 6, 10) * torch.linspace(0.2, 3, 10) + torch.linspace(-2, 2, 10)
    before = [layer.weight.clone() for layer in head.context_layers()]
    head.rows.data.zero_()
    head.columns.data.zero_()
    head.fit_context(patches)
    text = torch.zeros(200, 1, 12), torch.ones(200, 1, dtype=torch.bool)
    seen = head.context(*text, patches.unsqueeze(1)).values().flatten(0, 2)
    torch.testing.assert_close(seen.mean(0), torch.zeros(10), atol=1e-4, rtol=0)
    for layer, old in zip(head.context_layers(), before, strict=True):
        torch.testing.assert_close(layer.weight / old * seen.std(0), torch.ones_like(old))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_cpu(head):
    tokens, mask = torch.randn(2, 4, 12), torch.ones(2, 4, dtype=torch.bool)
    patches = torch.randint(-127, 128, (2, 6, 10), dtype=torch.int8)
    cpu = head(tokens, mask, patches).rank
    gpu = head.cuda()(tokens.cuda(), mask.cuda(), patches.cuda()).rank
    torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mixing", [False, True])
def test_an_aligned_head_starts_as_a_similarity(mixing):
    """Before any training, the picture that holds what the words name ranks first."""
    torch.manual_seed(0)
    things = nn.functional.normalize(torch.randn(30, 24), dim=-1)  # in the contrastive space
    to_text = torch.randn(24, 20)
    named = torch.stack([torch.randperm(30)[:3] for _ in range(200)])  # (K, 3)
    captions = [things[three] @ to_text for three in named]  # (3, C_text) each
    pooled = nn.functional.normalize(things[named].mean(1), dim=-1)
    patches = things[named].repeat(1, 2, 1) + 0.05 * torch.randn(200, 6, 24)
    config = HeadConfig("cross", 20, 24, Grid(2, 3), width=64, self_attention=mixing)
    head = CrossHead(config).eval()
    align(head, captions, pooled, patches)
    tokens, mask = torch.stack(captions[:20]), torch.ones(20, 3, dtype=torch.bool)
    rank = head.judge(tokens, mask, patches[None, :20]).rank  # (text, picture)
    first = (rank.argmax(1) == torch.arange(20)).float().mean()
    assert first > 0.8, first


def test_words_that_meet_know_their_order():
    """Without self-attention a text is a bag of tokens; with it, who comes before whom counts."""
    torch.manual_seed(0)
    tokens, mask = torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool)
    patches = torch.randn(1, 6, 10)
    swapped = tokens[:, [0, 3, 2, 1, 4]]
    for meet in (False, True):
        config = HeadConfig("cross", 12, 10, Grid(2, 3), width=16, self_attention=meet)
        head = CrossHead(config).eval()
        head.rank.weight.data.normal_()
        apart = (head(tokens, mask, patches).rank - head(swapped, mask, patches).rank).abs()
        assert (apart.item() > 1e-3) == meet, apart


def test_an_aligned_head_reads_where_it_looked():
    """Of its spare numbers, half grow with the column of what was seen, half with the row."""
    torch.manual_seed(0)
    grid, named = Grid(4, 4), nn.functional.normalize(torch.randn(24), dim=0)
    noise = torch.randn(64, 16, 24) * torch.linspace(0.05, 1, 24)  # channels of different spread
    captions = [named[None] + torch.randn(3, 24) for _ in range(64)]
    pooled = nn.functional.normalize(torch.stack([each.mean(0) for each in captions]), dim=-1)
    head = CrossHead(HeadConfig("cross", 24, 24, grid, width=128)).eval()
    align(head, captions, pooled, noise)
    seen = torch.randn(1, 1, 24).expand(1, 16, 24)  # alike everywhere: only the place differs
    context = head.context(torch.zeros(1, 1, 24), torch.ones(1, 1, dtype=torch.bool), seen[None])
    values = context.values()[0, 0]  # (P, C)
    read = head.blocks[0].attention.v_proj(values)[:, 7:64:8].unflatten(0, (4, 4))  # (h, w, spare)
    steps = {"across": read.diff(dim=1).mean((0, 1)), "down": read.diff(dim=0).mean((0, 1))}
    assert (steps["across"][::2] > 1).all() and (steps["across"][1::2].abs() < 0.2).all(), steps
    assert (steps["down"][1::2] > 1).all() and (steps["down"][::2].abs() < 0.2).all(), steps


@pytest.mark.parametrize("kind", ["cross", "cross, words meet", "co", "shared"])
def test_heads_score_in_half_precision_as_on_a_gpu(kind):
    kind, _, meet = kind.partition(", ")
    torch.manual_seed(0)
    config = HeadConfig(kind, 12, 10, Grid(2, 3), width=16, self_attention=bool(meet))
    head = build_head(config).eval()
    head.rank.weight.data.normal_()
    tokens, mask = torch.randn(2, 4, 12), torch.ones(2, 4, dtype=torch.bool)
    codes = torch.randint(-127, 128, (2, 6, 10), dtype=torch.int8)
    exact = head(tokens, mask, codes).rank
    rough = head.bfloat16()(tokens.bfloat16(), mask, codes).rank
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_a_bias_need_not_be_in_the_states_precision(form):
    torch.manual_seed(0)
    attention = CrossAttention(16, 10, 2).bfloat16()
    codes = torch.randn(1, 3, 6, 10).bfloat16()
    bias = torch.zeros(1, 3, 6)  # float32, as explaining makes it
    bias[..., 0] = -torch.inf
    context = Context(codes, normalising_gain(codes), torch.zeros(6, 10).bfloat16(), bias=bias)
    states = torch.randn(1, 1, 4, 16).bfloat16()
    seen = getattr(attention, form)(states, context)
    shown = Context(codes[:, :, 1:], context.gain[:, :, 1:], torch.zeros(5, 10).bfloat16())
    torch.testing.assert_close(seen, getattr(attention, form)(states, shown))


@pytest.mark.parametrize("grid", [Grid(1, 4), Grid(3, 1)])
def test_a_grid_of_one_row_has_no_place_down_it(grid):
    torch.manual_seed(0)
    captions = [torch.randn(3, 12) for _ in range(40)]
    pooled = nn.functional.normalize(torch.randn(40, 10), dim=-1)
    patches = torch.randn(8, grid.size, 10)
    head = build_head(HeadConfig("cross", 12, 10, grid, width=32)).eval()
    before = head.place().clone()
    align(head, captions, pooled, patches)
    moved = head.place() - before  # (cells, C): the ramp less the patches' mean
    unit = patches * normalising_gain(patches).unsqueeze(-1)
    torch.testing.assert_close(moved.mean(0), -unit.mean((0, 1)), atol=1e-4, rtol=1e-4)
