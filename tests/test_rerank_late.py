"""The training-free scorer, and the grammar that gives it phrases."""

from __future__ import annotations

import doctest

import pytest
import torch
from mmsearch.core.errors import ModelError
from mmsearch.core.types import Grid, PatchBatch, TextFeatures
from mmsearch.indexing.encoder import load_encoder
from mmsearch.rerank import phrases
from mmsearch.rerank.late import NEUTRAL, LateScorer, looked_for
from mmsearch.rerank.phrases import split_phrases
from mmsearch.rerank.scorers import load_scorer
from torch.nn.functional import normalize


def test_doctests():
    assert doctest.testmod(phrases).failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("dog", []),
        ("a red car", []),
        ("of the and", []),
        ("a man throws a ball to the dog", ["a man throws", "a ball", "the dog"]),
        ("Red car, blue sky!", ["red car", "blue sky"]),
        ("the dog and the dog", []),
        ("l'été à la mer, une plage", ["l'été à la mer", "une plage"]),
    ],
)
def test_phrases(text, expected):
    assert split_phrases(text) == expected


AXES = {"a red ball": 0, "a blue cup": 1, "a red ball left of a blue cup": 2, NEUTRAL: 3}


def encode(texts):
    return torch.eye(5)[[AXES[text] for text in texts]]


def text_of(*texts):
    empty = torch.zeros(len(texts), 1, 5)
    mask = torch.ones(len(texts), 1, dtype=torch.bool)
    return TextFeatures(texts, empty[:, 0], empty, mask, tuple(("x",) for _ in texts))


def picture(*axes):
    codes = torch.full((1, len(axes), 5), 0.01)
    codes[0, range(len(axes)), list(axes)] = 3.0
    return codes


def test_a_picture_with_both_things_beats_one_with_one():
    patches = PatchBatch(torch.cat([picture(0, 4), picture(0, 1)]), None, Grid(1, 2))
    text = text_of("a red ball left of a blue cup")
    rows, coarse = torch.tensor([[0, 1, -1]]), torch.tensor([[0.3, 0.3, 0.2]])
    for scale in (20.0, torch.inf):
        rank = LateScorer(encode, weight=0.5, scale=scale).score(text, patches, rows, coarse).rank
        assert rank[0, 1] > rank[0, 0]
        assert rank[0, 2] == pytest.approx(0.2)


def test_contributions_add_up_and_codes_may_be_int8():
    scorer = LateScorer(encode)
    codes = torch.randint(-127, 128, (3, 4, 5), dtype=torch.int8)
    said = torch.stack([scorer.vectors(AXES)[text] for text in looked_for(list(AXES)[2])])
    sight = scorer.look(said, encode([NEUTRAL])[0], codes)
    torch.testing.assert_close(sight.contributions().sum(1), sight.scores())
    cosine = torch.einsum("fd,npd->fnp", said, normalize(codes.float(), dim=-1))
    neutral = normalize(codes.float(), dim=-1) @ encode([NEUTRAL])[0]
    torch.testing.assert_close(sight.evidence, cosine - neutral)


def test_with_a_real_encoder_scores_do_not_depend_on_the_batch(tiny_model_dir):
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")
    scorer = load_scorer("late", encoder.spec, device="cpu")
    texts = ["a red ball left of a blue cup", "dog"]
    features = encoder.encode_texts(texts)
    patches = PatchBatch(torch.randn(3, 16, encoder.spec.patch_dim), None, encoder.spec.grid)
    rows, coarse = torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.rand(2, 3)
    together = scorer.score(features, patches, rows, coarse)
    alone = scorer.score(encoder.encode_texts(texts[1:]), patches, rows[1:, 1:], coarse[1:, 1:])
    torch.testing.assert_close(alone.rank, together.rank[1:, 1:], atol=1e-5, rtol=1e-5)


def test_unaligned_patches_are_refused(tiny_model_dir):
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu", patch_kind="penultimate")
    with pytest.raises(ModelError, match="aligned"):
        load_scorer("late", encoder.spec, device="cpu")
