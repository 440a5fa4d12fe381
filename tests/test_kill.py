"""kill -9 at any moment: the next run makes the index whole, row by row."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mmsearch.indexing.check import check
from mmsearch.indexing.index import ImageIndex

from .test_index import SPEC, StandIn, contents, make_pictures

# A slow stand-in for the model, so that there are moments to be killed at.
RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.test_index import SPEC, StandIn
from mmsearch.indexing.index import ImageIndex
class Slow(StandIn):
    def encode_images(self, pixels):
        time.sleep(0.02)
        return super().encode_images(pixels)
index, photos = Path(sys.argv[1]), Path(sys.argv[2])
exists = (index / "manifest.json").exists()
with ImageIndex.open(index) if exists else ImageIndex.create(index, SPEC) as opened:
    print("ready", flush=True)
    opened.add([photos], Slow(), batch_size=4)
"""
ROOT = str(Path(__file__).parent.parent)


def start(index: Path, photos: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUN, str(index), str(photos), ROOT]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


@pytest.mark.parametrize("seed", range(3))
def test_killed_runs_are_completed(tmp_path, seed):
    photos = tmp_path / "photos"
    make_pictures(photos, 120)
    with ImageIndex.create(tmp_path / "whole", SPEC) as whole:
        whole.add([photos], StandIn())
        expected = contents(whole)
    moments = random.Random(seed)
    for _ in range(2):
        process = start(tmp_path / "killed", photos)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with ImageIndex.open(tmp_path / "killed") as index:
        for finding in check(index):
            assert finding.harmless, finding.message
        index.add([photos], StandIn())
        assert check(index) == []
        assert contents(index) == expected


def test_a_killed_run_leaves_no_lock_and_is_searchable(tmp_path):
    photos = tmp_path / "photos"
    make_pictures(photos, 60)
    process = start(tmp_path / "index", photos)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.kill()
    process.wait()
    process.stdout.close()
    with ImageIndex.open(tmp_path / "index") as index:
        if len(index):
            found = index.search(index.pooled()[1][:1], 20)
            index.records(found.ids[found.ids >= 0].tolist())


def test_a_removal_that_is_cut_off_is_completed_by_the_next_run(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    make_pictures(photos, 6)
    with ImageIndex.create(tmp_path / "index", SPEC) as index:
        index.add([photos], StandIn())
        before = contents(index)

        def cut_off(ids) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(index.parts[0], "remove", cut_off)
            with pytest.raises(KeyboardInterrupt):
                index.remove([photos / "0000.png"])
    with ImageIndex.open(tmp_path / "index") as index:
        (finding,) = check(index)
        assert finding.harmless
        index.add([photos], StandIn())
        assert check(index) == []
        assert contents(index) == before
        assert not index.stats().unfinished, "though there was nothing to embed"
