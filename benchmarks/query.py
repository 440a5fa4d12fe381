"""What a query costs: cold from the shell, warm in one process, and where the time goes.

    python benchmarks/query.py --images FOLDER [--index DIR] [--pictures 7000] [--runs 7]

Cold is the whole command, ``mmsearch query TEXT``, interpreter start included, over an index of
real pictures with 100 candidates reranked; it is given as a ratio to ``python -c "import torch"``
measured in the same run, interleaved, since nothing that needs torch can be faster than that.
Warm is ``Searcher.search`` on loaded models. Medians; p95 for warm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUERIES = [
    "a red car",
    "two dogs running on the beach",
    "a man climbing a rock wall",
    "children playing in the snow",
    "a woman in a white dress",
    "a football player with the ball",
    "a person riding a bike on a dirt road",
    "people sitting at a table outside",
]


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure_cold(index: Path, runs: int) -> None:
    python = sys.executable
    bare, query, coarse = [], [], []
    ask = [python, "-m", "mmsearch.cli", "query", "--index", str(index), "--json"]
    for run in range(runs + 1):
        text = QUERIES[run % len(QUERIES)]
        timings = (
            seconds([python, "-c", "import torch"]),
            seconds([*ask, text]),
            seconds([*ask, text, "--no-rerank"]),
        )
        if run:  # the first fills the page cache
            for kept, timing in zip((bare, query, coarse), timings, strict=True):
                kept.append(timing)
    base, cold, without = (statistics.median(each) for each in (bare, query, coarse))
    print(f'python -c "import torch"            {base:6.2f} s   (median of {runs})')
    print(f"mmsearch query, 100 reranked        {cold:6.2f} s   ratio {cold / base:.2f}")
    print(f"mmsearch query --no-rerank          {without:6.2f} s   ratio {without / base:.2f}")


def measure_warm(index: Path, rounds: int = 8) -> None:
    steps: dict[str, float] = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        steps[name] = now - start
        start = now

    import torch  # noqa: F401

    lap("import torch")
    from mmsearch.indexing.index import ImageIndex

    lap("import mmsearch.indexing.index")
    opened = ImageIndex.open(index)
    lap("open the index (Milvus Lite, catalog, shards)")
    from mmsearch.rerank.searcher import Query, Searcher

    searcher = Searcher(opened)
    _ = searcher.text_encoder
    lap("load the text tower")
    _ = searcher.scorer
    lap("load the scorer")
    searcher.search([Query(QUERIES[0])])
    lap("first query")
    print("\nwhere a cold query's time goes, in one process:")
    for name, took in steps.items():
        print(f"  {took * 1000:8.0f} ms  {name}")

    parts: dict[str, list[float]] = {"text encoding": [], "coarse search": [], "whole query": []}
    for text in QUERIES * rounds:
        begin = time.perf_counter()
        features = searcher.text_encoder.encode_texts([text])
        encoded = time.perf_counter()
        opened.search(features.pooled.numpy(), 100)
        searched = time.perf_counter()
        searcher.search([Query(text)])
        parts["text encoding"].append(encoded - begin)
        parts["coarse search"].append(searched - encoded)
        parts["whole query"].append(time.perf_counter() - searched)
    print(f"\nwarm, {len(opened):,} pictures, 100 candidates, scorer {searcher.scorer_name}:")
    for name, timings in parts.items():
        ordered = sorted(timings)
        p50 = statistics.median(ordered) * 1000
        p95 = ordered[int(0.95 * (len(ordered) - 1))] * 1000
        print(f"  {name:14s} p50 {p50:6.1f} ms  p95 {p95:6.1f} ms")
    opened.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of pictures to index")
    parser.add_argument("--index", type=Path, help="index to use, made if absent")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    flickr8k = os.environ.get("MMSEARCH_FLICKR8K")
    images = options.images or (Path(flickr8k) / "images" if flickr8k else None)
    with tempfile.TemporaryDirectory() as scratch:
        index = options.index or Path(scratch) / "index"
        if not (index / "manifest.json").exists():
            if images is None:
                sys.exit("give --images FOLDER, or set MMSEARCH_FLICKR8K")
            command = [sys.executable, "-m", "mmsearch.cli", "index", str(images)]
            subprocess.run([*command, "--index", str(index), "--model", "bundled"], check=True)
        measure_cold(index, options.runs)
        measure_warm(index)


if __name__ == "__main__":
    main()
