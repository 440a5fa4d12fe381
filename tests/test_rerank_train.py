"""Training: wrong captions, honest fitting, a head that learns, what is left on disk."""

from __future__ import annotations

import doctest
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmsearch.cli.train import train
from mmsearch.core.errors import InputError, UsageError
from mmsearch.core.types import Grid, PatchBatch, TextFeatures
from mmsearch.rerank import negatives
from mmsearch.rerank.checkpoint import load_head
from mmsearch.rerank.dataset import Captioned, build_training_set
from mmsearch.rerank.fitting import Judged, calibrate, fit_fusion, paired_p
from mmsearch.rerank.negatives import CONTRARIES, wrong_captions
from mmsearch.rerank.outcome import install, plot_history, write_card
from mmsearch.rerank.scorers import HeadScorer
from mmsearch.rerank.train import (
    STEPS_UNREAD,
    EpochDone,
    StepDone,
    TrainOptions,
    _Run,
    judge_val,
    train_head,
)
from torch.nn.functional import normalize, softplus
from torch.utils._python_dispatch import TorchDispatchMode


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


def every_wrong(text):
    """All that the rules make of a caption, whatever is drawn."""
    return {wrong for seed in range(40) for wrong in wrong_captions(text, random.Random(seed))}


def test_wrong_captions_do_not_say_the_same_in_other_words():
    assert every_wrong("a big dog") == {"a small dog", "a little dog", "a tiny dog"}
    assert every_wrong("a tall dog") == {"a short dog"}
    greys = {"a grey dog", "a gray dog", "a silver dog"}
    for grey in greys:
        assert len(every_wrong(grey)) > 5
        assert not every_wrong(grey) & greys
    browns = {"a tan dog", "a golden dog", "a brown dog"}
    for brown in browns:
        assert not every_wrong(brown) & browns
    assert "a grey cat on a gray mat" not in every_wrong("a gray cat on a grey mat")
    assert "a white and black dog" not in every_wrong("a black and white dog")
    assert "a tan cat near a red cat" not in every_wrong("a red cat near a tan cat")
    for word, others in CONTRARIES.items():
        assert word not in others
        assert all(word in CONTRARIES[each] for each in others)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A big dog.", "A little dog."),
        ("Red ball,  left of a cup!", "Blue ball,  left of a cup!"),
        ("Red ball,  left of a cup!", "Red cup,  left of a ball!"),
        ("Red ball,  left of a cup!", "Red ball,  right of a cup!"),
        ("A RED ball (wet)", "A GREEN ball (wet)"),
        ("An orange ball", "A red ball"),
        ("a red ball on the ice", "an orange ball on the ice"),
        ("A red apple under a blue ball", "A red ball under a blue apple"),
    ],
)
def test_wrong_captions_are_spelt_as_the_caption_is(text, expected):
    assert expected in every_wrong(text)


def test_examples_in_the_docstrings_of_negatives():
    done = doctest.testmod(negatives)
    assert done.attempted
    assert not done.failed


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


def build(tmp_path, pictures=None, words=None, **changes):
    pictures = pictures or Pictures(160, tmp_path)
    values = {"val_share": 0.2, "text_negatives": True, "seed": 0, **changes}
    return build_training_set(pictures, pictures.captions(), words or Words(), **values)


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


def test_too_few_pictures_to_validate_on_are_an_error(tmp_path):
    pictures = Pictures(160, tmp_path)

    def build_with(count):
        named = [
            each._replace(split="val" if row < count else "train")
            for row, each in enumerate(pictures.captions())
        ]
        return build_training_set(
            pictures, named, Words(), val_share=0.1, text_negatives=False, seed=0
        )

    for count in (1, 19):
        with pytest.raises(InputError, match=f"^{count} pictures of split val.* at least 20"):
            build_with(count)
    assert len(build_with(20).val) == 20


@pytest.mark.parametrize(("count", "share"), [(50, 0.01), (50, 0.5), (160, 0.1), (160, 0.5)])
def test_a_share_that_is_drawn_is_enough_to_validate_on(tmp_path, count, share):
    pictures = Pictures(160, tmp_path)
    data = build_training_set(
        pictures,
        pictures.captions()[:count],
        Words(),
        val_share=share,
        text_negatives=False,
        seed=0,
    )
    assert len(data.val) == max(20, share * count)
    assert len(data.train) + len(data.val) == count


def test_a_picture_may_have_id_0(tmp_path):
    class FromZero(Pictures):
        def id_of(self, path):
            return self.paths.index(path) if path in self.paths else None

        def patches(self, ids):
            return PatchBatch(self.codes[list(ids)], None, SPEC.grid)

        def pooled(self):
            ids, vectors = super().pooled()
            return 1000 - ids, vectors

    pictures, usual = FromZero(160, tmp_path), build(tmp_path)
    data = build_training_set(
        pictures, pictures.captions(), Words(), val_share=0.2, text_negatives=True, seed=0
    )
    assert torch.equal(data.codes, usual.codes)


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


def one_run(data, **changes):
    """A training run before its first step, and its first group."""
    options = TrainOptions(**{**vars(OPTIONS), **changes})
    run = _Run(data, SPEC, options, torch.device("cpu"), True)
    return run, next(run._groups(random.Random(0)))


