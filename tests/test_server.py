"""The same index on a real Milvus server: same answers, other index types, kills in the middle."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mmsearch.core.errors import StorageError
from mmsearch.indexing import check
from mmsearch.indexing.filters import Filters
from mmsearch.indexing.index import Events, ImageIndex

from .milvus_server import MilvusServer
from .test_index import SPEC, StandIn, contents, make_pictures

pytestmark = pytest.mark.server
ODD_NAMES = [
    'it\'s "so".png',
    "new\nline.png",
    "back\\slash.png",
    "100%_of {it}.png",
    "smörgås 🍞.png",
]


def small_set(folder: Path) -> Path:
    make_pictures(folder, 12)
    trips = make_pictures(folder / "tri%ps_", 5, 100)
    for path, name in zip(trips, ODD_NAMES, strict=True):
        path.rename(path.with_name(name))
    make_pictures(folder / "triXps_", 3, 200)  # what a wildcard in the name would also find
    return folder


def flickr8k(folder: Path) -> Path:
    place = os.environ.get("MMSEARCH_FLICKR8K")
    if not place:
        pytest.skip("needs MMSEARCH_FLICKR8K")
    pictures = sorted((Path(place) / "images").iterdir())[:300]
    for number, picture in enumerate(pictures):
        target = folder / ("tri%ps_" if number % 3 else "") / picture.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(picture)
    return folder


@pytest.fixture(params=[small_set, flickr8k], ids=["small", "flickr8k"])
def photos(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path / "photos")


@pytest.fixture
def lite(tmp_path: Path, photos: Path) -> Iterator[ImageIndex]:
    with ImageIndex.create(tmp_path / "lite", SPEC) as index:
        index.add([photos], StandIn())
        yield index


def on_server(tmp_path: Path, server: MilvusServer, **options) -> ImageIndex:
    return ImageIndex.create(
        tmp_path / "server", SPEC, milvus_uri=server.uri, milvus_token=server.token, **options
    )


def same_answers(one: ImageIndex, other: ImageIndex, photos: Path) -> None:
    _, pooled = one.pooled()
    questions = pooled[::7]
    trips = photos / "tri%ps_"
    for options in (
        {},
        {"folder": trips},
        {"filters": Filters(min_width=63)},
        {"filters": Filters(where="width >= 62 and camera == ''")},
        {"filters": Filters(extensions=["png"], orientation="landscape"), "folder": trips},
    ):
        ours, theirs = one.search(questions, 4, **options), other.search(questions, 4, **options)
        np.testing.assert_array_equal(ours.ids, theirs.ids, err_msg=str(options))
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
    found = other.search(questions, 100, folder=trips)
    below = {record.path for record in other.records(found.ids[0][found.ids[0] >= 0].tolist())}
    assert below and all(path.startswith(str(trips) + os.sep) for path in below)


def test_the_server_answers_as_milvus_lite_does(lite, photos, milvus_server, tmp_path):
    with on_server(tmp_path, milvus_server, partition_by="folder") as index:
        index.add([photos], StandIn())
        assert contents(index) == contents(lite)
        same_answers(lite, index, photos)
        picture = next(path for path in photos.rglob("*") if path.is_file())
        for each in (lite, index):
            each.remove([picture])
        same_answers(lite, index, photos)
        assert check.check(index) == []


def test_other_index_types(milvus_server, tmp_path):
    photos = small_set(tmp_path / "photos")
    with on_server(
        tmp_path, milvus_server, index_type="IVF_SQ8", index_params={"nlist": 4}
    ) as index:
        index.add([photos], StandIn())
        ids, pooled = index.pooled()
        assert index.search(pooled, 3).ids[:, 0].tolist() == ids.tolist()
    with pytest.raises(StorageError, match="invalid index type"):
        on_server(tmp_path, milvus_server, index_type="NO_SUCH", rebuild=True)


def test_wrong_tokens_are_named(milvus_server, tmp_path):
    with pytest.raises(StorageError, match="cannot reach Milvus"):
        ImageIndex.create(
            tmp_path / "index", SPEC, milvus_uri=milvus_server.uri, milvus_token="root:wrong"
        )


def test_a_server_killed_in_the_middle(milvus_server, tmp_path):
    photos = small_set(tmp_path / "photos")
    make_pictures(photos / "more", 60, 1000)
    with ImageIndex.create(tmp_path / "lite", SPEC) as lite:
        lite.add([photos], StandIn())

        killed = threading.Event()

        def kill(files: int) -> None:
            if not killed.is_set():
                killed.set()
                milvus_server.kill()

        with on_server(tmp_path, milvus_server) as index:
            started = time.monotonic()
            with pytest.raises(StorageError):
                index.add([photos], StandIn(), batch_size=10, on_event=Events(advanced=kill))
            assert time.monotonic() - started < 60
        milvus_server.authorization = False  # and come back without it, for a change
        milvus_server.start()
        with ImageIndex.open(tmp_path / "server") as index:
            index.add([photos], StandIn())
            assert contents(index) == contents(lite)
            same_answers(lite, index, photos)
            assert check.check(index) == []
