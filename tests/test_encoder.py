"""The encoder equals open_clip, whatever the tower, and refuses weights that do not fit."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from mmsearch.core.errors import ModelError
from mmsearch.indexing.encoder import (
    EncoderSpec,
    encoder_for,
    load_encoder,
    load_text_encoder,
)
from safetensors.torch import load_file, save_file

KINDS = ["vit", "vit-wide", "timm-conv", "siglip", "resnet", "coca"]
TEXTS = ["a red car", "two dogs running on a wide beach", ""]


def random_pixels(size: tuple[int, int], n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *size, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_embeddings_equal_open_clips_own(tiny_model, kind):
    folder = tiny_model(kind)
    encoder = load_encoder(f"local-dir:{folder}", device="cpu", precision="fp32")
    net = open_clip.create_model(f"local-dir:{folder}").eval()
    pixels = random_pixels(encoder.spec.input_size)
    mean = torch.tensor(encoder.spec.mean).view(1, 3, 1, 1)
    std = torch.tensor(encoder.spec.std).view(1, 3, 1, 1)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        wanted_images = net.encode_image(images, normalize=True)
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
        wanted_texts = net.encode_text(tokens, normalize=True)

    torch.testing.assert_close(
        encoder.encode_images(pixels).pooled, wanted_images, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(encoder.encode_texts(TEXTS).pooled, wanted_texts, rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch_kind", ["aligned", "penultimate"])
@pytest.mark.parametrize("kind", KINDS)
def test_patches_fill_the_grid(tiny_model, kind, patch_kind):
    encoder = load_encoder(
        f"local-dir:{tiny_model(kind)}", device="cpu", precision="fp32", patch_kind=patch_kind
    )
    features = encoder.encode_images(random_pixels(encoder.spec.input_size))
    assert features.patches.shape == (3, encoder.spec.grid.size, encoder.spec.patch_dim)
    assert features.grid == encoder.spec.grid
    assert torch.isfinite(features.patches).all()
    if patch_kind == "aligned":
        assert encoder.spec.patch_dim == encoder.spec.embed_dim


def test_non_square_input_gives_a_non_square_grid(tiny_model):
    encoder = load_encoder(f"local-dir:{tiny_model('vit-wide')}", device="cpu")
    assert encoder.spec.input_size == (48, 80)
    assert encoder.spec.grid == (3, 5)


def test_average_pooled_patches_average_to_the_image_vector(tiny_model):
    """With average pooling and a linear projection, projecting and pooling commute."""
    folder = tiny_model("timm-conv")
    encoder = load_encoder(f"local-dir:{folder}", device="cpu", precision="fp32")
    features = encoder.encode_images(random_pixels(encoder.spec.input_size))
    mean = torch.nn.functional.normalize(features.patches.mean(1), dim=-1)
    torch.testing.assert_close(mean, features.pooled, rtol=0, atol=1e-5)


def test_an_image_is_encoded_alike_alone_and_in_a_batch(tiny_model_dir):
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")
    pixels = random_pixels(encoder.spec.input_size)
    together, alone = encoder.encode_images(pixels), encoder.encode_images(pixels[1:2])
    torch.testing.assert_close(together.pooled[1:2], alone.pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.patches[1:2], alone.patches, rtol=0, atol=1e-5)


def test_text_padding_is_trimmed_and_masked(tiny_model_dir):
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    text = encoder.encode_texts(["car", "two dogs on a beach"])
    assert text.mask.sum(1).tolist() == [3, 7]  # with start and end of text
    assert text.tokens.shape[:2] == (2, 7)
    assert text.words[0][1].startswith("car")


def test_an_exclamation_mark_is_no_padding(tiny_model_dir):
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    text = encoder.encode_texts(["wow !( a red car )", "red car"])
    assert "!" in "".join(text.words[0]) and "car" in "".join(text.words[0])
    assert text.words[0][-1] == text.words[1][-1] == "<end_of_text>"
    assert text.mask.sum(1).tolist() == [len(words) for words in text.words]


def test_without_its_text_half_an_encoder_still_encodes_pictures(tiny_model_dir):
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    pixels = random_pixels(encoder.spec.input_size)
    before = encoder.encode_images(pixels).pooled
    assert encoder.drop_text() is encoder
    assert torch.equal(encoder.encode_images(pixels).pooled, before)
    with pytest.raises(ValueError, match="no text half"):
        encoder.encode_texts(["car"])


def test_a_checkpoint_with_tensors_missing_is_refused_by_name(tiny_model_dir, tmp_path):
    weights = load_file(tiny_model_dir / "open_clip_model.safetensors")
    del weights["visual.proj"]
    (tmp_path / "open_clip_config.json").write_bytes(
        (tiny_model_dir / "open_clip_config.json").read_bytes()
    )
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=r"visual\.proj"):
        load_encoder(f"local-dir:{tmp_path}", device="cpu")


def test_a_folder_without_weights_is_refused(tiny_model_dir, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes(
        (tiny_model_dir / "open_clip_config.json").read_bytes()
    )
    with pytest.raises(ModelError, match="no weights"):
        load_encoder(f"local-dir:{tmp_path}", device="cpu")


def test_an_unknown_name_lists_the_nearest(tmp_path):
    with pytest.raises(ModelError, match="unknown model 'ViT-B32'") as caught:
        load_encoder("ViT-B32", device="cpu")
    assert "ViT-B-32" in caught.value.hint


def test_an_unknown_tag_lists_the_valid_ones():
    with pytest.raises(ModelError, match="laion_2b") as caught:
        load_encoder("ViT-B-32", "laion_2b", device="cpu")
    assert "laion2b_s34b_b79k" in caught.value.hint


def test_a_plain_name_without_weights_is_refused():
    with pytest.raises(ModelError, match="needs weights"):
        load_encoder("ViT-B-32", device="cpu")


def test_a_spec_survives_json(tiny_model_dir):
    spec = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu").spec
    assert EncoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_changed_weights_are_refused(tiny_model, tmp_path):
    from tests.conftest import save_tiny_model

    folder = save_tiny_model("vit", tmp_path / "model", seed=0)
    spec = load_encoder(f"local-dir:{folder}", device="cpu").spec
    assert encoder_for(spec, "cpu").spec == spec
    save_tiny_model("vit", folder, seed=1)
    with pytest.raises(ModelError, match="not those the index was made with"):
        encoder_for(spec, "cpu")
    with pytest.raises(ModelError, match="not those the index was made with"):
        load_text_encoder(spec, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(tiny_model_dir):
    pixels = random_pixels((64, 64))
    on_cpu = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")
    on_gpu = load_encoder(f"local-dir:{tiny_model_dir}", device="cuda")
    similarity = (
        on_cpu.encode_images(pixels).pooled * on_gpu.encode_images(pixels).pooled.cpu()
    ).sum(1)
    assert similarity.min() > 0.999
