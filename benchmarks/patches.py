"""What a smaller patch store costs: bytes a picture, recall after reranking, time to read.

    MMSEARCH_FLICKR8K=/data/flickr8k python benchmarks/patches.py

Encodes the pictures of a split once, brings their patches to each stored form, and reranks the
same coarse candidates with the same head. Reading is timed on shards written to disk whose pages
the system has been told to drop: 100 pictures of 7,000, anywhere in them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from mmsearch.indexing.encoder import load_encoder
from mmsearch.indexing.images import decode
from mmsearch.indexing.shards import LocalStorage, RowFormat, Shards, quantise, stored_form
from mmsearch.rerank.fitting import hits
from mmsearch.rerank.scorers import load_scorer

ROWS, CANDIDATES, ROUNDS = 7000, 100, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(os.environ.get("MMSEARCH_FLICKR8K", "."))
    parser.add_argument("--captions", type=Path, default=root / "captions.csv")
    parser.add_argument("--images", type=Path, default=root / "images")
    parser.add_argument("--split", default="val")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--every", type=int, default=1, help="take each n-th caption only")
    args = parser.parse_args()
    encoder = load_encoder("bundled", device="cpu", precision="fp32")
    spec = encoder.spec
    with args.captions.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == args.split]
    names = {name: at for at, name in enumerate(dict.fromkeys(row["image"] for row in rows))}
    rows = rows[:: args.every]
    batches = [list(names)[at : at + 50] for at in range(0, len(names), 50)]
    encoded = [
        encoder.encode_images(
            np.stack([decode(args.images / name, spec.input_spec).pixels for name in batch])
        )
        for batch in batches
    ]
    pooled = torch.cat([each.pooled for each in encoded])  # (N, D)
    patches = torch.cat([each.patches for each in encoded])  # (N, P, C)
    text = encoder.encode_texts([row["caption"] for row in rows])
    truth = torch.tensor([names[row["image"]] for row in rows])  # (Q,)
    coarse, found = (text.pooled @ pooled.T).topk(args.candidates)  # (Q, n) twice
    scorer = load_scorer("cross", spec, device="cpu")
    print("| codes | pool | bytes a picture | R@1 | R@5 | R@10 | 100 read cold, ms | warm, ms |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for codes, pool in itertools.product(("fp16", "int8", "int4"), ("1", "2", "cluster:25")):
        row = RowFormat(spec.embed_dim, spec.patch_dim, spec.grid, codes, pool)
        batch = replace(stored_form(patches, row), pooled=pooled)
        scores = scorer.score(text, batch, found, coarse).rank  # (Q, n)
        recall = 100 * hits(scores, found == truth.unsqueeze(1)).mean(axis=0)  # (3,)
        cold, warm = read_times(row, pooled, patches)
        print(
            f"| {codes} | {pool} | {row.patches.itemsize:,} | "
            + " | ".join(f"{value:.2f}" for value in recall)
            + f" | {cold:.1f} | {warm:.1f} |",
            flush=True,
        )


def read_times(row: RowFormat, pooled: torch.Tensor, patches: torch.Tensor) -> tuple[float, float]:
    """Milliseconds to read 100 pictures' patches from disk, and again from the page cache."""
    generator = np.random.default_rng(0)
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as temporary:
        storage = LocalStorage(Path(temporary))
        records = quantise(patches[:ROWS], row)
        copies = -(-ROWS // len(records))
        vectors = np.tile(pooled.numpy(), (copies, 1))
        Shards(storage, row).append((0, 0), vectors, np.tile(records, copies))
        positions = np.zeros((CANDIDATES, 2), np.int64)
        for _ in range(ROUNDS):
            positions[:, 1] = generator.choice(ROWS, CANDIDATES, replace=False)
            for path in Path(temporary).iterdir():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            shards = Shards(storage, row)
            for times in (cold, warm):
                start = time.perf_counter()
                shards.patches(positions)
                times.append(1000 * (time.perf_counter() - start))
    return statistics.median(cold), statistics.median(warm)


if __name__ == "__main__":
    main()
