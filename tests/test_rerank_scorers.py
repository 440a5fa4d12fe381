"""Scorers behind one protocol; reranking permutes and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmsearch.core.errors import ModelError, UsageError
from mmsearch.core.types import Candidates, Grid, PatchBatch, TextFeatures
from mmsearch.evaluation.rescoring import score_images, score_texts
from mmsearch.rerank import rerank as reranking
from mmsearch.rerank import scorers
from mmsearch.rerank.checkpoint import Calibration, Fusion, HeadCard, load_head, save_head
from mmsearch.rerank.heads import HeadConfig, build_head
from mmsearch.rerank.querybank import Querybank
from mmsearch.rerank.rerank import rerank
from mmsearch.rerank.scorers import (
    CoarseScorer,
    HeadScorer,
    Scores,
    default_scorer_name,
    list_scorers,
    load_scorer,
)
from torch import nn

GRID = Grid(2, 3)
ENCODER = SimpleNamespace(
    weights_hash="a" * 64, patch_kind="aligned", grid=GRID, model="tiny", pretrained=None
)
OTHER = SimpleNamespace(**{**vars(ENCODER), "weights_hash": "b" * 64})


def make_head(kind="cross"):
    torch.manual_seed(0)
    head = build_head(HeadConfig(kind, 12, 10, GRID, width=16)).eval()
    nn.init.normal_(head.rank.weight)
    return head


def make_card(name="cross", **changes):
    values = {
        "name": name,
        "encoder_weights_hash": "a" * 64,
        "patch_kind": "aligned",
        "fusion": Fusion(scale=10.0, weight=0.5, offset=0.25),
        "calibration": Calibration(2.0, -1.0),
        "figures": {"r1": 25.0},
    }
    return HeadCard(**{**values, **changes})


def make_text(queries=3, longest=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (queries,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.randn(queries, mask.shape[1], 12, generator=generator)
    pooled = nn.functional.normalize(torch.randn(queries, 4, generator=generator), dim=-1)
    words = tuple(tuple("w" * (i + 1) for i in range(n)) for n in lengths.tolist())
    return TextFeatures(tuple("t" for _ in range(queries)), pooled, tokens, mask, words)


def make_patches(images=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (images, 6, 10), generator=generator, dtype=torch.int8)
    return PatchBatch(codes, torch.rand(images, 6, generator=generator).half() + 0.1, GRID)


@pytest.fixture
def heads(tmp_path, monkeypatch):
    """An index's heads folder with one head in it, and nothing shipped."""
    monkeypatch.setattr(scorers, "SHIPPED", tmp_path / "shipped")
    save_head(tmp_path / "heads" / "cross", make_head(), make_card())
    return tmp_path / "heads"


def test_a_head_survives_the_disk(tmp_path):
    head, card = make_head("co"), make_card("mine")
    save_head(tmp_path / "mine", head, card)
    again, same, bank = load_head(tmp_path / "mine")
    assert bank is None
    assert same == card
    assert again.config == head.config
    args = torch.randn(2, 3, 12), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 6, 10)
    assert torch.equal(again(*args).rank, head(*args).rank)


@pytest.mark.parametrize(
    "harm", ["config gone", "not json", "newer", "weights gone", "other shape"]
)
def test_a_damaged_head_is_an_error_with_a_way_out(tmp_path, harm):
    save_head(tmp_path, make_head(), make_card())
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    if harm == "config gone":
        config.unlink()
    elif harm == "not json":
        config.write_text("{")
    elif harm == "newer":
        config.write_text(json.dumps({**values, "format": 99}))
    elif harm == "weights gone":
        (tmp_path / "head.safetensors").unlink()
    else:
        config.write_text(json.dumps({**values, "head": {**values["head"], "width": 32}}))
    with pytest.raises(ModelError) as caught:
        load_head(tmp_path)
    assert caught.value.hint


def test_names_resolve(heads):
    assert load_scorer("coarse", ENCODER, device="cpu").name == "coarse"
    assert load_scorer("cross", ENCODER, device="cpu", folder=heads).name == "cross"
    assert load_scorer(str(heads / "cross"), ENCODER, device="cpu").name == "cross"
    assert default_scorer_name(ENCODER, heads) == "cross"
    assert default_scorer_name(OTHER, heads) == "coarse"
    assert default_scorer_name(ENCODER) == "coarse"
    assert {info.name for info in list_scorers(ENCODER, heads)} >= {"coarse", "late", "cross"}


