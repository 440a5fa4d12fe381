"""Flickr8k val as the shipped model sees it: fp16 weights, int8 codes, exact search."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmsearch.indexing.encoder import load_encoder
from mmsearch.indexing.shards import RowFormat, stored_form
from PIL import Image

CANDIDATES = 50


@dataclass
class Val:
    """Encoded pictures and captions of a split."""

    spec: Any
    text: Any  # TextFeatures of Q captions
    codes: torch.Tensor  # (N, 49, 320) int8
    truth: torch.Tensor  # (Q,) picture of each caption
    coarse: torch.Tensor  # (Q, N) cosine
    pooled: torch.Tensor  # (N, D) unit vectors of the pictures


def read_rgb(path: Path, size: tuple[int, int]) -> np.ndarray:
    """One picture as the model wants it: squashed, bicubic."""
    with Image.open(path) as img:
        return np.asarray(img.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC))


def encode_val(root: Path) -> Val:
    """Encode Flickr8k val with the bundled encoder in fp32."""
    encoder = load_encoder("bundled", device="cpu", precision="fp32")
    names: dict[str, int] = {}
    captions, truth = [], []
    with (root / "captions.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["split"] == "val":
                captions.append(row["caption"])
                truth.append(names.setdefault(row["image"], len(names)))
    pooled, codes, batch = [], [], 50
    spec = encoder.spec
    row_format = RowFormat(spec.embed_dim, spec.patch_dim, spec.grid)
    files = [root / "images" / n for n in names]
    for at in range(0, len(files), batch):
        pixels = np.stack([read_rgb(p, encoder.spec.input_size) for p in files[at : at + batch]])
        out = encoder.encode_images(pixels)
        pooled.append(out.pooled)
        codes.append(stored_form(out.patches, row_format).codes)
    text = encoder.encode_texts(captions)
    cosine = text.pooled @ torch.cat(pooled).T  # (Q, N)
    return Val(encoder.spec, text, torch.cat(codes), torch.tensor(truth), cosine, torch.cat(pooled))


def candidates(val: Val, count: int = CANDIDATES) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (Q, count) and their cosines, best first."""
    top = val.coarse.topk(count)
    return top.indices, top.values
