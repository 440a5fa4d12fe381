"""Resuming a broken-off training run: to the very same head, or not at all."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmsearch.core.errors import ModelError
from mmsearch.core.types import TextFeatures
from mmsearch.rerank import train
from mmsearch.rerank.train import CHECKPOINT, METRICS, StepDone, TrainOptions, train_head
from torch.nn.functional import normalize

from .test_rerank_train import OPTIONS, SPEC, Pictures, Words, build, run


class Stop(Exception):
    """What breaks a run off."""


def stop_in_third_epoch(event):
    if isinstance(event, StepDone) and event.epoch == 2:
        raise Stop


def assert_same(ours, theirs):
    assert ours.card == theirs.card
    assert ours.history == theirs.history
    for one, other in zip(ours.head.parameters(), theirs.head.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_broken_off_run_goes_on_to_the_same_head(tmp_path):
    data = build(tmp_path)
    whole = run(data, tmp_path / "whole")
    with pytest.raises(Stop):
        run(data, tmp_path / "broken", on_event=stop_in_third_epoch)
    assert_same(run(data, tmp_path / "broken", resume=True), whole)


def test_so_does_that_of_an_aligned_head_with_self_attention(tmp_path, monkeypatch):
    class InSpace(Words):
        """Pooled text vectors lie where the patches do."""

        def encode_texts(self, texts):
            found = super().encode_texts(texts)
            pooled = normalize(found.tokens.sum(1), dim=-1)
            return TextFeatures(found.texts, pooled, found.tokens, found.mask, found.words)

    class AlsoInSpace(Pictures):
        def pooled(self):
            ids, _ = super().pooled()
            return ids, normalize(self.codes.float().mean(1), dim=-1).numpy()

    aligned, original = [], train.align
    monkeypatch.setattr(
        train, "align", lambda head, *rest: (aligned.append(head), original(head, *rest))
    )
    data = build(tmp_path, pictures=AlsoInSpace(160, tmp_path), words=InSpace())
    spec = SimpleNamespace(**{**vars(SPEC), "patch_kind": "aligned", "embed_dim": 16})

    def run(folder, **changes):
        return train_head(
            data, spec, OPTIONS, folder, name="mine", device=torch.device("cpu"), **changes
        )

    whole = run(tmp_path / "whole")
    assert whole.head.config.self_attention
    with pytest.raises(Stop):
        run(tmp_path / "broken", on_event=stop_in_third_epoch)
    assert_same(run(tmp_path / "broken", resume=True), whole)
    assert len(aligned) == 3


@pytest.mark.parametrize("at", ["before", "after"])
def test_wherever_a_run_broke_off_each_epoch_has_one_line(tmp_path, monkeypatch, at):
    """Killed before the second checkpoint is written, or right after."""
    data, folder = build(tmp_path), tmp_path / "run"
    save = train._Run.save

    def killed(self, path):
        if self.epoch == 2 and at == "before":
            raise Stop
        save(self, path)
        if self.epoch == 2:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "save", killed)
        with pytest.raises(Stop):
            run(data, folder)
    history = run(data, folder, resume=True).history
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines == history


@pytest.fixture
def done(tmp_path):
    """A run of one epoch: its data, its options and its folder."""
    data, options = build(tmp_path), TrainOptions(**{**vars(OPTIONS), "epochs": 1})
    run(data, tmp_path / "run", options=options)
    return data, options, tmp_path / "run"


def test_resuming_nothing_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no checkpoint"):
        run(build(tmp_path), tmp_path / "none", resume=True)


def test_other_options_are_refused(done):
    data, options, folder = done
    for change in ({"width": 16}, {"seed": 1}):
        other = TrainOptions(**{**vars(options), **change})
        with pytest.raises(ModelError, match="other options"):
            run(data, folder, options=other, resume=True)


def test_another_split_or_other_captions_are_refused(done, tmp_path):
    data, options, folder = done
    pictures, shuffled = Pictures(160, tmp_path), Pictures(160, tmp_path)
    shuffled.what[0], shuffled.what[1] = shuffled.what[1], shuffled.what[0]
    one_less = Pictures(160, tmp_path)
    one_less.captions = lambda: pictures.captions()[:-1]
    for other in (
        build(tmp_path, val_share=0.4),
        build(tmp_path, seed=1),
        build(tmp_path, text_negatives=False),
        build(tmp_path, pictures=shuffled),
        build(tmp_path, pictures=one_less),
    ):
        assert other.fingerprint() != data.fingerprint()
        with pytest.raises(ModelError, match="captions, split or index changed") as caught:
            run(other, folder, options=options, resume=True)
        assert "--resume" in caught.value.hint
    assert build(tmp_path).fingerprint() == data.fingerprint()
    run(build(tmp_path), folder, options=options, resume=True)


def test_pictures_that_changed_in_the_index_are_refused(done, tmp_path):
    """The captions and their paths are the same, what the paths show is not."""
    data, options, folder = done

    class Changed(Pictures):
        def pooled(self):
            ids, vectors = super().pooled()
            return ids, np.roll(vectors, 1, axis=0)

    other = build(tmp_path, pictures=Changed(160, tmp_path))
    assert other.captions.texts == data.captions.texts
    with pytest.raises(ModelError, match="index changed"):
        run(other, folder, options=options, resume=True)


@pytest.mark.parametrize("change", [{"weights_hash": "b" * 64}, {"patch_kind": "aligned"}])
def test_another_encoder_is_refused(done, change):
    data, options, folder = done
    spec = SimpleNamespace(**{**vars(SPEC), **change})
    with pytest.raises(ModelError, match="index changed"):
        train_head(
            data, spec, options, folder, name="mine", device=torch.device("cpu"), resume=True
        )


def test_another_part_for_the_cosine_is_refused(done, monkeypatch):
    """Whether it is in the loss goes by what is measured, unless the options say so."""
    data, options, folder = done
    seen = train._seen_by_encoder(data)
    monkeypatch.setattr(train, "_seen_by_encoder", lambda data: not seen)
    with pytest.raises(ModelError, match="changed"):
        run(data, folder, options=options, resume=True)


@pytest.mark.parametrize("left", [0, 1, 1000, -1000])
def test_a_truncated_checkpoint_cannot_be_read(done, left):
    data, options, folder = done
    whole = (folder / CHECKPOINT).read_bytes()
    (folder / CHECKPOINT).write_bytes(whole[:left])
    refused(data, options, folder)


def test_a_file_that_is_no_checkpoint_cannot_be_read(done):
    data, options, folder = done
    (folder / CHECKPOINT).write_bytes(b"not a checkpoint\n" * 100)
    refused(data, options, folder)
    torch.save([1, 2, 3], folder / CHECKPOINT)
    refused(data, options, folder)


@pytest.mark.parametrize("lacks", ["options", "material", "optimiser", "history"])
def test_nor_one_that_lacks_something(done, lacks):
    data, options, folder = done
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    del state[lacks]
    torch.save(state, folder / CHECKPOINT)
    refused(data, options, folder)


def test_nor_one_with_an_option_that_this_version_lacks(done):
    data, options, folder = done
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    state["options"]["momentum"] = 0.9
    torch.save(state, folder / CHECKPOINT)
    refused(data, options, folder)


def refused(data, options, folder):
    with pytest.raises(ModelError, match="cannot be read") as caught:
        run(data, folder, options=options, resume=True)
    assert caught.value.hint == "Start without --resume."
    assert "weights_only" not in caught.value.message
    assert not caught.value.message.endswith((":", " "))


def test_step_counts_stay_on_the_cpu(done):
    """Elsewhere each step of AdamW would wait for the device once a tensor."""
    data, options, folder = done
    resumed = train._Run(data, SPEC, options, torch.device("cpu"), True)
    resumed.material["with_coarse"] = not train._seen_by_encoder(data)
    resumed.device = torch.device("meta")
    resumed.load(folder / CHECKPOINT)
    states = resumed.optimiser.state.values()
    assert {str(state["step"].device) for state in states} == {"cpu"}
