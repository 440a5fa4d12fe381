"""Attention maps, contributions, contact sheets, and questions answered by captions."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from mmsearch.cli.app import app
from mmsearch.cli.explain import open_viewer
from mmsearch.core.errors import UsageError
from mmsearch.core.types import Grid, PatchBatch, TextFeatures
from mmsearch.indexing.index import ImageIndex
from mmsearch.rerank import asking, explain
from mmsearch.rerank.asking import fill_in
from mmsearch.rerank.checkpoint import Fusion, HeadCard
from mmsearch.rerank.explain import looks, merge_pieces
from mmsearch.rerank.heads import HEADS, HeadConfig, build_head
from mmsearch.rerank.late import LateScorer
from mmsearch.rerank.querybank import Querybank
from mmsearch.rerank.scorers import CoarseScorer, HeadScorer
from mmsearch.rerank.searcher import Query, Searcher
from mmsearch.rerank.sheets import Shown, contact_sheet, heat, html_page, scales
from PIL import Image
from torch import nn
from torch.nn.functional import normalize
from typer.testing import CliRunner

from .photos import copy_photographs

GRID = Grid(3, 4)


@pytest.fixture(params=[*sorted(HEADS), "cross with self-attention"])
def scorer(request):
    torch.manual_seed(0)
    kind, _, mixing = request.param.partition(" ")
    config = HeadConfig(kind, 12, 10, GRID, width=16, self_attention=bool(mixing))
    head = build_head(config).eval()
    nn.init.normal_(head.rank.weight)
    card = HeadCard(kind, "", "", Fusion(5.0, 0.7))
    return HeadScorer(head, card, torch.device("cpu"))


@pytest.fixture
def pair():
    torch.manual_seed(1)
    words = (("[CLS]", "snow", "##board", "er", "[SEP]"),)
    mask = torch.ones(1, 5, dtype=torch.bool)
    unit = normalize(torch.randn(2, 8), dim=-1)
    text = TextFeatures(("snowboarder",), unit[:1], torch.randn(1, 5, 12), mask, words)
    return text, PatchBatch(torch.randn(1, 12, 10), None, GRID, pooled=unit[1:])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    copy_photographs(folder)
    return folder


def test_doctests():
    assert doctest.testmod(explain).failed == 0
    assert doctest.testmod(asking).failed == 0


def test_maps_are_where_words_look(scorer, pair):
    found = explain.explain(scorer, *pair)
    assert found.words == ("snowboard", "er")
    assert found.maps.shape == (2, 3, 4)
    np.testing.assert_allclose(found.maps.sum((1, 2)), 1, atol=1e-5)
    assert found.whole.sum() == pytest.approx(1, abs=1e-5)
    assert 0 <= found.peak("snowboard")[0] <= 1
    text, image = pair
    rows, coarse = torch.zeros(1, 1, dtype=torch.long), torch.tensor([[found.cosine]])
    patches = PatchBatch(image.codes, None, GRID)
    expected = scorer.score(text, patches, rows, coarse)
    assert found.score == pytest.approx(float(expected.rank), abs=1e-5)


def test_words_add_up_to_the_rank_term(scorer, pair):
    text, image = pair
    text = TextFeatures(
        text.texts, text.pooled, text.tokens, text.mask, (("a", "b", "c", "d", "e"),)
    )
    found = explain.explain(scorer, text, image)
    rank = scorer.head.judge(text.tokens, text.mask, image.codes.unsqueeze(0)).rank.detach()
    assert found.word_shares.sum() == pytest.approx(0.7 * float(rank), abs=1e-4)
    assert found.word_weights.sum() == pytest.approx(1, abs=1e-5)


def test_words_and_terms_add_up_to_the_score(scorer, pair):
    text, image = pair  # whose pieces begin and end with marks that are no words
    unit = normalize(torch.randn(6, 8), dim=-1)
    card = HeadCard("cross", "", "", Fusion(5.0, 0.7, popularity_weight=0.5))
    banked = HeadScorer(scorer.head, card, torch.device("cpu"), Querybank(unit))
    for each in (scorer, banked):
        found = explain.explain(each, text, image)
        parts = float(found.word_shares.sum()) + sum(found.terms.values())
        assert found.score == pytest.approx(parts, abs=1e-4)
    assert found.terms["popularity"] != 0
    assert found.terms["marks of the text's ends"] != 0


def test_a_text_without_words_is_refused(scorer, pair):
    text, image = pair
    empty = TextFeatures(
        ("\u200b",), text.pooled, text.tokens[:, :2], text.mask[:, :2], (("[CLS]", "[SEP]"),)
    )
    with pytest.raises(UsageError, match="no words"):
        explain.explain(scorer, empty, image)


@pytest.mark.parametrize("tiles, pool", [("1x1", "1"), ("2x2", "2")])
def test_the_score_explained_is_that_of_the_query(photos, tmp_path, tiles, pool):
    index = tmp_path / "index"
    runner = CliRunner()
    made = ["index", str(photos), "--index", str(index), "--model", "bundled"]
    assert runner.invoke(app, [*made, "--tiles", tiles, "--patch-pool", pool]).exit_code == 0
    with ImageIndex.open(index) as opened:
        searcher = Searcher(opened)
        hit = searcher.search([Query("a cup of coffee")], k=1)[0][0]
        found = searcher.show(hit.record, "a cup of coffee").explanation
        assert found.score == pytest.approx(hit.score, abs=2e-3)
    viewer = open_viewer(index, None, "cpu")
    again = viewer.show(Path(hit.record.path), "a cup of coffee").explanation
    assert again.score == pytest.approx(hit.score, abs=2e-3)


def test_a_contribution_is_what_hiding_the_patch_costs(pair):
    torch.manual_seed(0)
    head = build_head(HeadConfig("cross", 12, 10, GRID, width=16)).eval()
    nn.init.normal_(head.rank.weight)
    text, image = pair
    found = explain.explain(
        HeadScorer(head, HeadCard("cross", "", "", Fusion(1.0)), torch.device("cpu")), text, image
    )
    assert found.method == "hiding"
    context = head.context(text.tokens, text.mask, image.codes.unsqueeze(0))
    bias = torch.zeros(1, 1, 12)
    bias[..., 5] = -torch.inf
    hidden = explain.Context(context.codes, context.gain, context.place, bias=bias)
    full = head.read(head.states(text.tokens, text.mask, context), text.mask).rank
    less = head.read(head.states(text.tokens, text.mask, hidden), text.mask).rank
    assert found.contributions.flat[5] == pytest.approx((full - less).item(), abs=1e-5)


def test_gradients_take_over_where_patches_are_many(pair, monkeypatch):
    monkeypatch.setattr(explain, "HIDEABLE", 4)
    torch.manual_seed(0)
    head = build_head(HeadConfig("cross", 12, 10, GRID, width=16)).eval()
    nn.init.normal_(head.rank.weight)
    text, image = pair
    card = HeadCard("cross", "", "", Fusion(1.0))
    found = explain.explain(HeadScorer(head, card, torch.device("cpu")), text, image)
    assert found.method == "gradient"
    assert found.contributions.sum() == pytest.approx(0, abs=1e-4)  # a shared bias changes nothing


def test_a_token_that_can_only_look_at_one_patch_does():
    torch.manual_seed(0)
    for kind in HEADS:
        head = build_head(HeadConfig(kind, 12, 10, Grid(1, 1), width=16)).eval()
        mask = torch.ones(1, 3, dtype=torch.bool)
        maps = looks(head, torch.randn(1, 3, 12), mask, torch.randn(1, 2, 1, 10))
        torch.testing.assert_close(maps, torch.ones(1, 2, 3, 1))


def test_late_contributions_sum_to_the_score(pair):
    text, image = pair
    vectors = normalize(torch.randn(9, 10, generator=torch.Generator().manual_seed(2)), dim=-1)
    scorer = LateScorer(lambda texts: vectors[: len(texts)], weight=0.3)
    text = TextFeatures(("a dog on a beach",), text.pooled, text.tokens, text.mask, text.words)
    found = explain.explain(scorer, text, image)
    assert found.words == ("a dog", "a beach", "a dog on a beach")
    assert found.score == pytest.approx(found.cosine + found.contributions.sum(), abs=1e-5)
    assert found.word_shares.sum() == pytest.approx(found.contributions.sum(), abs=1e-5)


def test_the_coarse_order_has_nothing_to_show(pair):
    with pytest.raises(UsageError, match="no attention"):
        explain.explain(CoarseScorer(), *pair)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (
            ("<start_of_text>", "snow", "board</w>", "dog</w>", "<end_of_text>"),
            ("snowboard", "dog"),
        ),
        (("▁a", "▁dog", "</s>"), ("a", "dog")),
        (("[CLS]", "[SEP]"), ()),
    ],
)
def test_word_pieces_are_joined(pieces, words):
    assert merge_pieces(pieces)[0] == words


def shown(name="a.jpg", peak=0.5):
    maps = np.full((2, 3, 4), (1 - peak) / 11)
    maps[:, 1, 2] = peak
    worth = np.linspace(-1, 1, 12).reshape(3, 4)
    found = explain.Explanation(
        ("red", "car"), maps, np.array([0.3, 0.7]), np.array([0.1, 0.2]), maps[0], worth, "hiding",
        0.3, 1.2, 0.8,
    )  # fmt: skip
    return Shown(name, np.full((64, 64, 3), 128, np.uint8), found)


def test_one_scale_for_all_words_and_pictures():
    attention, worth = scales([shown(peak=0.5), shown(peak=0.9)])
    assert attention == pytest.approx(0.9 * 12)
    assert worth == 1
    assert scales([shown(peak=1 / 12)])[0] == 3.0  # a flat map looks flat
    assert (heat(np.array([0.0, 1.0])).sum(-1) == [4, 671]).all()


def test_sheet_and_page_hold_every_word():
    sheet = contact_sheet([shown(), shown("b.jpg")], "red car")
    assert sheet.size[0] > 5 * 224
    assert sheet.size[1] > 2 * 224
    page = html_page([shown("<b>.jpg")], "red & car")
    assert "red &amp; car" in page
    assert "<b>.jpg" not in page
    assert page.count("data:image/jpeg") == 5


@pytest.mark.parametrize(
    ("question", "first"),
    [
        ("What color is the car?", "red car"),
        ("which colour are the dogs", "red dogs"),
        ("How many dogs are there?", "red dogs"),
        ("Where is the cat?", "the cat red"),
        ("what is this?", "a photo of red"),
        ("what is the boy holding?", "the boy holding red"),
        ("does it rain?", "does it rain red"),
    ],
)
def test_questions_become_captions(question, first):
    assert fill_in(question, ["red", "blue"])[0] == first


@pytest.fixture
def picture(tmp_path, tiny_model_dir, monkeypatch):
    """A picture, and commands that use the tiny model."""
    from mmsearch.cli import ask
    from mmsearch.cli import explain as command
    from mmsearch.indexing.encoder import load_encoder
    from mmsearch.rerank.viewing import Viewer

    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    for module in (command, ask):
        monkeypatch.setattr(module, "open_viewer", lambda *_: Viewer(encoder))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 90, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    return tmp_path / "a.png"


def test_explain_command(picture, tmp_path):
    args = ["explain", str(picture), "a dog on a beach", "--compare", str(picture)]
    out = tmp_path / "sheet.png", tmp_path / "page.html"
    result = CliRunner().invoke(app, [*args, "--png", str(out[0]), "--html", str(out[1])])
    assert result.exit_code == 0, result.output
    assert "a beach" in result.stdout
    assert "is ahead of" in result.stdout
    with Image.open(out[0]) as sheet:
        assert sheet.size[0] > 500
    assert "a beach" in out[1].read_text()


def test_names_and_answers_are_printed_as_they_are(picture, tmp_path):
    named = tmp_path / "x [final].png"
    picture.rename(named)
    result = CliRunner().invoke(app, ["explain", str(named), "a [dog]", "--compare", str(named)])
    assert result.exit_code == 0, result.output
    assert "x [final].png  score" in result.stdout
    asked = ["ask", str(named), "what is it?", "--choices", "[/b],a dog"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "[/b]" in result.stdout
    nowhere = tmp_path / "no" / "x.png"
    result = CliRunner().invoke(app, [*asked, "--png", str(nowhere)])
    assert type(result.exception).__name__ == "StorageError"


def test_a_scorer_without_attention_is_refused_before_it_answers(tiny_model_dir):
    from mmsearch.indexing.encoder import load_encoder
    from mmsearch.rerank.viewing import Viewer

    with pytest.raises(UsageError, match="no attention"):
        Viewer(load_encoder(f"local-dir:{tiny_model_dir}", device="cpu"), "coarse")


def test_ask_command(picture):
    args = ["ask", str(picture), "what color is the car?", "--choices", "red,blue"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "red car" in result.stdout
    assert "blue car" in result.stdout
    refused = CliRunner().invoke(app, [*args[:-1], "red"])
    assert isinstance(refused.exception, UsageError)
