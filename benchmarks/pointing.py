"""Does attention look at the thing that is named? The pointing game on collages.

    python benchmarks/pointing.py [--collages 150] [--scorers cross late]

Each collage holds two photographed things in known boxes (tests/collages.py). For each thing, "a
photo of a NAME" is explained, and the peak of the map of its noun (of the phrase, for ``late``)
counts if it lies in that thing's box (Zhang et al., arXiv 1608.00507). Chance is the box's share
of the picture; "the other" is how often the peak lies in the other thing's box: a map that shows
things but not which one would score alike in both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmsearch.core.types import PatchBatch
from mmsearch.indexing.encoder import load_encoder
from mmsearch.rerank.explain import Explanation, explain
from mmsearch.rerank.late import LateScorer
from mmsearch.rerank.scorers import Scorer, load_scorer

from tests.collages import SIDE, Collage, Pasted, make_collages


def peak(found: Explanation, noun: str, by: str) -> tuple[float, float]:
    """Where the map of a noun, or the patches' worth, is highest: x, y in pixels."""
    if by == "worth":
        grid = found.contributions  # (h, w)
    else:
        at = [i for i, word in enumerate(found.words) if noun in word]
        grid = found.maps[at[-1]]  # (h, w)
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    return (column + 0.5) / grid.shape[1] * SIDE, (row + 0.5) / grid.shape[0] * SIDE


def inside(point: tuple[float, float], thing: Pasted) -> bool:
    left, top, right, bottom = thing.box
    return left <= point[0] <= right and top <= point[1] <= bottom


def play(encoder, scorer: Scorer, collages: list[Collage], by: str) -> dict[str, float]:
    """Percent of peaks in the named box and in the other one, and chance."""
    pixels = np.stack([np.asarray(each.picture) for each in collages])
    images = encoder.encode_images(pixels)
    named, other, chance = [], [], []
    for row, collage in enumerate(collages):
        one = slice(row, row + 1)
        image = PatchBatch(images.patches[one], None, images.grid, pooled=images.pooled[one])
        for thing, rest in (collage.things, collage.things[::-1]):
            text = encoder.encode_texts([f"a photo of a {thing.name}"])
            point = peak(explain(scorer, text, image), thing.name.split()[-1], by)
            named.append(inside(point, thing))
            other.append(inside(point, rest))
            left, top, right, bottom = thing.box
            chance.append((right - left) * (bottom - top) / SIDE**2)
    return {
        "named": 100 * float(np.mean(named)),
        "other": 100 * float(np.mean(other)),
        "chance": 100 * float(np.mean(chance)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collages", type=int, default=150)
    parser.add_argument("--scorers", nargs="+", default=["late", "cross"])
    args = parser.parse_args()
    encoder = load_encoder("bundled", device="cpu")
    collages = make_collages(args.collages, seed=0)
    print(f"{2 * args.collages} named things; percent of peaks in")
    print(f"{'scorer':8} {'peak of':16} {'named box':>10} {'other box':>10} {'chance':>8}")
    for name in args.scorers:
        if name == "late":
            scorer: Scorer = LateScorer(lambda texts: encoder.encode_texts(texts).pooled)
        else:
            scorer = load_scorer(name, encoder.spec)
        for by in ("map", "worth"):
            found = play(encoder, scorer, collages, by)
            print(f"{name:8} {by:16} {found['named']:10.1f} {found['other']:10.1f} "
                  f"{found['chance']:8.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