def test_a_head_of_another_encoder_is_refused(heads):
    with pytest.raises(ModelError, match="another encoder"):
        load_scorer("cross", OTHER, device="cpu", folder=heads)


def test_unknown_names_list_the_known_ones(heads):
    with pytest.raises(UsageError) as caught:
        load_scorer("crss", ENCODER, device="cpu", folder=heads)
    assert "cross" in caught.value.hint
    with pytest.raises(ModelError):
        load_scorer("no/such/folder", ENCODER, device="cpu")


def test_a_folder_that_holds_no_head_hides_no_scorer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coarse").mkdir()
    assert load_scorer("coarse", ENCODER, device="cpu").name == "coarse"
    save_head(tmp_path / "coarse", make_head(), make_card("mine"))
    assert load_scorer("coarse", ENCODER, device="cpu").name == "mine"


def test_a_damaged_head_hides_no_other(heads):
    save_head(heads / "fine", make_head(), make_card("fine"))
    (heads / "cross" / "config.json").write_text("{")
    names = {info.name for info in list_scorers(ENCODER, heads)}
    assert "fine" in names and "cross" not in names
    assert default_scorer_name(ENCODER, heads) == "coarse"
    with pytest.raises(UsageError, match="unknown scorer 'crss'"):
        load_scorer("crss", ENCODER, device="cpu", folder=heads)
    with pytest.raises(ModelError, match="no readable head"):
        load_scorer("cross", ENCODER, device="cpu", folder=heads)


def test_cells_of_one_vector_are_judged_once(monkeypatch):
    """As pooled patches come back: the scores are those of all patches, the work is not."""
    finer = GRID.refine(Grid(2, 2))
    codes = make_patches().codes.unflatten(1, tuple(GRID))  # (M, h, w, C)
    codes = codes.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)  # (M, P, C)
    scorer = HeadScorer(make_head(), make_card(), torch.device("cpu"), grid=finer)
    text, rows, coarse = make_text(), torch.tensor([[0, 1], [3, -1], [2, 0]]), torch.rand(3, 2)
    expected = scorer.score(text, PatchBatch(codes, None, finer), rows, coarse)
    alike = PatchBatch(codes, None, finer, alike=GRID)
    assert torch.equal(alike.one_per_cell(), make_patches().codes)
    monkeypatch.setattr(scorer, "head", None)
    found = scorer.score(text, alike, rows, coarse)
    torch.testing.assert_close(found.rank, expected.rank, atol=1e-5, rtol=1e-5)


def test_a_head_of_the_finer_grid_reads_all_patches_of_alike_cells():
    scorer = HeadScorer(make_head(), make_card(), torch.device("cpu"))
    text, rows, coarse = make_text(), torch.zeros(3, 1, dtype=torch.long), torch.rand(3, 1)
    codes = make_patches().codes
    expected = scorer.score(text, PatchBatch(codes, None, GRID), rows, coarse)
    found = scorer.score(text, PatchBatch(codes, None, GRID, alike=Grid(1, 1)), rows, coarse)
    assert torch.equal(found.rank, expected.rank)


def test_scores_do_not_depend_on_the_batch():
    scorer = HeadScorer(make_head(), make_card(), torch.device("cpu"))
    text, patches = make_text(), make_patches()
    rows = torch.tensor([[0, 1, 2, 3], [3, 2, -1, 0], [1, -1, -1, -1]])
    coarse = torch.rand(3, 4)
    coarse[2, 3] = -torch.inf
    together = scorer.score(text, patches, rows, coarse)
    for q in range(3):
        length = int(text.mask[q].sum())
        one = TextFeatures(
            text.texts[q : q + 1],
            text.pooled[q : q + 1],
            text.tokens[q : q + 1, :length],
            text.mask[q : q + 1, :length],
            text.words[q : q + 1],
        )
        for n in range(4):
            part = slice(n, n + 1)
            alone = scorer.score(one, patches, rows[q : q + 1, part], coarse[q : q + 1, part])
            torch.testing.assert_close(alone.rank[0, 0], together.rank[q, n], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                alone.probability[0, 0],
                together.probability[q, n],
                atol=1e-4,
                rtol=1e-4,
                equal_nan=True,
            )


def test_missing_patches_keep_their_coarse_score_on_the_same_scale():
    scorer = HeadScorer(make_head(), make_card(), torch.device("cpu"))
    coarse = torch.tensor([[0.5, 0.4]])
    scores = scorer.score(make_text(1), make_patches(), torch.tensor([[0, -1]]), coarse)
    assert scores.rank[0, 1].item() == pytest.approx(10 * 0.4 + 0.25)
    assert scores.probability[0, 1].isnan()
    assert 0 <= scores.probability[0, 0] <= 1


