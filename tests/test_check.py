"""check and repair: each kind of damage is found, named and mended without the model."""

from __future__ import annotations

import shutil

import pytest
from mmsearch.core.errors import BadIndex, IndexBusy
from mmsearch.indexing.check import check, repair
from mmsearch.indexing.index import ImageIndex
from mmsearch.indexing.lock import IndexLock

from .test_index import SPEC, StandIn, contents, make_pictures


@pytest.fixture
def index(tmp_path):
    make_pictures(tmp_path / "photos", 9)
    with ImageIndex.create(tmp_path / "index", SPEC) as made:
        made.add([tmp_path / "photos"], StandIn())
        yield made


def messages(index: ImageIndex) -> list[str]:
    return [finding.message for finding in check(index)]


def test_a_sound_index(index):
    assert check(index) == []
    assert repair(index) == []


def test_milvus_lost_rows_has_strangers_and_wrong_vectors(index, tmp_path):
    before = contents(index)
    catalog, shards, vectors = index.parts
    ids, positions = catalog.live()
    entries = catalog.entries(ids.tolist())
    vectors.upsert(entries[1:2], -shards.pooled(positions[1:2]))
    vectors.delete([entries[0].id])
    stranger = entries[2].__class__(77, "/gone/", "x.png", 1, 1, entries[2].content)
    vectors.upsert([stranger], shards.pooled(positions[2:3]))
    vectors.flush()
    assert messages(index) == [
        "1 pictures are missing from Milvus",
        "1 vectors in Milvus belong to no file",
        "1 vectors in Milvus are not those of the shards",
    ]
    assert len(repair(index)) == 3
    assert check(index) == []
    assert contents(index) == before


def test_milvus_is_gone(index):
    before = contents(index)
    index.close()
    shutil.rmtree(index.path / "vectors.db")
    with ImageIndex.open(index.path) as opened:
        with pytest.raises(BadIndex, match="no collection"):
            opened.search(opened.pooled()[1], 3)
        assert "no collection" in messages(opened)[0]
        repair(opened)
        assert check(opened) == []
        assert contents(opened) == before


def test_milvus_is_garbage(index):
    before = contents(index)
    index.close()
    shutil.rmtree(index.path / "vectors.db")
    (index.path / "vectors.db").write_bytes(b"garbage")
    with ImageIndex.open(index.path) as opened:
        assert messages(opened)
        repair(opened)
        assert check(opened) == []
        assert contents(opened) == before


def test_damaged_features_are_embedded_again(index, tmp_path):
    before = contents(index)
    path = index.path / "shards" / "000000.patches"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content[:-10])
    assert messages(index) == ["2 pictures have damaged or missing features"]
    assert "forgot 2" in repair(index)[0]
    assert check(index) == []
    encoder = StandIn()
    assert index.add([tmp_path / "photos"], encoder).added == 2
    assert encoder.encoded == 2
    assert contents(index) == before


def test_a_torn_tail_is_harmless(index):
    with (index.path / "shards" / "000000.pooled").open("ab") as file:
        file.write(b"x" * 64)
    with (index.path / "shards" / "000000.patches").open("ab") as file:
        file.write(b"x" * 500)
    (finding,) = check(index)
    assert finding.harmless


def test_a_damaged_catalog_is_named(index):
    index.close()
    path = index.path / "catalog.sqlite"
    path.write_bytes(b"SQLite format 3\0" + b"garbage" * 600)
    with pytest.raises(BadIndex, match="damaged"):
        ImageIndex.open(index.path)


def test_repair_touches_nothing_that_another_process_holds(index, monkeypatch):
    """An index with its vectors on a server is opened without the lock."""
    index._lock.release()
    other = IndexLock(index.path)
    other.acquire()
    before = contents(index)
    path = index.path / "shards" / "000000.patches"
    path.write_bytes(path.read_bytes()[:-10])
    monkeypatch.setattr(index, "reset_vectors", lambda: pytest.fail("the collection is dropped"))
    monkeypatch.setattr(index.parts[2], "ids", lambda: pytest.fail("work before the lock is held"))
    with pytest.raises(IndexBusy):
        repair(index)
    other.release()
    assert len(index) == len(before)


def test_a_repair_that_is_cut_off_is_completed_by_the_next_run(index, tmp_path, monkeypatch):
    before = contents(index)
    path = index.path / "shards" / "000000.patches"
    path.write_bytes(path.read_bytes()[:-10])
    with monkeypatch.context() as patch:
        patch.setattr(index, "reconcile", cut_off)
        with pytest.raises(KeyboardInterrupt):
            repair(index)
    assert all(finding.harmless for finding in check(index))
    found = index.search(index.pooled()[1][:1], 20).ids[0]
    index.records(found[found >= 0].tolist())  # none is found without a record
    index.add([tmp_path / "photos"], StandIn())
    assert check(index) == []
    assert contents(index) == before


def cut_off(*arguments: object) -> None:
    raise KeyboardInterrupt
