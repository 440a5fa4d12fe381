"""Decode mutated pictures: none may crash, hang, or take memory that is not given back.

python benchmarks/fuzz.py --pictures 10000
"""

from __future__ import annotations

import argparse
import collections
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmsearch.indexing.images import UndecodableImage, decode  # noqa: E402

from tests.test_images import SQUARE, mutate  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    reasons: collections.Counter[str] = collections.Counter()
    good, slowest = 0, 0.0
    for number in range(arguments.pictures):
        started = time.perf_counter()
        try:
            decode(mutate(arguments.seed + number), SQUARE)
            good += 1
        except UndecodableImage as error:
            reasons[error.message[:60]] += 1
        slowest = max(slowest, time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"{arguments.pictures:,} mutated pictures: {good:,} decoded, {reasons.total():,} refused")
    print(f"slowest {slowest * 1000:.0f} ms; peak memory {peak:.0f} MB")
    for reason, count in reasons.most_common(12):
        print(f"{count:7,}  {reason}")


if __name__ == "__main__":
    main()
