"""Shards reached through fsspec: in memory, and read from a web server by ranges."""

from __future__ import annotations

import errno
import http.server
import os
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from mmsearch.core.errors import BadIndex, StorageError, UsageError
from mmsearch.core.types import Candidates, TextFeatures
from mmsearch.indexing.index import ImageIndex
from mmsearch.indexing.remote_shards import RemoteStorage
from mmsearch.rerank.rerank import rerank
from mmsearch.rerank.searcher import Searcher

from .test_index import SPEC, StandIn, contents, make_pictures

KIND = np.dtype(("<f4", (4,)))


def numbered(start: int, count: int) -> np.ndarray:
    return np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], 4, axis=1)


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/shards"


@pytest.fixture
def storage(url: str, tmp_path: Path) -> RemoteStorage:
    return RemoteStorage(url, tmp_path / "cache")


def count_fetches(storage: RemoteStorage, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    fetched: list[tuple] = []
    before = storage.fetch

    def fetch(wanted):
        fetched.extend(wanted)
        return before(wanted)

    monkeypatch.setattr(storage, "fetch", fetch)
    return fetched


def test_rows_come_back_in_the_order_asked_for(storage):
    storage.append("000000.pooled", 0, numbered(0, 5))
    storage.append("000000.pooled", 5, numbered(5, 3))
    rows = storage.rows("000000.pooled", KIND)
    assert len(rows) == 8
    assert rows[np.array([7, 0, 5, 0])][:, 0].tolist() == [7, 0, 5, 0]
    assert rows[6].tolist() == [6] * 4
    assert storage.names() == ["000000.pooled"]
    with pytest.raises(BadIndex):
        rows[np.array([8])]


def test_what_a_killed_run_left_is_overwritten(storage):
    storage.append("000000.pooled", 0, numbered(0, 5))
    storage.append("000000.pooled", 5, numbered(50, 5))
    storage.append("000000.pooled", 10, numbered(100, 5))
    storage.append("000000.pooled", 5, numbered(5, 2))  # the catalog knows of five rows only
    rows = storage.rows("000000.pooled", KIND)
    assert rows[np.arange(len(rows))][:, 0].tolist() == list(range(7))
    storage.append("000000.pooled", 3, numbered(30, 1))  # inside a part: its later rows go
    rows = storage.rows("000000.pooled", KIND)
    assert rows[np.arange(len(rows))][:, 0].tolist() == [0, 1, 2, 30]
    with pytest.raises(BadIndex):
        storage.append("000000.pooled", 9, numbered(0, 1))


def test_rows_are_read_once_and_in_few_ranges(url, tmp_path, monkeypatch):
    storage = RemoteStorage(url, tmp_path / "cache")
    kind = np.dtype(("<f4", (1 << 14,)))  # 64 KiB a row, so that far rows are far
    storage.append("000000.patches", 0, np.ones((100, 1 << 14), np.float32))
    fetched = count_fetches(storage, monkeypatch)
    rows = storage.rows("000000.patches", kind)
    assert rows[np.array([3, 4, 6, 90])].shape == (4, 1 << 14)
    assert [(start >> 16, end >> 16) for _, start, end in fetched] == [(3, 7), (90, 91)]
    fetched.clear()
    rows[np.array([5, 90, 4])]
    assert fetched == []
    again = RemoteStorage(url, tmp_path / "cache")  # another process finds them in the cache
    fetched = count_fetches(again, monkeypatch)
    assert (again.rows("000000.patches", kind)[np.array([3, 90])] == 1).all()
    assert fetched == []


def test_the_cache_notices_another_object_under_the_same_name(storage, monkeypatch):
    storage.append("000000.pooled", 0, numbered(0, 5))
    assert storage.rows("000000.pooled", KIND)[2][0] == 2
    storage.append("000000.pooled", 0, numbered(10, 5))
    assert storage.rows("000000.pooled", KIND)[2][0] == 12


def test_the_cache_stays_within_its_limit(url, tmp_path):
    storage = RemoteStorage(url, tmp_path / "cache", cache_bytes=100_000)
    for number in range(4):
        name = f"{number:06d}.pooled"
        storage.append(name, 0, np.ones((10_000, 4), np.float32))
        storage.rows(name, KIND)[np.arange(10_000)]
    storage.rows("000000.pooled", KIND)
    held = sum(path.stat().st_blocks * 512 for path in tmp_path.glob("cache/*/*.rows"))
    assert held <= 100_000


def test_a_full_disk_keeps_nothing_and_reads_on(storage, tmp_path, monkeypatch):
    def full(file: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    storage.append("000000.pooled", 0, numbered(0, 5))
    assert storage.rows("000000.pooled", KIND)[np.array([4, 1])][:, 0].tolist() == [4, 1]
    assert sum(path.stat().st_blocks for path in tmp_path.glob("cache/*/*")) == 0


def test_errors_name_the_url(tmp_path):
    with pytest.raises(UsageError, match="nosuch://"):
        RemoteStorage("nosuch://bucket/x", tmp_path)
    away = RemoteStorage("http://127.0.0.1:9/x", tmp_path)
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9/x"):
        away.rows("000000.pooled", KIND)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "photos", 12)
    return tmp_path / "photos"


@pytest.fixture
def remote_index(tmp_path: Path, url: str, photos: Path) -> Iterator[ImageIndex]:
    with ImageIndex.create(tmp_path / "index", SPEC, shards=url) as index:
        index.add([photos], StandIn(), batch_size=5)
        yield index


def test_an_index_with_remote_shards_equals_a_local_one(remote_index, photos, tmp_path, url):
    with ImageIndex.create(tmp_path / "local", SPEC) as local:
        local.add([photos], StandIn(), batch_size=5)
        assert contents(remote_index) == contents(local)
    make_pictures(photos, 4, 50)
    remote_index.add([photos], StandIn())
    assert len(remote_index) == 16
    path, manifest = remote_index.path, remote_index.manifest
    assert manifest.shards == url
    remote_index.close()
    with ImageIndex.open(path) as again:
        assert len(contents(again)) == 16
    with pytest.raises(BadIndex, match="already"):
        ImageIndex.create(tmp_path / "other", SPEC, shards=url)


def test_shards_are_read_from_a_web_server_by_ranges(remote_index, tmp_path, url, monkeypatch):
    memory = fsspec.filesystem("memory")
    root = tmp_path / "www"
    memory.get(url.removeprefix("memory://"), str(root), recursive=True)
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            wanted = self.headers.get("Range")
            if wanted is None:
                return super().send_head()
            asked.append(wanted)
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            part = content[first : last + 1]
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)
            return None

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{web.server_port}"
        storage = RemoteStorage(address, tmp_path / "cache")
        row = remote_index.manifest.row_format
        rows = storage.rows("000000.patches", row.patches)
        ids, _ = remote_index.pooled()
        catalog, shards, _ = remote_index.parts
        positions = catalog.positions(ids[:3].tolist())
        expected = shards.patches(positions)
        assert (rows[positions[:, 1]]["codes"] == expected.codes.numpy()).all()
        assert asked
        web.shutdown()


