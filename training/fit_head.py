"""Fit how much the cosine counts beside the head, calibrate the probability, write the head.

    MMSEARCH_FLICKR8K=... python training/fit_head.py WORK/head/head.pt indexing/bundled/heads/cross

Two numbers come from val: the head's weight beside the cosine, and Platt's slope and bias. So
that the reported figures are honest, each half of the val pictures is scored with the weight
fitted on the other half; the shipped weight is fitted on both. A head that does not beat the
coarse order is not written.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from evaluate import candidates, encode_val, paired_p, places, recalls
from mmsearch.rerank.checkpoint import Fusion, HeadCard, save_head
from mmsearch.rerank.fitting import Judged, calibrate
from mmsearch.rerank.heads import HeadConfig, build_head
from mmsearch.rerank.scorers import HeadScorer

SCALE = 24.0  # the encoder's own temperature, about
WEIGHTS = tuple(0.0 + 0.05 * i for i in range(61))


def best_weight(cosine, rank, rows, truth) -> float:
    """The weight with the best mean reciprocal rank; the middle of the near-best ones."""
    mrr = []
    for w in WEIGHTS:
        place = places(SCALE * cosine + w * rank, rows, truth).float()
        mrr.append((1 / (place + 1)).mean().item())
    good = [w for w, m in zip(WEIGHTS, mrr, strict=True) if m >= max(mrr) - 5e-4]
    return sum(good) / len(good)


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("checkpoint", type=Path)
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    saved = torch.load(args.checkpoint, weights_only=True)
    head = build_head(replace(HeadConfig.from_dict(saved["config"]), dropout=0.0))
    head.load_state_dict({k: v.half().float() for k, v in saved["head"].items()})
    val = encode_val(Path(os.environ["MMSEARCH_FLICKR8K"]))
    rows, cosine = candidates(val)
    card = HeadCard("cross", val.spec.weights_hash, val.spec.patch_kind, Fusion(SCALE))
    rank, match = HeadScorer(head.eval(), card, torch.device("cpu")).judge(
        val.text, val.codes, rows
    )
    first = places(cosine, rows, val.truth)
    honest = torch.empty_like(first)
    half = torch.randperm(int(val.truth.max()) + 1, generator=torch.Generator().manual_seed(0)) % 2
    for fold in (0, 1):
        on, off = half[val.truth] == fold, half[val.truth] != fold
        w = best_weight(cosine[off], rank[off], rows[off], val.truth[off])
        honest[on] = places(SCALE * cosine[on] + w * rank[on], rows[on], val.truth[on])
        print(f"fold {fold}: weight {w:.3f}")
    weight = best_weight(cosine, rank, rows, val.truth)
    coarse, fused = recalls(first), recalls(honest)
    shipped = recalls(places(SCALE * cosine + weight * rank, rows, val.truth))
    alone = recalls(places(rank, rows, val.truth))
    figures = {f"{k}_coarse": v for k, v in coarse.items()}
    figures |= {f"{k}_reranked": v for k, v in fused.items()}
    figures |= {f"{k}_head_alone": v for k, v in alone.items()}
    for k in (1, 5, 10):
        figures[f"p_r{k}"] = round(paired_p(first < k, honest < k, val.truth), 5)
    figures["candidates"] = float(rows.shape[1])
    print(json.dumps({"weight": weight, "both halves": shipped, **figures}, indent=2))
    if fused["r1"] <= coarse["r1"]:
        raise SystemExit("the head does not beat the coarse order; nothing written")
    judged = Judged(cosine, rank, match, rows == val.truth[:, None], val.truth.numpy())
    calibration = calibrate(judged, SCALE * cosine + weight * rank)
    fusion = Fusion(SCALE, weight, (rank.mean()).item())
    card = replace(card, fusion=fusion, calibration=calibration, figures=figures)
    save_head(args.out, head.half(), card)
    print(card)


if __name__ == "__main__":
    main()
