"""Fit how the head joins the cosine, calibrate the probability, write head and caption bank.

    MMSEARCH_FLICKR8K=... python training/fit_head.py WORK/head/head.pt WORK/clipart.csv \
        indexing/bundled/heads/cross

Four numbers come from val: the weights of popularity and rank term, and Platt's slope and bias.
So that the reported figures are honest, each half of the val pictures is scored with the weights
fitted on the other half; the shipped weights are fitted on both. The bank holds training captions
and titles of training drawings. A head that does not beat the coarse order is not written.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import torch
from mmsearch.indexing.encoder import load_text_encoder
from mmsearch.rerank.checkpoint import Fusion, HeadCard, save_head
from mmsearch.rerank.fitting import Fit, Judged, calibrate, fit_fusion, hits, paired_p, spread_scale
from mmsearch.rerank.heads import HeadConfig, build_head
from mmsearch.rerank.querybank import Querybank
from mmsearch.rerank.scorers import HeadScorer
from texts import read_clipart
from val import candidates, encode_val

CAPTIONS, TITLES = 4000, 1000


def bank_texts(captions: Path, drawings: Path, seed: int) -> list[str]:
    """Draw the bank's texts from what the encoder was trained on."""
    rng = random.Random(seed)
    with captions.open(newline="", encoding="utf-8") as file:
        said = [row["caption"] for row in csv.DictReader(file) if row["split"] == "train"]
    clipart = read_clipart(drawings)
    titles = sorted({clipart.texts[i][0] for i in clipart.where("train")})
    return rng.sample(said, CAPTIONS) + rng.sample(titles, TITLES)


def figures_of(fit: Fit, alone: Fit, judged: Judged) -> dict[str, float]:
    """Recall in percent of every order, each half ranked with the other half's weights."""
    orders = {"coarse": fit.coarse_hits, "bank": fit.bank_hits, "head": alone.hits, "": fit.hits}
    out: dict[str, float] = {}
    for column, k in enumerate((1, 5, 10)):
        for name, found in orders.items():
            out[f"r{k}_{name}".rstrip("_")] = round(100 * float(found[:, column].mean()), 2)
        p = paired_p(fit.hits[:, column], fit.coarse_hits[:, column], judged.picture, 0)
        out[f"p_r{k}"] = round(p, 5)
    return out | {"p": out["p_r1"], "candidates": float(judged.coarse.shape[1])}


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("checkpoint", type=Path)
    ap.add_argument("drawings", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--seed", type=int, default=1)
    args = ap.parse_args()
    root = Path(os.environ["MMSEARCH_FLICKR8K"])
    saved = torch.load(args.checkpoint, weights_only=True)
    head = build_head(replace(HeadConfig.from_dict(saved["config"]), dropout=0.0))
    head.load_state_dict({k: v.half().float() for k, v in saved["head"].items()})
    val = encode_val(root)
    texts = bank_texts(root / "captions.csv", args.drawings, args.seed)
    bank = Querybank(load_text_encoder(val.spec).encode_texts(texts).pooled)
    rows, cosine = candidates(val)
    card = HeadCard("cross", val.spec.weights_hash, val.spec.patch_kind, Fusion(0.0))
    rank, match = HeadScorer(head.eval(), card, torch.device("cpu")).judge(
        val.text, val.codes, rows
    )
    scale = spread_scale(cosine)
    popularity = bank.popularity(val.pooled, scale)[rows]  # (Q, N)
    relevant = rows == val.truth[:, None]  # (Q, N)
    judged = Judged(scale, cosine, popularity, rank, match, relevant, val.truth.numpy())
    fit = fit_fusion(judged)
    without_bank = fit_fusion(judged._replace(popularity=torch.zeros_like(popularity)))
    figures = figures_of(fit, without_bank, judged)
    print(json.dumps(figures, indent=2))
    if figures["r1"] <= figures["r1_coarse"]:
        raise SystemExit("the head does not beat the coarse order; nothing written")
    fused = fit.fused(judged)  # (Q, N)
    offset = float((fused - scale * cosine).mean())
    fusion = Fusion(scale, fit.weight, fit.popularity_weight, offset)
    shipped = 100 * hits(fused, relevant)[:, 0].mean()
    print(f"recall at 1 with the weights as shipped: {shipped:.2f}")
    card = replace(card, fusion=fusion, calibration=calibrate(judged, fused), figures=figures)
    save_head(args.out, head.half(), card, bank)
    print(card)


if __name__ == "__main__":
    main()