class Summing:
    """A scorer that looks at the patches."""

    name, needs_patches = "summing", True

    def score(self, text, patches, rows, coarse):
        values = patches.values().sum((1, 2)).abs() + 1  # (M,)
        return torch.where(rows >= 0, coarse + values[rows.clamp_min(0)], coarse), None


def remove_a_part(url: str) -> None:
    memory = fsspec.filesystem("memory")
    root = url.removeprefix("memory://")
    memory.rm_file(f"{root}/000000.patches/0000000005")  # five of the twelve pictures


def test_checking_asks_for_many_rows_at_once(remote_index, url, monkeypatch):
    requests: list[int] = []
    before = RemoteStorage.fetch

    def fetch(self, wanted):
        requests.append(len(wanted))
        return before(self, wanted)

    monkeypatch.setattr(RemoteStorage, "fetch", fetch)
    _, positions = remote_index.parts[0].live()
    shards = remote_index.parts[1]
    assert not shards.damaged(positions).any()
    assert len(requests) == 2  # vectors and patches
    remove_a_part(url)
    assert shards.damaged(positions).sum() == 5


def one_text() -> TextFeatures:
    pooled = torch.nn.functional.normalize(torch.ones(1, 16), dim=-1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    return TextFeatures(("x",), pooled, torch.ones(1, 1, 6), mask, (("x",),))


def test_missing_patches_are_computed_from_the_files(remote_index, tmp_path, url, photos):
    ids, _ = remote_index.pooled()
    whole = remote_index.patches(ids.tolist())
    remove_a_part(url)
    remote_index._shards._mapped.clear()
    with pytest.raises(BadIndex):
        remote_index.patches(ids.tolist())
    batch = remote_index.patches_there(ids.tolist())
    assert batch.present is not None and int(batch.present.sum()) == 7

    notices: list[str] = []
    searcher = Searcher(remote_index, "coarse", on_notice=notices.append)
    searcher.__dict__["image_encoder"] = StandIn()
    batch = searcher._patches(ids.tolist())
    assert batch.present is not None and batch.present.all()
    assert torch.equal(batch.codes, whole.codes)
    assert "5 computed from their files, 0 ranked" in notices[0]

    gone = photos / "0007.png"
    gone.unlink()
    notices.clear()
    searcher._on_notice = notices.append
    batch = searcher._patches(ids.tolist())
    searcher._patches(ids.tolist())
    assert len(notices) == 1 and "4 computed from their files, 1 ranked" in notices[0]
    assert batch.present is not None and int(batch.present.sum()) == 11


def test_a_candidate_without_patches_keeps_its_coarse_score(remote_index, url):
    ids, _ = remote_index.pooled()
    remove_a_part(url)
    remote_index._shards._mapped.clear()
    candidates = Candidates(ids[None], np.linspace(1, 0, 12, dtype=np.float32)[None])
    ranked = rerank(Summing(), one_text(), candidates, remote_index.patches_there)
    present = remote_index.patches_there(ids.tolist()).present
    assert present is not None
    without = set(ids[~present.numpy()].tolist())
    assert sorted(ranked.ids[0]) == sorted(ids)
    kept = np.array([number in without for number in ranked.ids[0]])
    assert kept.sum() == 5
    np.testing.assert_array_equal(ranked.scores[0][kept], ranked.coarse[0][kept])
    assert (ranked.scores[0][~kept] > ranked.coarse[0][~kept] + 0.9).all()