def test_the_match_loss_is_that_of_picked_logits(tmp_path):
    data = build(tmp_path)
    run, captions = one_run(data, match_weight=1.0)
    without, _ = one_run(data, match_weight=0.0)
    run.head.eval()
    without.head.eval()
    texts = np.array(data.captions.texts)[captions]
    assert len(set(texts)) < len(texts)  # the same caption twice, which is no non-pair
    tokens, mask = data.captions.batch(captions)
    codes = data.codes[data.owner[captions]]
    with torch.no_grad():
        loss = run._loss(captions) - without._loss(captions)
        match = run.head.judge(tokens, mask, codes.unsqueeze(0)).match
        wrong = run.head(*data.wrong.batch(data.wrong_of[captions]), codes).match
    pairs = torch.eye(len(captions), dtype=torch.bool)
    others = torch.from_numpy(texts[:, None] != texts)
    picked = softplus(-match[pairs]).mean() + softplus(match[others]).mean()
    expected = picked + 0.5 * softplus(wrong).mean()
    assert float(loss) == pytest.approx(float(expected), rel=0.02)  # it may be in bfloat16


def test_with_match_weight_0_the_match_head_learns_nothing(tmp_path):
    data = build(tmp_path)
    for weight in (0.0, 0.5):
        run, captions = one_run(data, match_weight=weight)
        run._loss(captions).backward()
        assert bool(run.head.match.weight.grad.any()) == (weight > 0)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a CUDA device: values read, logits picked."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        picks = any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for arg in args[1:]
            if isinstance(arg, list | tuple)
            for each in arg
        )
        self.count += picks or func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_loss_waits_for_nothing(tmp_path):
    run, captions = one_run(build(tmp_path))
    with Waits() as waits:
        loss = run._loss(captions)
        loss.backward()
    assert waits.count == 0
    with waits:
        assert loss[loss == loss].sum().isfinite()
    assert waits.count == 2  # so it does count


def test_a_diverged_run_says_so_soon(tmp_path):
    data, told = build(tmp_path), []
    options = TrainOptions(**{**vars(OPTIONS), "group": 2, "epochs": 1})

    def spoil(event):
        told.append(event)
        if event.step == 25:
            data.pooled[:] = torch.nan

    with pytest.raises(InputError, match="diverged"):
        run(data, tmp_path / "run", options=options, on_event=spoil)
    assert 25 <= told[-1].step < 25 + STEPS_UNREAD
    assert all(math.isfinite(each.loss) for each in told)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_the_loss_told_is_a_mean_of_the_epoch(tmp_path, monkeypatch):
    """Of all steps up to the last one read; the epoch's is of all."""
    losses = iter([1.0, *[5.0] * 19, 4.0, *[2.0] * 43])
    monkeypatch.setattr(_Run, "_step", lambda self, captions: torch.tensor(next(losses)))
    options, told = TrainOptions(**{**vars(OPTIONS), "group": 2, "epochs": 1}), []
    run(build(tmp_path), tmp_path / "run", options=options, on_event=told.append)
    *steps, epoch = told
    assert len(steps) == 64
    assert [each.loss for each in steps[:20]] == [1.0] * 20
    assert [each.loss for each in steps[20:40]] == [pytest.approx(100 / 21)] * 20
    assert epoch.loss == steps[-1].loss == pytest.approx((100 + 86) / 64)


def test_validation_sends_the_pictures_to_the_device_once(tmp_path, monkeypatch):
    data, sent = build(tmp_path, val_share=0.5), []

    def judge(self, text, codes, rows):
        sent.append(codes)
        return rows * 0.0, rows * 0.0

    monkeypatch.setattr(HeadScorer, "judge", judge)
    run, _ = one_run(data)
    judge_val(run.average, data, OPTIONS, torch.device("meta"), None)
    assert len(sent) == 2  # 80 captions
    assert sent[0] is sent[1]
    assert sent[0].is_meta


@pytest.mark.parametrize("name", [".", "..", "a/b", "a\\b", "..\\x", "a:b", "late", "/tmp/x"])
def test_names_that_are_no_folder_of_the_index_are_refused(name):
    with pytest.raises(UsageError, match="cannot be the name"):
        train(Path("captions.csv"), name=name)


def test_card_plot_and_installation(tmp_path):
    options = TrainOptions(**{**vars(OPTIONS), "epochs": 1})
    outcome = run(build(tmp_path), tmp_path / "run", options=options)
    write_card(tmp_path / "run", outcome, options, "captions.csv")
    plot_history(tmp_path / "run", outcome)
    assert (tmp_path / "run" / "curve.png").stat().st_size > 5000
    card = (tmp_path / "run" / "README.md").read_text()
    assert "recall at" in card
    assert "slightly optimistic" in card
    target = install(tmp_path / "run", tmp_path / "heads", "mine")
    assert load_head(target)[1].name == "mine"
    modes = {each.name: each.stat().st_mode for each in target.iterdir()}
    assert len(set(modes.values())) == 1, modes  # whoever may read the config may read the weights
