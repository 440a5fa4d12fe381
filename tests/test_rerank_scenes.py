"""Composed scenes through the whole path: bundled encoder, int8 codes, a head trained on them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from mmsearch.indexing import models
from mmsearch.indexing.encoder import load_encoder
from mmsearch.rerank.late import LateScorer
from mmsearch.rerank.scorers import load_scorer

from benchmarks.pointing import play

from .collages import make_collages
from .scenes import GROUP, SIDE, Scene, compose, draw


def test_groups_differ_only_in_who_has_what():
    scenes = compose(20, seed=0)
    assert len(scenes) == 20 * GROUP
    for at in range(0, len(scenes), GROUP):
        group = scenes[at : at + GROUP]
        assert len({each.caption for each in group}) == GROUP
        assert len({tuple(sorted(re.findall(r"\w+", each.caption))) for each in group}) == 1
        assert len({each.backdrop for each in group}) == 1
        for each in group:
            _check_what_is_said(each)
    assert {len(each.things) for each in scenes} == {2, 3}
    assert draw(scenes[0]).size == (SIDE, SIDE)
    assert (np.asarray(draw(scenes[0])) == np.asarray(draw(compose(1, seed=0)[0]))).all()


def _check_what_is_said(scene: Scene) -> None:
    """Each relation in the caption holds between the boxes, and sizes are as said."""
    middles = {str(each): (each.box[0] + each.box[2], each.box[1] + each.box[3])
               for each in scene.things}  # fmt: skip
    said = re.findall(r"(?=(a \w+ \w+ \w+),? (left of|right of|above|below) (a \w+ \w+ \w+))",
                      scene.caption)  # fmt: skip
    assert len(said) == len(scene.things) - 1
    for one, relation, other in said:
        axis = 0 if relation.endswith("of") else 1
        first = middles[one][axis] < middles[other][axis]
        assert first == (relation in ("left of", "above")), scene
    for each in scene.things:
        assert (each.box[2] - each.box[0] > SIDE / 3) == (each.size == "big")
        assert min(each.box) >= 0
        assert max(each.box) <= SIDE


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
