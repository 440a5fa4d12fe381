"""What an evaluation costs: time against asking one by one, memory at 50,000 x 100,000.

    python benchmarks/eval.py captions [--captions FILE --images DIR --split val] [--index DIR]
    python benchmarks/eval.py large [--queries 50000] [--images 100000] [--width 512]

``captions`` evaluates every caption, coarse stage only, on an index that has the images already,
as a command from start to end; then asks some of the captions one by one through the same
``Searcher`` that ``mmsearch query`` uses, in one process with everything loaded. ``large`` runs a
whole evaluation of random vectors, intervals included. Peak memory is the operating system's.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ASKED = 500  # captions asked one by one


def run(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and its peak memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def measure_captions(captions: Path, images: Path, split: str | None, index: Path) -> None:
    command = [
        sys.executable, "-m", "mmsearch.cli", "eval", str(captions), "--images", str(images),
        "--index", str(index), "--candidates", "0", "--direction", "t2i",
    ]  # fmt: skip
    command += ["--split", split] if split else []
    took, memory = run(command)
    print(f"first run, images embedded if the index lacks them: {took:6.1f} s, {memory:,.0f} MiB")
    took, memory = run(command)

    from mmsearch.evaluation.datasets import read_captions
    from mmsearch.indexing.index import ImageIndex
    from mmsearch.rerank.searcher import Query, Searcher

    read = read_captions(captions, images, split)
    count = len(read.captions)
    print(f"{count:,} captions over {len(read.images):,} images, features indexed, coarse only:")
    print(f"  mmsearch eval, start to end      {took:6.1f} s, peak {memory:,.0f} MiB")
    with ImageIndex.open(index) as opened:
        searcher = Searcher(opened, "coarse")
        texts = [caption.text for caption in read.captions][:ASKED]
        for text in texts[:10]:
            searcher.search([Query(text)])
        start = time.perf_counter()
        for text in texts:
            searcher.search([Query(text)])
        alone = (time.perf_counter() - start) / len(texts)
    print(f"  one by one, everything loaded    {alone * count:6.1f} s ({1000 * alone:.1f} ms each)")
    print(f"  eval is {alone * count / took:.1f} times as fast")


def measure_large(queries: int, images: int, width: int) -> None:
    import numpy as np
    import torch
    from mmsearch.core.types import TextFeatures
    from mmsearch.evaluation.datasets import Caption, CaptionSet
    from mmsearch.evaluation.evaluate import Plan, evaluate
    from mmsearch.evaluation.gallery import Gallery

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((images, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    class Near:
        """Texts whose vectors lie near those of their images."""

        def encode_texts(self, texts: list[str]) -> TextFeatures:
            rows = np.array([int(text) for text in texts]) % images
            noise = rng.standard_normal((len(texts), width), dtype=np.float32)
            pooled = torch.from_numpy(vectors[rows] + 0.25 * noise)
            mask = torch.ones(len(texts), 1, dtype=torch.bool)
            return TextFeatures(
                tuple(texts),
                torch.nn.functional.normalize(pooled, dim=-1),
                pooled[:, None],
                mask,
                tuple((text,) for text in texts),
            )

    names = tuple(f"{at}.jpg" for at in range(images))
    paths = tuple(map(Path, names))
    captions = tuple(
        Caption(str(at), str(at), at % images, ((at % images, 1),)) for at in range(queries)
    )
    gallery = Gallery(names, paths, np.arange(images), vectors, _no_patches)
    encoder: Any = Near()
    start = time.perf_counter()
    (direction,) = evaluate(
        CaptionSet(Path(), "table", paths, names, captions, ()),
        gallery,
        encoder,
        [],
        Plan(candidates=0),
    )
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (row,) = direction.rows
    print(f"{queries:,} queries x {images:,} images, {width} wide, exact, intervals included:")
    print(f"  {took:.1f} s (search {row.seconds:.1f} s), peak {peak:,.0f} MiB")
    print(f"  R@1 {100 * row.estimates['hit@1'].value:.1f}, a matrix of all scores would take "
          f"{queries * images * 4 / 2**30:.1f} GiB")  # fmt: skip


def _no_patches(rows: object) -> Any:
    raise AssertionError("a coarse evaluation reads no patches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    flickr8k = Path(os.environ.get("MMSEARCH_FLICKR8K", "."))
    small = parts.add_parser("captions")
    small.add_argument("--captions", type=Path, default=flickr8k / "captions.csv")
    small.add_argument("--images", type=Path, default=flickr8k / "images")
    small.add_argument("--split", default="val")
    small.add_argument("--index", type=Path, help="kept if named; else made and removed")
    large = parts.add_parser("large")
    large.add_argument("--queries", type=int, default=50_000)
    large.add_argument("--images", type=int, default=100_000)
    large.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    if options.part == "large":
        measure_large(options.queries, options.images, options.width)
        return
    with tempfile.TemporaryDirectory() as scratch:
        index = options.index or Path(scratch) / "index"
        measure_captions(options.captions, options.images, options.split, index)


if __name__ == "__main__":
    main()
