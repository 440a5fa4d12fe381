"""Vectors move between Milvus Lite and a server without anything being embedded again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from mmsearch.cli import migrate as command
from mmsearch.core.errors import BadIndex, IndexBusy, StorageError, UsageError
from mmsearch.indexing.index import VECTORS, ImageIndex
from mmsearch.indexing.migrate import migrate
from mmsearch.indexing.vectors import VectorStore
from typer.testing import CliRunner

from .milvus_server import MilvusServer
from .test_index import SPEC, StandIn, contents, make_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "photos", 12)
    make_pictures(tmp_path / "photos" / "trips", 5, 100)
    return tmp_path / "photos"


@pytest.fixture
def made(tmp_path: Path, photos: Path) -> Path:
    with ImageIndex.create(tmp_path / "index", SPEC) as index:
        index.add([photos], StandIn())
    return tmp_path / "index"


@pytest.mark.server
def test_there_and_back(made, photos, milvus_server: MilvusServer, monkeypatch):
    token = milvus_server.token
    with ImageIndex.open(made) as index:
        before = contents(index)
        _, pooled = index.pooled()
        expected = index.search(pooled, 5)

        # A move that is cut off changes nothing, and the next one goes on.
        pushed: list[int] = []
        push, upsert = ImageIndex.push, VectorStore.upsert

        def cut(self, entries, vectors):
            upsert(self, entries[:7], vectors[:7])
            self.flush()
            raise StorageError("cut off")

        def counting(self, ids, target=None):
            pushed.extend(ids)
            push(self, ids, target)

        monkeypatch.setattr(VectorStore, "upsert", cut)
        with pytest.raises(StorageError, match="cut off"):
            migrate(index, milvus_server.uri, token=token)
        monkeypatch.setattr(VectorStore, "upsert", upsert)
        monkeypatch.setattr(ImageIndex, "push", counting)
        assert index.search(pooled, 5).ids.tolist() == expected.ids.tolist()
    with ImageIndex.open(made) as index:
        moved = migrate(index, milvus_server.uri, token=token)
    assert (moved.images, moved.written, len(pushed)) == (17, 10, 10)
    assert not (made / VECTORS).exists()

    if milvus_server.authorization:  # another test of the session may have switched it off
        with pytest.raises(StorageError), ImageIndex.open(made, milvus_token="root:wrong") as index:
            index.search(pooled[:1], 1)
    with ImageIndex.open(made, milvus_token=token) as index:
        assert index.manifest.milvus_uri == milvus_server.uri
        assert contents(index) == before
        found = index.search(pooled, 5)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        with pytest.raises(UsageError, match="already"):
            migrate(index, milvus_server.uri, token=token)
        encoder = StandIn()
        make_pictures(photos, 1, 50)
        assert index.add([photos], encoder).added == 1

    # Back, by the command line.
    monkeypatch.setenv("MMSEARCH_MILVUS_TOKEN", token)
    app = typer.Typer()
    app.command()(command.migrate)
    result = CliRunner().invoke(app, ["--to", "lite", "--index", str(made)])
    assert result.exit_code == 0, result.output
    with ImageIndex.open(made) as index:
        assert len(index) == 18
        assert {path: value for path, value in contents(index).items() if path in before} == before
        assert index.search(pooled, 5).ids[:, 0].tolist() == expected.ids[:, 0].tolist()
    store = VectorStore(milvus_server.uri, index.manifest.collection, 16, token=token)
    assert not store.exists()
    store.close()


def test_what_is_refused(made):
    with ImageIndex.open(made) as index:
        with pytest.raises(UsageError, match="already"):
            migrate(index, "lite")
        with pytest.raises(UsageError, match="no Milvus server"):
            migrate(index, "somewhere")
        with pytest.raises(StorageError, match="cannot reach Milvus"):
            migrate(index, "http://127.0.0.1:9")
        with pytest.raises(IndexBusy):
            ImageIndex.open(made)
        assert len(contents(index)) == 17


def test_damaged_shards_do_not_move(made):
    path = made / "shards" / "000000.pooled"
    content = bytearray(path.read_bytes())
    content[5] ^= 0xFF
    path.write_bytes(content)
    with ImageIndex.open(made) as index, pytest.raises(BadIndex, match="1 pictures are damaged"):
        migrate(index, "http://127.0.0.1:9")
