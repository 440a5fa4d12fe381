"""Composed scenes through the whole path: bundled encoder, int8 codes, a head trained on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmsearch.indexing import models
from mmsearch.indexing.encoder import load_encoder
from mmsearch.rerank.late import LateScorer
from mmsearch.rerank.scorers import load_scorer

from benchmarks.pointing import play

from .collages import make_collages
from .scenes import SIDE, compose, draw


def test_groups_differ_only_in_who_has_what():
    scenes = compose(20, seed=0)
    assert len(scenes) == 80
    for at in range(0, 80, 4):
        group = scenes[at : at + 4]
        assert len({each.caption for each in group}) == 4
        words = {tuple(sorted(set(each.caption.split()) - {"left", "right", "above", "below"}))
                 for each in group}  # fmt: skip
        assert len(words) == 1
        assert len({each.backdrop for each in group}) == 1
    assert draw(scenes[0]).size == (SIDE, SIDE)
    assert (np.asarray(draw(scenes[0])) == np.asarray(draw(compose(1, seed=0)[0]))).all()


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(models.BUNDLED, device="cpu")


@pytest.mark.parametrize("name", ["late", "cross"])
def test_pointing_game(encoder, name):
    """The peak of a word's map falls into the named thing's box, far more often than chance.

    benchmarks/pointing.py measures about 50% and more, with chance at 17 and the other box at 7.
    """
    if name == "late":
        scorer = LateScorer(lambda texts: encoder.encode_texts(texts).pooled)
    else:
        scorer = load_scorer(name, encoder.spec, device="cpu")
    found = play(encoder, scorer, make_collages(24, seed=3), by="map")
    assert found["named"] > 2 * found["chance"], found
    assert found["named"] > 2.5 * found["other"], found
    assert torch.is_grad_enabled()
