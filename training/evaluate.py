"""Figures of the bundled model on Flickr8k val: coarse, and reranked by the shipped head.

    MMSEARCH_FLICKR8K=/data/flickr8k python training/evaluate.py

The folder holds captions.csv (image, caption, split) and images/. Weights and patch codes are
used as shipped and stored: fp16 weights, int8 codes, 50 candidates a caption, exact search.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmsearch.indexing.encoder import load_encoder
from mmsearch.rerank.scorers import HeadScorer, load_scorer
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


def quantise(patches: torch.Tensor) -> torch.Tensor:
    """Patches (N, P, C) to int8 codes, one scale a patch (which the head ignores)."""
    largest = patches.abs().amax(-1, keepdim=True).clamp_min(1e-6)
    return (patches / largest * 127).round().to(torch.int8)


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
    files = [root / "images" / n for n in names]
    for at in range(0, len(files), batch):
        pixels = np.stack([read_rgb(p, encoder.spec.input_size) for p in files[at : at + batch]])
        out = encoder.encode_images(pixels)
        pooled.append(out.pooled)
        codes.append(quantise(out.patches))
    text = encoder.encode_texts(captions)
    cosine = text.pooled @ torch.cat(pooled).T  # (Q, N)
    return Val(encoder.spec, text, torch.cat(codes), torch.tensor(truth), cosine, torch.cat(pooled))


def candidates(val: Val, count: int = CANDIDATES) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (Q, count) and their cosines, best first."""
    top = val.coarse.topk(count)
    return top.indices, top.values


def places(score: torch.Tensor, rows: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Rank (Q,) of the true picture, 0 = first, ties against us; 10**6 when not a candidate."""
    mine = rows == truth[:, None]  # (Q, n)
    own = score.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    place = ((score >= own) & ~mine).sum(1)  # (Q,)
    return place.masked_fill(~mine.any(1), 10**6)


def recalls(place: torch.Tensor) -> dict[str, float]:
    """R@1, 5, 10 in percent."""
    return {f"r{k}": round(100 * (place < k).float().mean().item(), 2) for k in (1, 5, 10)}


def paired_p(a: torch.Tensor, b: torch.Tensor, truth: torch.Tensor, flips: int = 20000) -> float:
    """Two-sided sign-flip test over pictures: is mean hit rate of b different from a's?"""
    n = int(truth.max()) + 1
    diff = torch.zeros(n).index_add_(0, truth, (b.float() - a.float()))  # (N,)
    signs = np.random.default_rng(0).integers(0, 2, (flips, n), dtype=np.int8) * 2 - 1
    null = np.abs(signs.astype(np.float32) @ diff.numpy())
    return float((np.sum(null >= abs(diff.sum().item()) - 1e-6) + 1) / (flips + 1))


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("--scorer", default="cross")
    args = ap.parse_args()
    val = encode_val(Path(os.environ["MMSEARCH_FLICKR8K"]))
    rows, cosine = candidates(val)
    first = places(cosine, rows, val.truth)
    every = torch.arange(val.coarse.shape[1]).expand_as(val.coarse)  # (Q, N)
    out: dict[str, Any] = {"coarse": recalls(places(val.coarse, every, val.truth))}
    print(json.dumps(out), flush=True)
    scorer = load_scorer(args.scorer, val.spec, device="cpu")
    assert isinstance(scorer, HeadScorer)
    start = time.time()
    rank, _ = scorer.judge(val.text, val.codes, rows)
    out["pairs_per_s"] = round(rank.numel() / (time.time() - start))
    fusion = scorer.card.fusion
    second = places(fusion.scale * cosine + fusion.weight * rank, rows, val.truth)
    out["reranked"] = recalls(second)
    out["head alone"] = recalls(places(rank, rows, val.truth))
    out["p_r1"] = paired_p(first < 1, second < 1, val.truth)
    out["p_r10"] = paired_p(first < 10, second < 10, val.truth)
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
