"""What attention learns that a pooled vector cannot: composed scenes, trained and asked for.

    python benchmarks/scenes.py --groups 1500 --unseen 100

Draws scenes in groups of eight that differ only in which thing has which colour, size and place
(see tests/scenes.py), indexes them with the bundled encoder, runs ``mmsearch train`` on one part
and asks for the other: recall@1 of each caption among its group's eight pictures, and in each pair
of pictures that differ in one respect only. Controls give the head the patches of other pictures,
or those of the right one in random places.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmsearch.core.types import PatchBatch
from mmsearch.indexing.encoder import load_text_encoder
from mmsearch.indexing.index import ImageIndex
from mmsearch.rerank.scorers import load_scorer

from tests.scenes import GROUP, SWAPS, compose, write

# A narrower head, and negatives from the group of eight itself and another.
SMALL = (
    *("--width", 128, "--group", 16, "--pool", 16, 16, "--learning-rate", 0.001),
    *("--patience", 20, "--val-share", 0.05),
)


def mmsearch(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "mmsearch.cli", *map(str, arguments)], check=True, stdout=2
    )


def recall(
    index_dir: Path, folder: Path, captions: list[str], scorer: str
) -> dict[str, list[float]]:
    """Hits by coarse score, by the scorer, and by the controls."""
    with ImageIndex.open(index_dir) as index:
        ids = [index.id_of((folder / f"{at:05}.png").absolute()) for at in range(len(captions))]
        spec = index.manifest.encoder
        text = load_text_encoder(spec).encode_texts(captions)
        known, vectors = index.pooled()
        row = {int(id_): at for at, id_ in enumerate(known)}
        pooled = torch.from_numpy(vectors[[row[int(id_)] for id_ in ids]])  # (M, D)
        patches = index.patches(ids)
        judge = load_scorer(scorer, spec, folder=index_dir / "heads")
    own = torch.arange(len(captions))
    rows = (own // GROUP * GROUP).unsqueeze(1) + torch.arange(GROUP)  # (Q, 8)
    coarse = (text.pooled.unsqueeze(1) * pooled[rows]).sum(-1)  # (Q, 8)
    generator = torch.Generator().manual_seed(0)
    others = torch.randperm(len(captions), generator=generator)
    places = torch.stack([torch.randperm(patches.grid.size, generator=generator) for _ in own])
    shuffled = patches.codes.gather(1, places.unsqueeze(-1).expand_as(patches.codes))

    def hits(scores: torch.Tensor) -> list[float]:
        """Percent ahead of all seven, and of that in which only one of SWAPS is otherwise."""
        mine = own % GROUP  # (Q,)
        ahead = scores.gather(1, mine.unsqueeze(1)) > scores  # (Q, 8); ties count against us
        others = [mine ^ 1 << bit for bit in range(len(SWAPS))]
        pairs = [ahead.gather(1, other.unsqueeze(1)).squeeze(1) for other in others]
        first = ahead.sum(1) == GROUP - 1  # (Q,)
        return [100 * float(each.float().mean()) for each in (first, *pairs)]

    def scored(codes: torch.Tensor) -> list[float]:
        batch = PatchBatch(codes, None, patches.grid, pooled=patches.pooled)
        return hits(judge.score(text, batch, rows, coarse).rank)

    return {
        "coarse": hits(coarse),
        scorer: scored(patches.codes),
        "patches of another picture": scored(patches.codes[others]),
        "patches in random places": scored(shuffled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=1500, help="groups of eight to train on")
    parser.add_argument("--unseen", type=int, default=100, help="groups of eight to ask for")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=["cross"])
    parser.add_argument("--seed", type=int, default=0, help="of the training, not of the scenes")
    parser.add_argument("--work", type=Path, help="keep scenes and index here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        unseen = compose(args.unseen, seed=2)
        table = write(compose(args.groups, seed=1), work / "train")
        write(unseen, work / "unseen")
        mmsearch("index", work / "train", work / "unseen", "--index", work / "index",
                 "--model", "bundled")  # fmt: skip
        for kind in args.kinds:
            start = time.perf_counter()
            mmsearch("train", table, "--index", work / "index", "--scorer", kind, "--force",
                     "--epochs", args.epochs, "--seed", args.seed, *SMALL)  # fmt: skip
            seconds = time.perf_counter() - start
            figures = recall(
                work / "index", work / "unseen", [each.caption for each in unseen], kind
            )
            print(f"{kind}, trained {seconds:.0f} s on {GROUP * args.groups} scenes")
            columns = ("of eight", *SWAPS)
            print(f"  {'recall@1, %':<28}", *(f"{each:>8}" for each in columns))
            for name, values in figures.items():
                print(f"  {name:<28}", *(f"{value:8.2f}" for value in values))


if __name__ == "__main__":
    main()
