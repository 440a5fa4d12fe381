"""Training: wrong captions, honest fitting, a head that learns, resuming, the command."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmsearch.core.errors import InputError, ModelError
from mmsearch.core.types import Grid, PatchBatch, TextFeatures
from mmsearch.rerank.checkpoint import load_head
from mmsearch.rerank.dataset import Captioned, build_training_set
from mmsearch.rerank.fitting import Judged, calibrate, fit_fusion, paired_p
from mmsearch.rerank.negatives import wrong_captions
from mmsearch.rerank.outcome import install, plot_history, write_card
from mmsearch.rerank.train import EpochDone, StepDone, TrainOptions, train_head
from torch.nn.functional import normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red ball left of a blue cup", "a blue ball left of a red cup"),
        ("a red ball left of a blue cup", "a red ball right of a blue cup"),
        ("a red ball left of a blue cup", "a red cup left of a blue ball"),
        ("a man on a horse", "a woman on a horse"),
    ],
)
def test_wrong_captions_break_one_rule(text, expected):
    assert expected in wrong_captions(text, random.Random(0))


def test_no_rule_no_wrong_caption_and_never_the_caption_itself():
    assert wrong_captions("sunset", random.Random(0)) == []
    assert "a cat and a dog" not in wrong_captions("a dog and a cat", random.Random(0))
    for text in ("a red red ball", "two dogs, two cats.", "!", ""):
        assert text not in wrong_captions(text, random.Random(0))


def judged(strength, queries=400, n=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    relevant = torch.zeros(queries, n, dtype=torch.bool)
    relevant[torch.arange(queries), torch.randint(n, (queries,), generator=generator)] = True
    coarse = 0.1 * (torch.randn(queries, n, generator=generator) + relevant)
    rank = torch.randn(queries, n, generator=generator) + strength * relevant
    nobody = torch.zeros_like(coarse)
    return Judged(10.0, coarse, nobody, rank, 2 * rank - 3, relevant, np.arange(queries) // 2)


def test_a_useful_term_gets_weight_and_a_useless_one_little():
    useful, useless = fit_fusion(judged(2.0)), fit_fusion(judged(0.0))
    assert useful.weight > 0.5 > useless.weight
    assert useful.hits[:, 0].mean() > useful.coarse_hits[:, 0].mean() + 0.1
    assert useless.hits[:, 0].mean() < useless.coarse_hits[:, 0].mean() + 0.02
    picture = judged(2.0).picture
    assert paired_p(useful.hits[:, 0], useful.coarse_hits[:, 0], picture, 0) < 0.001
    assert paired_p(useful.hits[:, 0], useful.hits[:, 0], picture, 0) == 1.0


def test_popularity_gets_weight_where_hubs_mislead():
    plain = judged(0.0)
    generator = torch.Generator().manual_seed(1)
    popularity = 0.4 * torch.rand(plain.coarse.shape, generator=generator)
    misled = plain._replace(coarse=plain.coarse + popularity, popularity=popularity)
    fit = fit_fusion(misled)
    assert fit.popularity_weight >= 0.75
    assert fit.bank_hits[:, 0].mean() > fit.coarse_hits[:, 0].mean() + 0.03
    assert fit_fusion(plain).popularity_weight == 0.0


def test_calibrated_probabilities_mean_what_they_say():
    data = judged(2.0, queries=2000)
    score = 10 * data.coarse + data.rank
    fit = calibrate(data, score)
    share = float(data.relevant.float().mean())
    logit = fit.slope * score + fit.bias
    p = (logit + math.log(share / (1 - share))).sigmoid()  # back from even odds to those here
    assert float(p.mean()) == pytest.approx(share, abs=0.005)
    sure = p > 0.5
    assert float(data.relevant[sure].float().mean()) == pytest.approx(
        float(p[sure].mean()), abs=0.06
    )
    assert fit.slope > 0  # a better score is never less probable


COLOURS = ["red", "green", "blue", "white"]
THINGS = ["ball", "cup", "dog", "car"]
SPEC = SimpleNamespace(
    weights_hash="a" * 64, patch_kind="penultimate", embed_dim=4, patch_dim=16, text_dim=16,
    grid=Grid(2, 2),
)  # fmt: skip


class Words:
    """A text encoder whose tokens are one axis a word and whose pooled vector knows the thing."""

    def encode_texts(self, texts):
        axis = {word: at for at, word in enumerate([*COLOURS, *THINGS])}
        tokens = torch.zeros(len(texts), 2, 16)
        mask = torch.ones(len(texts), 2, dtype=torch.bool)
        for row, text in enumerate(texts):
            for at, word in enumerate(text.split()[-2:]):
                tokens[row, at, axis.get(word, 15)] = 1.0
        pooled = normalize(tokens[:, :, 4:8].sum(1) + 0.01, dim=-1)
        return TextFeatures(tuple(texts), pooled, tokens, mask, tuple(("", "") for _ in texts))


class Pictures:
    """An index of pictures, one patch showing a coloured thing; pooled sees the thing only."""

    def __init__(self, count, folder):
        rng = np.random.default_rng(0)
        self.what = [(c, t) for c in range(4) for t in range(4)] * (count // 16)
        self.codes = torch.from_numpy(rng.integers(-9, 10, (len(self.what), 4, 16))).to(torch.int8)
        for row, (colour, thing) in enumerate(self.what):
            patch = rng.integers(4)
            self.codes[row, patch] = 0
            self.codes[row, patch, [colour, 4 + thing]] = 127
        self.paths = [folder / f"{row}.jpg" for row in range(len(self.what))]

    def id_of(self, path):
        return 1000 - self.paths.index(path) if path in self.paths else None

    def patches(self, ids):
        return PatchBatch(self.codes[[1000 - i for i in ids]], None, SPEC.grid)

    def pooled(self):
        things = torch.tensor([thing for _, thing in self.what])
        vectors = normalize(torch.eye(4)[things] + 0.01, dim=-1)
        return 1000 - np.arange(len(self.what)), vectors.numpy()

    def captions(self):
        return [
            Captioned(path, f"a {COLOURS[c]} {THINGS[t]}", None)
            for path, (c, t) in zip(self.paths, self.what, strict=True)
        ]


def build(tmp_path, **changes):
    pictures = Pictures(160, tmp_path)
    values = {"val_share": 0.2, "text_negatives": True, "seed": 0}
    return build_training_set(pictures, pictures.captions(), Words(), **{**values, **changes})


OPTIONS = TrainOptions(
    width=32, heads=2, epochs=4, group=8, pool=40, pool_end=20, learning_rate=3e-3, averaging=0.9
)


def run(data, folder, **changes):
    options = changes.pop("options", OPTIONS)
    return train_head(
        data, SPEC, options, folder, name="mine", device=torch.device("cpu"), **changes
    )


def test_the_set_is_split_by_picture_and_features_belong_to_it(tmp_path):
    data = build(tmp_path)
    assert not set(data.train) & set(data.val)
    assert len(data.train) + len(data.val) == 160
    assert (data.owner == np.arange(160)).all()
    assert (data.wrong_of >= 0).all()
    row = data.wrong_of[5]
    assert data.wrong.texts[row] != data.captions.texts[5]
    tokens, mask = data.captions.batch([0, 3])
    assert tokens.shape == (2, 2, 16)
    assert mask.all()


def test_where_cells_hold_one_vector_the_head_is_of_cells(tmp_path):
    """As on an index whose patches are pooled 2 x 2: nothing is read four times."""

    class Pooled(Pictures):
        def patches(self, ids):
            codes = super().patches(ids).codes.unflatten(1, (2, 2))  # (M, h, w, C)
            codes = codes.repeat_interleave(2, 1).repeat_interleave(2, 2)
            return PatchBatch(codes.flatten(1, 2), None, Grid(4, 4), alike=Grid(2, 2))

    pictures, plain = Pooled(160, tmp_path), build(tmp_path)
    data = build_training_set(
        pictures, pictures.captions(), Words(), val_share=0.2, text_negatives=True, seed=0
    )
    assert torch.equal(data.codes, plain.codes)
    assert data.grid == plain.grid
    spec = SimpleNamespace(**{**vars(SPEC), "grid": Grid(4, 4)})
    options = TrainOptions(**{**vars(OPTIONS), "epochs": 1})
    cpu = torch.device("cpu")
    head = train_head(data, spec, options, tmp_path / "run", name="mine", device=cpu).head
    assert head.config.grid == Grid(2, 2)


def test_named_splits_are_kept_and_test_is_left_alone(tmp_path):
    pictures = Pictures(160, tmp_path)
    named = [
        each._replace(split="val" if row % 4 == 0 else "test" if row % 4 == 1 else "train")
        for row, each in enumerate(pictures.captions())
    ]
    data = build_training_set(pictures, named, Words(), val_share=0.1, text_negatives=False, seed=0)
    assert len(data.val) == 40
    assert len(data.train) == 80
    assert (data.wrong_of == -1).all()


def test_too_few_pictures_are_an_error(tmp_path):
    pictures = Pictures(160, tmp_path)
    with pytest.raises(InputError, match="49 of 60"):
        build_training_set(
            pictures,
            pictures.captions()[:49] + [Captioned(Path(f"x{i}"), "a", None) for i in range(11)],
            Words(),
            val_share=0.1,
            text_negatives=False,
            seed=0,
        )


@pytest.mark.parametrize("kind", ["cross", "co", "shared"])
def test_a_head_learns_what_the_pooled_vector_does_not_know(tmp_path, kind):
    data = build(tmp_path)
    events = []
    options = TrainOptions(**{**vars(OPTIONS), "kind": kind, "epochs": 8})
    outcome = run(data, tmp_path / kind, options=options, on_event=events.append)
    figures = outcome.card.figures
    assert figures["r5"] > figures["r5_coarse"] + 50
    steps = [event for event in events if isinstance(event, StepDone)]
    assert steps[-1].loss < steps[15].loss
    assert any(isinstance(event, EpochDone) and event.best for event in events)
    head, card, _ = load_head(tmp_path / kind)
    assert card == outcome.card
    assert head.config.kind == kind
    lines = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1))


def test_a_broken_off_run_goes_on_to_the_same_head(tmp_path):
    data = build(tmp_path)
    whole = run(data, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(event):
        if isinstance(event, StepDone) and event.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        run(data, tmp_path / "broken", on_event=stop)
    again = run(data, tmp_path / "broken", resume=True)
    assert again.card == whole.card
    for ours, theirs in zip(again.head.parameters(), whole.head.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resuming_nothing_or_something_else_is_an_error(tmp_path):
    data = build(tmp_path)
    with pytest.raises(ModelError, match="no checkpoint"):
        run(data, tmp_path / "none", resume=True)
    short = TrainOptions(**{**vars(OPTIONS), "epochs": 1})
    run(data, tmp_path / "some", options=short)
    other = TrainOptions(**{**vars(OPTIONS), "width": 16})
    with pytest.raises(ModelError, match="other options"):
        run(data, tmp_path / "some", options=other, resume=True)


def test_card_plot_and_installation(tmp_path):
    options = TrainOptions(**{**vars(OPTIONS), "epochs": 1})
    outcome = run(build(tmp_path), tmp_path / "run", options=options)
    write_card(tmp_path / "run", outcome, options, "captions.csv")
    plot_history(tmp_path / "run", outcome)
    assert (tmp_path / "run" / "curve.png").stat().st_size > 5000
    assert "recall at" in (tmp_path / "run" / "README.md").read_text()
    target = install(tmp_path / "run", tmp_path / "heads", "mine")
    assert load_head(target)[1].name == "mine"
    modes = {each.name: each.stat().st_mode for each in target.iterdir()}
    assert len(set(modes.values())) == 1, modes  # whoever may read the config may read the weights
