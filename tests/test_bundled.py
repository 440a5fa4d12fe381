"""The model in the package: an ordinary open_clip model, with a head that fits it."""

from __future__ import annotations

import json
import subprocess
import sys

import open_clip
import pytest
import torch
from mmsearch.indexing.encoder import load_encoder, load_text_encoder
from mmsearch.indexing.images import decode
from mmsearch.indexing.models import BUNDLED_DIR
from mmsearch.rerank.scorers import default_scorer_name, load_scorer

from .photos import photograph

TEXTS = ["a red car", "two dogs run along a wide beach at sunset", "Käse, «quotes» & 12 cups!", ""]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("bundled", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def net():
    """The same weights through open_clip's own factory."""
    config = open_clip.factory.get_model_config(f"local-dir:{BUNDLED_DIR}")
    text_cfg = config["text_cfg"] | {
        "hf_model_name": str(BUNDLED_DIR / "text"),
        "hf_model_pretrained": False,
    }
    return open_clip.create_model(f"local-dir:{BUNDLED_DIR}", text_cfg=text_cfg).eval()


def test_the_fast_text_tower_equals_open_clips(encoder, net):
    tokens = open_clip.get_tokenizer(f"local-dir:{BUNDLED_DIR}")(TEXTS)
    with torch.inference_mode():
        wanted = net.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encoder.encode_texts(TEXTS).pooled, wanted, rtol=0, atol=1e-5)


def test_the_image_tower_equals_open_clips(encoder, net):
    pixels = decode(photograph("cat.png"), encoder.spec.input_spec).pixels
    mean = torch.tensor(encoder.spec.mean).view(1, 3, 1, 1)
    std = torch.tensor(encoder.spec.std).view(1, 3, 1, 1)
    image = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 - mean) / std
    with torch.inference_mode():
        wanted = net.encode_image(image, normalize=True)
    torch.testing.assert_close(
        encoder.encode_images(pixels[None]).pooled, wanted, rtol=0, atol=1e-5
    )


def test_a_text_is_encoded_alike_alone_and_in_a_batch(encoder):
    together = encoder.encode_texts(TEXTS)
    for row, text in enumerate(TEXTS):
        alone = encoder.encode_texts([text])
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], rtol=0, atol=1e-6)


def test_the_fast_precision_keeps_the_direction(encoder):
    fast = load_encoder("bundled", device="cpu", precision="bf16")
    pixels = decode(photograph("coffee.png"), encoder.spec.input_spec).pixels[None]
    cosine = (fast.encode_images(pixels).pooled * encoder.encode_images(pixels).pooled).sum()
    assert float(cosine) >= 0.999


def test_a_head_ships_for_it(encoder):
    assert default_scorer_name(encoder.spec) == "cross"
    assert load_scorer("cross", encoder.spec, device="cpu").needs_patches


def test_it_is_small():
    assert sum(file.stat().st_size for file in BUNDLED_DIR.rglob("*")) <= 60_000_000


def test_a_text_query_imports_neither_open_clip_nor_torchs_compiler(encoder):
    code = (
        "import sys, json\n"
        "from mmsearch.indexing.encoder import EncoderSpec, load_text_encoder\n"
        "spec = EncoderSpec.from_dict(json.loads(sys.argv[1]))\n"
        "load_text_encoder(spec, 'cpu').encode_texts(['a cat'])\n"
        "slow = {'open_clip', 'torchvision', 'transformers', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    spec = json.dumps(encoder.spec.to_dict())
    subprocess.run([sys.executable, "-c", code, spec], check=True, timeout=120)
    assert load_text_encoder(encoder.spec, "cpu").encode_texts(["a cat"]).words[0][1] == "a"
