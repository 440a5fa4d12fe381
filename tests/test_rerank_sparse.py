"""Local and hierarchical attention choose patches; over what they chose, attention is exact."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmsearch.core.errors import UsageError
from mmsearch.core.types import Grid
from mmsearch.rerank.checkpoint import Fusion, HeadCard, save_head
from mmsearch.rerank.explain import require_attention
from mmsearch.rerank.heads import CrossHead, HeadConfig, build_head
from mmsearch.rerank.scorers import load_scorer
from mmsearch.rerank.sparse import Hierarchical, Local, _layout, _windows
from torch import nn


def make_head(grid):
    torch.manual_seed(0)
    config = HeadConfig("cross", 12, 10, grid, width=16, self_attention=True)
    head = CrossHead(config).eval()
    nn.init.normal_(head.rank.weight)
    return head


def batch(grid, candidates=3):
    tokens, mask = torch.randn(2, 5, 12), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    codes = torch.randint(-127, 128, (2, candidates, grid.size, 10), dtype=torch.int8)
    return tokens, mask, codes


@pytest.mark.parametrize("grid", [Grid(6, 6), Grid(7, 5), Grid(2, 9)])
def test_every_patch_belongs_to_one_cell(grid):
    layout = _layout(grid, 3)
    present = layout.members[layout.members >= 0]
    assert present.sort().values.tolist() == list(range(grid.size))
    for patch, members in zip(layout.looked.tolist(), layout.members.tolist(), strict=True):
        assert patch in members


def test_windows_stay_inside():
    windows = _windows(Grid(4, 4), 4, 1)  # one cell; the patch looked at is row 2, column 0
    assert _layout(Grid(4, 4), 4).looked.tolist() == [8]
    assert sorted(i for i in windows[0].tolist() if i >= 0) == [4, 5, 8, 9, 12, 13]


@pytest.mark.parametrize("grid", [Grid(6, 6), Grid(7, 5)])
@pytest.mark.parametrize("rule", [Hierarchical(cells=99), Local(cells=99, radius=3)])
def test_reading_everything_is_dense_attention(grid, rule):
    head, args = make_head(grid), batch(grid)
    dense = head.judge(*args).rank
    head.selection = rule
    torch.testing.assert_close(head.judge(*args).rank, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [Hierarchical(cells=2), Local(cells=2)])
def test_a_pair_is_judged_alone_and_padding_draws_nothing(rule):
    grid = Grid(6, 6)
    head, (tokens, mask, codes) = make_head(grid), batch(Grid(6, 6))
    head.selection = rule
    together = head.judge(tokens, mask, codes).rank
    alone = head.judge(tokens[1:, :3], mask[1:, :3], codes[1:, 2:]).rank
    torch.testing.assert_close(alone[0, 0], together[1, 2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [Hierarchical(cells=2), Local(cells=2)])
def test_texts_may_share_their_pictures(rule):
    head, (tokens, mask, codes) = make_head(Grid(6, 6)), batch(Grid(6, 6))
    head.selection = rule
    shared = head.judge(tokens, mask, codes[:1]).rank
    each = head.judge(tokens, mask, codes[:1].expand(2, -1, -1, -1)).rank
    torch.testing.assert_close(shared, each, atol=1e-5, rtol=1e-5)


def test_equal_patches_in_a_cell_lose_nothing():
    """Where a cell's patches are alike, one patch counted as many is no approximation."""
    grid = Grid(6, 6)
    head, (tokens, mask, _) = make_head(grid), batch(grid)
    with torch.no_grad():
        head.rows.zero_()
        head.columns.zero_()
    coarse = torch.randn(2, 3, 2, 1, 2, 1, 10).expand(-1, -1, -1, 3, -1, 3, -1)
    codes = coarse.reshape(2, 3, 36, 10)
    dense = head.judge(tokens, mask, codes).rank
    head.selection = Hierarchical(cells=1)
    torch.testing.assert_close(head.judge(tokens, mask, codes).rank, dense, atol=1e-5, rtol=1e-5)


def test_fewer_patches_are_read():
    grid = Grid(24, 24)
    head, (tokens, mask, codes) = make_head(grid), batch(grid)
    head.selection = Hierarchical(stride=3, cells=8)
    assert head.context(tokens, mask, codes).codes.shape[2] == 64 + 8 * 9


@pytest.fixture
def load(tmp_path):
    """Load a scorer by name, from the heads ``cross`` and ``co``."""
    grid = Grid(6, 6)
    for kind in ("cross", "co"):
        head = build_head(HeadConfig(kind, 12, 10, grid, width=16))
        save_head(tmp_path / kind, head, HeadCard(kind, "", "aligned", Fusion(1.0)))
    encoder = SimpleNamespace(weights_hash="", patch_kind="aligned", model="tiny", grid=grid)
    return lambda name: load_scorer(name, encoder, device="cpu", folder=tmp_path)


def test_a_selection_is_chosen_by_name(load, tmp_path):
    assert load("cross").head.selection is None
    for rule, selection in (("local", Local()), ("hierarchical", Hierarchical())):
        for name in ("cross", tmp_path / "cross"):
            scorer = load(f"{name}:{rule}")
            assert (scorer.name, scorer.head.selection) == (f"cross:{rule}", selection)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cross:nearby", "Say cross:local, cross:hierarchical."),
        ("co:local", "only cross heads know local, hierarchical"),
        ("coarse:local", "Say --scorer coarse."),
        ("late:local", "Say --scorer late."),
    ],
)
def test_other_ways_and_other_heads_are_refused(load, name, said):
    with pytest.raises(UsageError) as error:
        load(name)
    assert said in error.value.hint


def test_a_part_is_not_explained(load):
    require_attention(load("cross"))
    with pytest.raises(UsageError, match="a part of the patches"):
        require_attention(load("cross:local"))
