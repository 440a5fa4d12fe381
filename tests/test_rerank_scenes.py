"""Composed scenes through the whole path: bundled encoder, int8 codes, a head trained on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mmsearch.indexing import models
from mmsearch.indexing.encoder import load_encoder
from mmsearch.rerank.explain import explain
from mmsearch.rerank.late import LateScorer

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


def test_pointing_game(encoder):
    """The peak of a word's map falls into the named thing's box more often than chance."""
    text = encoder._text
    scorer = LateScorer(lambda texts: text.encode_texts(texts).pooled)
    scenes = compose(15, seed=3)[::4]
    pixels = np.stack([np.asarray(draw(each)) for each in scenes])
    images = encoder.encode_images(pixels)
    inside, chance = [], []
    for row, scene in enumerate(scenes):
        image = replace(
            images, pooled=images.pooled[row : row + 1], patches=images.patches[row : row + 1]
        )
        for thing in scene.things:
            said = f"a {thing.colour} {thing.name}"
            found = explain(scorer, encoder.encode_texts([said]), image)
            x, y = (part * SIDE for part in found.peak(said))
            left, top, right, bottom = thing.box
            inside.append(left <= x <= right and top <= y <= bottom)
            chance.append((right - left) * (bottom - top) / SIDE**2)
    assert np.mean(inside) > 2 * np.mean(chance), (np.mean(inside), np.mean(chance))
    assert torch.is_grad_enabled()
