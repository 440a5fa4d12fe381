"""The cross-encoder over pixels, with tiny random models saved here."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmsearch.cli.eval import eval_app
from mmsearch.core.errors import InputError, ModelError, UsageError
from mmsearch.core.types import Candidates
from mmsearch.rerank.rerank import read_picture, rerank
from mmsearch.rerank.scorers import load_scorer
from typer.testing import CliRunner

from .photos import photograph
from .test_rerank_scorers import make_text

transformers = pytest.importorskip("transformers")
ENCODER = SimpleNamespace(weights_hash="", patch_kind="aligned", model="tiny")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 16,
}


def save_tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "car", "dog", "t"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizerFast(str(folder / "vocab.txt"))


@pytest.fixture(scope="module", params=["blip", "vilt"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder)
    size = {"height": 32, "width": 32}
    if request.param == "blip":
        text = {**SIZES, "vocab_size": 11, "encoder_hidden_size": 16, "projection_dim": 16,
                "bos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0,
                "eos_token_id": 3}  # fmt: skip
        config = transformers.BlipConfig(
            text_config=text, vision_config={**SIZES, "projection_dim": 16},
            image_text_hidden_size=16,
        )  # fmt: skip
        network = transformers.BlipForImageTextRetrieval(config)
        processor = transformers.BlipProcessor(
            transformers.BlipImageProcessor(size=size), tokenizer
        )
    else:
        network = transformers.ViltForImageAndTextRetrieval(
            transformers.ViltConfig(**SIZES, vocab_size=11)
        )
        images = transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=16)
        processor = transformers.ViltProcessor(images, tokenizer)
    for weights in network.parameters():  # fresh weights are so small that pictures look alike
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=0.5)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (40, 40, 3), np.uint8) for _ in range(count)]


def test_pairs_are_scored_alone_and_unreadable_pictures_go_last(model):
    scorer = load_scorer(f"itm:{model}", ENCODER, device="cpu")
    seen = [*pictures(3), None]
    rows = torch.tensor([[0, 1, 2], [2, 3, -1]])
    together = scorer.score_pictures(["a red car", "dog"], seen, rows).rank
    alone = scorer.score_pictures(["dog"], seen, rows[1:, :1]).rank
    torch.testing.assert_close(together[1, 0], alone[0, 0], atol=1e-5, rtol=1e-5)
    assert together[1, 1] == together[1, 2] == together[1, 0]
    assert len(set(together[0].tolist())) == 3


def test_reranking_by_pixels(model):
    scorer = load_scorer(f"itm:{model}", ENCODER, device="cpu")
    ids = np.array([[7, 5, 9], [5, -1, -1]])
    scores = np.array([[0.9, 0.5, 0.1], [0.3, -np.inf, -np.inf]], np.float32)
    by_id = dict(zip((5, 7, 9), pictures(3), strict=True))

    def refuse(ids):
        raise AssertionError("no patches are needed")

    result = rerank(
        scorer,
        make_text(2),
        Candidates(ids, scores),
        refuse,
        fetch_pictures=lambda ids: [by_id[i] for i in ids],
    )
    assert sorted(result.ids[0]) == [5, 7, 9]
    assert result.ids[1].tolist() == [5, -1, -1]
    with pytest.raises(UsageError, match="pictures themselves"):
        rerank(scorer, make_text(2), Candidates(ids, scores), refuse)


def test_evaluation_hands_the_pictures_over(model, tmp_path):
    captions = {"cat.png": "a dog", "coffee.png": "a red car", "rocket.jpg": "a blue t"}
    for name in captions:
        shutil.copy(photograph(name), tmp_path / name)
    rows = [f"{name},{caption}" for name, caption in captions.items()]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    out = tmp_path / "out.json"
    arguments = [
        tmp_path / "captions.csv", "--images", tmp_path, "--index", tmp_path / "index", "--model",
        "bundled", "--scorer", f"itm:{model}", "--direction", "both", "--json", out,
    ]  # fmt: skip
    done = CliRunner().invoke(eval_app, list(map(str, arguments)))
    assert done.exit_code == 0, done.exception

    scorer = load_scorer(f"itm:{model}", ENCODER, device="cpu")
    seen = [read_picture(tmp_path / name) for name in captions]
    every = torch.arange(3).expand(3, 3)
    scores = scorer.score_pictures(list(captions.values()), seen, every).rank  # (texts, pictures)
    document = json.loads(out.read_text())
    for direction, table in (("t2i", scores), ("i2t", scores.T)):
        row = document["directions"][direction]["rows"][1]
        assert row["scorer"] == f"itm:{model.name}"
        ranks = (table >= table.diagonal()[:, None]).sum(dim=1)
        assert row["first_relevant"] == ranks.tolist()

    (tmp_path / "cat.png").write_bytes(b"no picture any more")
    failed = CliRunner().invoke(eval_app, list(map(str, arguments)))
    assert isinstance(failed.exception, InputError), failed.exception
    assert "cat.png, which the reranker must look at" in failed.exception.message


def test_wrong_models_are_refused(tmp_path):
    with pytest.raises(UsageError, match="needs a model"):
        load_scorer("itm", ENCODER, device="cpu")
    with pytest.raises(ModelError, match="cannot load"):
        load_scorer(f"itm:{tmp_path / 'none'}", ENCODER, device="cpu")
    transformers.BertConfig(**{k: v for k, v in SIZES.items() if "_size" not in k}).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="bert model"):
        load_scorer(f"itm:{tmp_path}", ENCODER, device="cpu")
