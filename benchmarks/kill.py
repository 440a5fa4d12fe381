"""Kill an index run with SIGKILL at random moments and compare with one never interrupted.

    python benchmarks/kill.py --kills 40 --work DIR

Every killed run is followed by `check` (nothing may be wrong that the next run does not complete)
and, after every few kills, by a whole run whose index must equal the undisturbed one row by row.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmsearch.indexing.check import check  # noqa: E402
from mmsearch.indexing.index import ImageIndex  # noqa: E402

from tests.test_index import SPEC, StandIn, contents, make_pictures  # noqa: E402
from tests.test_kill import start  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--every", type=int, default=4, help="kills before an index is completed")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work: Path = arguments.work
    shutil.rmtree(work, ignore_errors=True)
    photos = work / "photos"
    make_pictures(photos, arguments.pictures)
    with ImageIndex.create(work / "whole", SPEC) as whole:
        whole.add([photos], StandIn())
        expected = contents(whole)
    moments = random.Random(arguments.seed)
    harmless = 0
    for kill in range(1, arguments.kills + 1):
        process = start(work / "killed", photos)
        assert process.stdout is not None
        if moments.random() < 0.8:  # else killed while it starts
            process.stdout.readline()
        time.sleep(moments.uniform(0, 2.5))
        ended = process.poll()
        process.kill()
        process.wait()
        if (work / "killed" / "manifest.json").exists():
            with ImageIndex.open(work / "killed") as index:
                findings = check(index)
                bad = [finding.message for finding in findings if not finding.harmless]
                assert not bad, bad
                harmless += bool(findings)
                print(f"kill {kill}: {len(index)} pictures in", "" if ended is None else "(over)")
        if kill % arguments.every == 0:
            opened = (
                ImageIndex.open(work / "killed")
                if (work / "killed" / "manifest.json").exists()
                else ImageIndex.create(work / "killed", SPEC)
            )
            with opened as index:
                index.add([photos], StandIn())
                assert check(index) == []
                assert contents(index) == expected, "the completed index is another"
            shutil.rmtree(work / "killed")
    print(
        f"{arguments.kills} kills: nothing wrong, {harmless} times something that the next run "
        f"completed; every completed index equal to the undisturbed one, row by row"
    )


if __name__ == "__main__":
    main()