def test_popularity_is_the_log_of_a_mean_over_the_bank():
    texts, pictures = torch.randn(7, 4), nn.functional.normalize(torch.randn(3, 4), dim=1)
    unit = nn.functional.normalize(texts, dim=1)
    expected = (20.0 * pictures @ unit.T).exp().mean(1).log() / 20.0
    found = Querybank(texts).popularity(pictures, 20.0)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)  # int8 codes


def test_a_popular_picture_is_held_back_whatever_stands_beside_it(tmp_path):
    fusion = Fusion(10.0, 0.5, popularity_weight=0.75, offset=-1.0)
    save_head(tmp_path, make_head(), make_card(fusion=fusion), Querybank(torch.randn(9, 4)))
    head, card, bank = load_head(tmp_path)
    assert bank is not None
    pooled = nn.functional.normalize(torch.randn(4, 4), dim=1)
    patches, coarse = replace(make_patches(), pooled=pooled), torch.rand(3, 4)
    rows = torch.tensor([[0, 1, 2, 3], [3, 2, -1, 0], [1, 0, -1, 2]])
    banked = HeadScorer(head, card, torch.device("cpu"), bank)
    without = HeadScorer(head, make_card(), torch.device("cpu"))
    ours = banked.score(make_text(), patches, rows, coarse).rank
    plain = without.score(make_text(), patches, rows, coarse).rank
    held_back = 7.5 * bank.popularity(pooled, 10.0)[rows.clamp_min(0)]
    there = rows >= 0
    torch.testing.assert_close((plain - ours)[there], held_back[there], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[~there], 10.0 * coarse[~there] - 1.0)


def test_a_bank_that_is_gone_is_an_error_with_a_way_out(tmp_path):
    card = make_card(fusion=Fusion(10.0, 0.5, popularity_weight=0.5))
    save_head(tmp_path, make_head(), card, Querybank(torch.randn(9, 4)))
    (tmp_path / "querybank.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        load_head(tmp_path)
    assert caught.value.hint


def test_many_candidates_are_judged_in_pieces(monkeypatch):
    scorer = HeadScorer(make_head(), make_card(), torch.device("cpu"))
    text, patches = make_text(), make_patches()
    rows, coarse = torch.randint(0, 4, (3, 11)), torch.rand(3, 11)
    whole = scorer.score(text, patches, rows, coarse)
    monkeypatch.setattr(scorers, "VALUES_AT_ONCE", {"cpu": 4 * 60})
    pieces = scorer.score(text, patches, rows, coarse)
    torch.testing.assert_close(whole.rank, pieces.rank, atol=1e-4, rtol=1e-4)


class Given:
    """A scorer that gives each picture the score written down for it."""

    name = "given"
    needs_patches = True

    def __init__(self, scores):
        self.scores = scores

    def score(self, text, patches, rows, coarse):
        values = torch.tensor(self.scores, dtype=torch.float32)[patches.codes[:, 0, 0].long()]
        return Scores(values[rows.clamp_min(0)], torch.rand(rows.shape))


def fetch(ids):
    codes = torch.tensor(ids).view(-1, 1, 1)
    return PatchBatch(codes, None, Grid(1, 1))


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 5),
    n=st.integers(1, 9),
    levels=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_reranking_permutes_and_nothing_else(queries, n, levels, seed):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(20)[:n] for _ in range(queries)]).astype(np.int64)
    scores = -np.sort(-rng.random((queries, n)).astype(np.float32).round(1), axis=1)
    keep = rng.integers(0, n + 1, queries)
    padding = np.arange(n) >= keep[:, None]
    ids[padding], scores[padding] = -1, -np.inf
    given_scores = rng.integers(0, levels, 20).astype(float)
    text = make_text(queries)
    result = rerank(Given(given_scores), text, Candidates(ids, scores), fetch)
    again = rerank(Given(given_scores), text, Candidates(ids[:, ::-1], scores[:, ::-1]), fetch)
    assert (np.sort(result.ids, axis=1) == np.sort(ids, axis=1)).all()
    assert (result.ids == again.ids).all()
    for q in range(queries):
        assert (result.ids[q, keep[q] :] == -1).all()
        found = result.ids[q, : keep[q]]
        key = [(-given_scores[i], -scores[q][list(ids[q]).index(i)], i) for i in found]
        assert key == sorted(key)
        for at, i in enumerate(found):
            assert result.coarse[q, at] == scores[q][list(ids[q]).index(i)]


