"""Patches from the tiles of a larger view, and heads of a coarser grid that judge them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmsearch.cli.app import app
from mmsearch.cli.output import report_error
from mmsearch.core.errors import BadIndex, ModelError
from mmsearch.core.types import Grid
from mmsearch.indexing.encoder import EncoderSpec, encoder_for, load_encoder
from mmsearch.indexing.images import decode
from mmsearch.indexing.index import ImageIndex
from mmsearch.rerank.explain import looks
from mmsearch.rerank.heads import HeadConfig, build_head
from mmsearch.rerank.scorers import HeadScorer, list_scorers, load_scorer
from torch import nn

from .photos import photograph


@pytest.mark.parametrize("kind", ["vit-wide", "timm-conv", "resnet"])
def test_stitched_patches_are_those_of_each_tile_alone(tiny_model, kind):
    model, tiles = f"local-dir:{tiny_model(kind)}", Grid(2, 3)
    single = load_encoder(model, device="cpu", precision="fp32")
    tiled = load_encoder(model, device="cpu", precision="fp32", tiles=tiles)
    (height, width), (h, w) = single.spec.input_size, single.spec.grid
    size = (2, 2 * height, 3 * width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)  # (N, 2H, 3W, 3)
    features = tiled.encode_images(pixels)
    assert features.grid == tiled.spec.grid == (2 * h, 3 * w)
    assert tiled.spec.input_size == (2 * height, 3 * width)
    stitched = features.patches.unflatten(1, features.grid)  # (N, 2h, 3w, C)
    for row, column in np.ndindex(tiles):
        tile = pixels[:, row * height :, column * width :][:, :height, :width]  # (N, H, W, 3)
        alone = single.encode_images(tile).patches.unflatten(1, (h, w))  # (N, h, w, C)
        part = stitched[:, row * h :, column * w :][:, :h, :w]  # (N, h, w, C)
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-4)


def test_the_tiles_are_in_the_spec(tiny_model_dir):
    model = f"local-dir:{tiny_model_dir}"
    spec = load_encoder(model, device="cpu", tiles=Grid(2, 2)).spec
    again = EncoderSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec == encoder_for(again, "cpu").spec
    early = load_encoder(model, device="cpu").spec.to_dict()
    del early["tiles"]
    assert EncoderSpec.from_dict(early).tiles == (1, 1)


@pytest.mark.parametrize("kind", ["cross", "co", "shared"])
def test_a_head_judges_repeated_patches_as_it_judges_the_patches(kind):
    torch.manual_seed(0)
    coarse, fine = Grid(2, 3), Grid(4, 9)
    head = build_head(HeadConfig(kind, 12, 10, coarse, width=16)).eval()
    nn.init.normal_(head.rank.weight)
    tokens, mask = torch.randn(2, 5, 12), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    patches = torch.randn(2, 3, *coarse, 10)  # (G, N, h, w, C)
    finer = patches.repeat_interleave(2, 2).repeat_interleave(3, 3).flatten(2, 3)  # (G, N, P, C)
    judge = head.for_grid(fine)
    assert head.for_grid(coarse) is head
    with torch.no_grad():
        before, after = (
            head.judge(tokens, mask, patches.flatten(2, 3)),
            judge.judge(tokens, mask, finer),
        )
        torch.testing.assert_close(after.rank, before.rank, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after.match, before.match, atol=1e-5, rtol=1e-5)
        shares = looks(judge, tokens, mask, finer).unflatten(-1, (2, 2, 3, 3)).sum((-3, -1))
        wanted = looks(head, tokens, mask, patches.flatten(2, 3)).unflatten(-1, coarse)
        torch.testing.assert_close(shares, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="2x3 patches cannot judge pictures of 4x4"):
        head.for_grid(Grid(4, 4))


def run(*words: object) -> int:
    try:
        return app([str(word) for word in words], standalone_mode=False) or 0
    except Exception as error:
        return report_error(error, debug=False)


def test_an_index_with_tiles(tmp_path, capfd):
    """From the command line, with the head of the untiled model."""
    photos, folder = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    for name in ("astronaut.png", "cat.png", "coffee.png", "rocket.jpg", "temple.jpg"):
        shutil.copy(photograph(name), photos / name)
    index = ("index", photos, "--index", folder, "--device", "cpu", "-q")
    assert run(*index, "--model", "bundled", "--tiles", "2x3") == 2
    assert "1x1, 2x2, 3x3" in capfd.readouterr().err
    assert not folder.exists()
    assert run(*index, "--model", "bundled", "--tiles", "2x2") == 0
    assert run("status", "--index", folder) == 0
    assert "patches 14 x 14 x 320 from 2x2 tiles, int8" in capfd.readouterr().out
    query = ("query", "a cup of coffee", "--index", folder, "--device", "cpu")
    assert run(*query, "--scorer", "cross", "-k", "1", "--paths") == 0
    assert capfd.readouterr().out.strip().endswith("coffee.png")
    for tiles, code in (("3x3", 5), ("1x1", 5), ("2x2", 0)):
        assert run(*index, "--tiles", tiles) == code
    assert "--tiles 2x2, not 3x3" in capfd.readouterr().err

    single = load_encoder("bundled", device="cpu", precision="fp32")
    with ImageIndex.open(folder) as opened:
        shutil.copy(photograph("clock.png"), photos)
        with pytest.raises(BadIndex, match="2x2 tiles, not 1x1"):
            opened.add([photos], single)
        spec = opened.manifest.encoder
        ids, pooled = opened.pooled()  # (M,), (M, D)
        paths = [record.path for record in opened.records(ids.tolist())]
    pixels = np.stack([decode(Path(path), single.spec.input_spec).pixels for path in paths])
    cosines = (single.encode_images(pixels).pooled.numpy() * pooled).sum(1)  # (M,)
    assert cosines.min() > 0.99, "search is what it was"
    scorer = load_scorer("cross", spec, device="cpu")
    assert isinstance(scorer, HeadScorer) and scorer.head.config.grid == (14, 14)
    assert all(info.fits for info in list_scorers(spec) if info.name == "cross")