def test_coarse_is_the_identity_and_reads_no_patches():
    ids = np.array([[4, 2, 9], [1, -1, -1]])
    scores = np.array([[0.9, 0.5, 0.1], [0.3, -np.inf, -np.inf]], dtype=np.float32)

    def refuse(ids):
        raise AssertionError("the coarse scorer needs no patches")

    result = rerank(CoarseScorer(), make_text(2), Candidates(ids, scores), refuse)
    assert (result.ids == ids).all()
    assert (result.scores == scores).all()
    assert (result.coarse_rank[0] == [0, 1, 2]).all()
    assert result.probability is None


def test_no_queries_and_no_candidates_are_no_trouble():
    text = make_text(2)
    nothing = Candidates(np.zeros((2, 0), np.int64), np.zeros((2, 0), np.float32))
    assert rerank(Given([0.0]), text, nothing, fetch).ids.shape == (2, 0)
    empty = Candidates(np.full((2, 3), -1), np.full((2, 3), -np.inf, np.float32))
    assert (rerank(Given([0.0]), text, empty, fetch).ids == -1).all()


def test_a_nan_is_an_error_never_an_order():
    candidates = Candidates(np.array([[0]]), np.array([[0.5]], np.float32))
    with pytest.raises(ModelError, match="not a number"):
        rerank(Given([float("nan")]), make_text(1), candidates, fetch)


def test_a_block_without_candidates_has_probabilities_of_its_own_shape(monkeypatch):
    monkeypatch.setattr(reranking, "PAIRS_AT_ONCE", 6)  # two queries a block
    ids = np.array([[-1, -1, -1]] * 2 + [[1, 0, -1], [2, -1, -1]])
    scores = np.where(ids < 0, -np.inf, 0.5).astype(np.float32)
    result = rerank(Given([1.0, 2.0, 3.0]), make_text(4), Candidates(ids, scores), fetch)
    assert result.probability is not None
    assert result.probability.shape == result.ids.shape
    assert np.isnan(result.probability[:2]).all()
    assert not np.isnan(result.probability[2:][result.ids[2:] >= 0]).any()


class Counting(Given):
    """Notes how many pairs it is asked about at once."""

    def __init__(self, scores):
        super().__init__(scores)
        self.pairs = []

    def score(self, text, patches, rows, coarse):
        assert len(text.texts) == len(rows)
        self.pairs.append(rows.numel())
        return super().score(text, patches, rows, coarse)


@pytest.mark.parametrize(("n", "pairs"), [(2, [10, 4]), (5, [10, 10, 10, 5]), (11, [11] * 7)])
def test_pairs_held_together_are_bounded_however_many_candidates(monkeypatch, n, pairs):
    monkeypatch.setattr(reranking, "PAIRS_AT_ONCE", 10)
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(20)[:n] for _ in range(7)])
    coarse = np.zeros(ids.shape, np.float32)
    scorer = Counting(np.arange(20.0))
    result = rerank(scorer, make_text(7), Candidates(ids, coarse), fetch)
    assert scorer.pairs == pairs
    assert (result.ids == -np.sort(-ids, axis=1)).all()

    scorer = Counting(np.arange(20.0))
    texts = SimpleNamespace(take=lambda rows: make_text(len(rows)))
    gallery = SimpleNamespace(fetch=fetch, pictures=None)
    scores = score_images(
        scorer, texts, np.arange(7), SimpleNamespace(order=ids, scores=coarse), n, gallery
    )
    assert scorer.pairs == pairs
    assert (scores == ids).all()


def test_texts_wanted_by_many_pictures_are_asked_in_bounded_blocks(monkeypatch):
    monkeypatch.setattr(reranking, "PAIRS_AT_ONCE", 12)
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(9)[:4] for _ in range(15)])  # of 9 texts, 4 a picture
    order[:, 0] = 0  # this one is wanted by all 15
    order[:, 1:] = np.where(order[:, 1:] == 0, 8, order[:, 1:])
    coarse = SimpleNamespace(order=order, scores=np.zeros(order.shape, np.float32))
    scorer = Counting(np.arange(15.0))
    texts = SimpleNamespace(take=lambda rows: make_text(len(rows)))
    gallery = SimpleNamespace(fetch=fetch, pictures=None)
    scores = score_texts(scorer, texts, np.arange(15), coarse, 4, gallery)
    assert (scores == np.arange(15)[:, None]).all()
    assert max(scorer.pairs) == 15  # one text alone; all others within the bound
    assert sorted(scorer.pairs)[-2] <= 12
