"""The facade: what goes in comes out, whatever happened in between."""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from mmsearch.core.errors import BadIndex, IndexBusy, InputError, StorageError
from mmsearch.core.types import Grid, ImageFeatures
from mmsearch.indexing.catalog import Catalog
from mmsearch.indexing.encoder import EncoderSpec
from mmsearch.indexing.filters import Filters
from mmsearch.indexing.images import decode
from mmsearch.indexing.index import Events, ImageIndex
from PIL import Image

SPEC = EncoderSpec(
    model="stand-in",
    pretrained=None,
    weights_hash="0" * 64,
    patch_kind="aligned",
    embed_dim=16,
    patch_dim=6,
    text_dim=6,
    grid=Grid(2, 3),
    input_size=(32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    resize_mode="shortest",
)


class StandIn:
    """An encoder whose features are a fixed linear map of the pixels: exact in any batch."""

    spec = SPEC
    device = torch.device("cpu")

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._pooled = random.standard_normal((48, 16))
        self._patches = random.standard_normal((48, 36))
        self.encoded = 0

    def encode_images(self, pixels: np.ndarray) -> ImageFeatures:
        self.encoded += len(pixels)
        small = pixels.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4)).reshape(-1, 48) / 255  # (N, 48)
        # One picture at a time: BLAS rounds differently for batches of another size.
        pooled = np.stack([row @ self._pooled for row in small]).astype(np.float32)
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        patches = np.stack([row @ self._patches for row in small]).reshape(-1, 6, 6)
        return ImageFeatures(
            torch.from_numpy(pooled), torch.from_numpy(patches.astype(np.float32)), SPEC.grid
        )


def make_pictures(folder: Path, count: int, start: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(start, start + count):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        path = folder / f"{number:04d}.png"
        Image.fromarray(pixels).resize((60 + number % 7, 40), Image.Resampling.NEAREST).save(path)
        paths.append(path)
    return paths


def contents(index: ImageIndex) -> dict[str, tuple]:
    """All an index says of its pictures, by path."""
    ids, pooled = index.pooled()
    patches = index.patches(ids.tolist())
    stored = index._vectors.vectors(ids.tolist())
    assert sorted(stored) == index._vectors.ids().tolist() == ids.tolist()
    result = {}
    for at, record in enumerate(index.records(ids.tolist())):
        np.testing.assert_allclose(stored[record.id], pooled[at], atol=1e-6)
        scales = b"" if patches.scales is None else patches.scales[at].numpy().tobytes()
        result[record.path] = (
            record,
            pooled[at].tobytes(),
            patches.codes[at].numpy().tobytes(),
            scales,
        )
    return result


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "photos", 12)
    make_pictures(tmp_path / "photos" / "trips", 5, 100)
    return tmp_path / "photos"


@pytest.fixture
def index(tmp_path: Path):
    with ImageIndex.create(tmp_path / "index", SPEC) as made:
        yield made


def test_the_model_is_free_when_milvus_builds(tmp_path):
    """Peak memory comes then; an encoder that was handed over must not be kept."""
    make_pictures(tmp_path / "pictures", 3)
    held = [StandIn()]
    alive = weakref.ref(held[0])
    seen = []

    def stage(text: str) -> None:
        seen.append((text, alive()))

    with ImageIndex.create(tmp_path / "index", SPEC) as index:
        index.add([tmp_path / "pictures"], held.pop, on_event=Events(stage=stage))
    assert seen == [("building the search index", None)]


def test_what_goes_in_is_found(index, photos):
    encoder = StandIn()
    report = index.add([photos], encoder)
    assert (report.added, report.failed, len(index)) == (17, 0, 17)
    ids, pooled = index.pooled()
    found = index.search(pooled, 5)
    assert (found.ids[:, 0] == ids).all()
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)
    paths = {record.path for record in index.records(ids.tolist())}
    assert str(photos / "trips" / "0100.png") in paths
    path = photos / "0003.png"
    features = encoder.encode_images(decode(path, SPEC.input_spec).pixels[None])
    number = index.id_of(path)
    assert number is not None
    batch = index.patches([number, number])
    error = (batch.values()[1] - features.patches[0]).abs()
    assert (error <= batch.scales[1].float().unsqueeze(-1) * 0.51).all()


def test_files_are_counted_once_between_writes(index, photos, monkeypatch):
    """A search asks how many there are, and to count a large catalog takes long."""
    index.add([photos], StandIn())
    catalog = index.parts[0]
    query, ask, asked = index.pooled()[1][:1], catalog._all, []
    assert len(index) == 17

    def listen(text: str, *values: object) -> list[tuple]:
        asked.append(text)
        return ask(text, *values)

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_all", listen)
        index.search(query, 5)
        assert len(index) == 17
        assert not [text for text in asked if "count(" in text]
    index.remove([photos / "0001.png"])
    assert len(index) == 16
    with closing(Catalog(index.path / "catalog.sqlite")) as other:  # as another process does
        other.remove([index.id_of(photos / "0002.png")])
    assert len(index) == 15


def test_milvus_lite_is_flushed_now_and_then(index, photos, monkeypatch):
    """So that its memory stays bounded; what is found does not depend on where it was."""
    monkeypatch.setattr("mmsearch.indexing.vectors.LITE_FLUSH_ROWS", 4)
    index.add([photos], StandIn(), batch_size=3)
    ids, pooled = index.pooled()
    found = index.search(pooled, 5)
    exact = np.argsort(-(pooled @ pooled.T), axis=1)[:, :5]
    assert (found.ids == ids[exact]).all()


def test_a_second_run_decodes_nothing(index, photos, monkeypatch):
    index.add([photos], StandIn())
    monkeypatch.setattr("mmsearch.indexing.pipeline.read_picture", None)
    again = StandIn()
    report = index.add([photos], again)
    assert (report.added, report.unchanged, again.encoded) == (0, 17, 0)


def test_moved_copied_changed_and_deleted_files(index, photos):
    index.add([photos], StandIn())
    before = contents(index)
    (photos / "0000.png").rename(photos / "renamed.png")
    shutil.copy(photos / "0001.png", photos / "copy.png")
    (photos / "0002.png").unlink()
    shutil.copy(photos / "0004.png", photos / "0003.png")
    make_pictures(photos, 1, 500)
    encoder = StandIn()
    report = index.add([photos], encoder)
    assert encoder.encoded == 1, "only the new picture needs the model"
    assert (report.added, report.moved, report.removed) == (3, 1, 1)
    after = contents(index)
    assert after[str(photos / "renamed.png")][1:] == before[str(photos / "0000.png")][1:]
    assert after[str(photos / "0003.png")][1:] == before[str(photos / "0004.png")][1:]
    assert str(photos / "0002.png") not in after
    with ImageIndex.create(index.path.parent / "fresh", SPEC) as fresh:
        fresh.add([photos], StandIn())
        assert contents(fresh) == after


def test_missing_files_leave_below_the_named_paths_only(index, photos):
    index.add([photos], StandIn())
    (photos / "0000.png").unlink()
    shutil.rmtree(photos / "trips")
    assert index.add([photos], StandIn(), keep_missing=True).removed == 0
    assert index.add([photos / "trips"], StandIn()).removed == 5
    assert index.add([photos / "0000.png"], StandIn()).removed == 1
    assert len(index) == 11
    with pytest.raises(InputError, match="nowhere"):
        index.add([photos / "nowhere"], StandIn())


def test_files_that_cannot_be_looked_at_stay(index, photos, tmp_path, monkeypatch):
    """Neither a share that does not answer nor lost permissions empty an index."""
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(photos / "0001.png", "a.png")
    index.add([photos, tmp_path / "x.tar"], StandIn())
    look = os.stat
    closed = (str(photos), str(tmp_path / "x.tar"))

    def refuse(path, **options):
        if str(path).startswith(closed):
            raise OSError(116, "Stale file handle", str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os.path, "lexists", lambda path: not str(path).startswith(closed))
    for root in (photos, photos / "trips", photos / "0001.png", tmp_path / "x.tar", tmp_path):
        report = index.add([root], StandIn())
        assert (report.removed, len(index)) == (0, 18), root
        assert report.problems[0][1] == "Stale file handle"


def test_a_file_that_comes_back_during_the_run_stays(index, photos, tmp_path):
    index.add([photos], StandIn())
    make_pictures(photos, 1, 500)
    (photos / "0000.png").rename(tmp_path / "aside")
    (photos / "0001.png").unlink()

    def planned(plan) -> None:
        (tmp_path / "aside").rename(photos / "0000.png")

    report = index.add([photos], StandIn(), on_event=Events(planned=planned))
    assert (report.added, report.removed) == (1, 1)
    assert index.id_of(photos / "0000.png") is not None


def test_excluded_files_stay_as_they_are(index, photos):
    index.add([photos], StandIn())
    report = index.add([photos], StandIn(), exclude=["trips/", "0001.png"])
    assert (report.removed, len(index)) == (0, 17)
    (photos / ".mmsearchignore").write_text("trips/\n")
    assert index.add([photos], StandIn()).removed == 5


def test_bad_pictures_are_remembered(index, photos):
    (photos / "broken.jpg").write_bytes(b"no picture")
    (photos / "empty.png").touch()
    failures: list[str] = []
    events = Events(failed=lambda path, reason: failures.append(path))
    report = index.add([photos], StandIn(), on_event=events)
    assert (report.added, report.failed) == (17, 2)
    assert [Path(path).name for path in failures] == ["broken.jpg", "empty.png"]
    assert [failure.reason for failure in index.failures()] == [
        "not a picture in a known format",
        "the file is empty",
    ]
    report = index.add([photos], StandIn())
    assert (report.failed, report.unchanged) == (0, 19)
    shutil.copy(photos / "0001.png", photos / "broken.jpg")
    assert index.add([photos], StandIn()).added == 1
    assert len(index.failures()) == 1
    (photos / "0001.png").write_bytes(b"spoilt")
    index.add([photos], StandIn())
    assert index.id_of(photos / "0001.png") is None
    assert len(contents(index)) == 17


def test_stopping_keeps_what_is_done_and_the_next_run_goes_on(index, photos):
    stop = threading.Event()
    events = Events(advanced=lambda files: stop.set())
    report = index.add([photos], StandIn(), batch_size=4, workers=1, stop=stop, on_event=events)
    assert report.interrupted
    assert report.added % 4 == 0, "batches in flight are finished, no other is begun"
    assert 4 <= report.added == len(index) == 17 - report.left < 17
    encoder = StandIn()
    assert index.add([photos], encoder, workers=1).added == encoder.encoded == report.left
    assert len(contents(index)) == 17


def test_filters(index, photos):
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Canon", "Canon EOS 5D"
    exif.get_ifd(0x8769)[0x9003] = "2021:07:01 10:00:00"
    name = 'it\'s "quoted" %_ \\ 猫 \n.jpg'
    Image.new("RGB", (40, 90), "red").save(photos / name, exif=exif)
    index.add([photos], StandIn())
    query = index.pooled()[1][:1]

    def names(**wanted) -> set[str]:
        found = index.search(query, 100, filters=Filters(**wanted)).ids[0]
        return {Path(r.path).name for r in index.records(found[found >= 0].tolist())}

    from datetime import datetime

    assert len(index.search(query, 100, folder=photos / "trips").ids[0]) == 18
    assert len(names(folder=photos / "trips")) == 5
    assert len(names(folder=photos / "trip")) == 0
    assert names(orientation="portrait") == {name}
    assert names(camera="EOS") == {name}
    assert names(extensions=["JPG"]) == {name}
    assert names(until=datetime(2021, 7, 1, 10)) == {name}
    assert names(since=datetime(2021, 7, 1, 10)) >= {name}
    assert name not in names(since=datetime(2021, 7, 2))
    assert names(min_width=66) == {"0006.png", "0104.png"}
    assert (
        index.search(query, 5, folder=Path(f"{photos}/x' or id > 0 or path == '")).ids[0, 0] == -1
    )


def test_odd_names(index, tmp_path):
    folder = tmp_path / "odd \" ' \n 🐈"
    (source,) = make_pictures(folder, 1)
    odd = os.fsencode(str(folder)) + b"/caf\xe9.png"
    source.rename(os.fsdecode(odd))
    index.add([folder], StandIn())
    ids, _ = index.pooled()
    (record,) = index.records(ids.tolist())
    assert os.fsencode(record.path) == odd
    assert index.id_of(Path(record.path)) == record.id
    assert index.search(index.pooled()[1], 1, folder=folder).ids.tolist() == [[record.id]]


def test_tar_members(index, photos, tmp_path):
    import tarfile

    archive = tmp_path / "00.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(photos / "0001.png", "a/0001.png")
        tar.add(photos / "0002.png", "b.png")
    assert index.add([archive], StandIn()).added == 2
    number = index.id_of(f"{archive}!a/0001.png")
    assert number is not None
    assert index.search(index.pooled()[1][:1], 5, folder=archive).ids[0].min() > 0
    assert index.add([tmp_path / "photos"], StandIn()).added == 17
    assert index.add([tmp_path], StandIn()).removed == 0, "the archive is still there"
    archive.unlink()
    assert index.add([tmp_path], StandIn()).removed == 2


def test_one_process_at_a_time(index, tmp_path):
    with pytest.raises(IndexBusy, match="since"):
        ImageIndex.open(index.path)
    index.close()
    ImageIndex.open(index.path).close()


def test_of_two_that_make_an_index_the_second_clears_nothing_away(tmp_path, photos, monkeypatch):
    """It looked before the first was done, and waited for the lock."""
    from mmsearch.indexing.vectors import VectorStore

    make, begun, refused = VectorStore.create, threading.Event(), []

    def second() -> None:
        begun.wait(10)
        try:
            ImageIndex.create(tmp_path / "index", SPEC, wait=30).close()
        except BadIndex as error:
            refused.append(error.message)

    def slowly(self) -> None:
        begun.set()
        other.join(0.5)  # time enough to look and to begin to wait
        make(self)

    monkeypatch.setattr(VectorStore, "create", slowly)
    other = threading.Thread(target=second)
    other.start()
    with ImageIndex.create(tmp_path / "index", SPEC) as first:
        first.add([photos], StandIn())
    other.join(60)
    assert len(refused) == 1
    assert "already" in refused[0]
    with ImageIndex.open(tmp_path / "index") as index:
        assert len(index) == 17


def test_refusals(tmp_path, photos):
    with pytest.raises(BadIndex, match="no index"):
        ImageIndex.open(tmp_path / "nothing")
    with pytest.raises(BadIndex, match="other things"):
        ImageIndex.create(photos, SPEC)
    index = ImageIndex.create(tmp_path / "index", SPEC)
    index.close()
    with pytest.raises(BadIndex, match="already"):
        ImageIndex.create(tmp_path / "index", SPEC)
    manifest = tmp_path / "index" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(BadIndex, match="format 2"):
        ImageIndex.open(tmp_path / "index")
    manifest.write_text(text[:50])
    with pytest.raises(BadIndex, match="damaged"):
        ImageIndex.open(tmp_path / "index")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        ImageIndex.create(tmp_path / "file", SPEC)


def test_another_model_is_refused(index, photos):
    from dataclasses import replace

    other = StandIn()
    other.spec = replace(SPEC, weights_hash="1" * 64)
    with pytest.raises(BadIndex, match="stand-in"):
        index.add([photos], other)


@pytest.mark.parametrize("codes", ["int8", "int4", "fp16"])
def test_survives_reopening(tmp_path, photos, codes):
    with ImageIndex.create(tmp_path / "index", SPEC, patch_codes=codes) as index:
        index.add([photos], StandIn())
        before = contents(index)
    with ImageIndex.open(tmp_path / "index") as index:
        assert contents(index) == before
        assert index.stats().images == 17
        assert not index.stats().unfinished


def test_files_that_vanish_or_refuse_are_tried_again(index, photos, monkeypatch):
    from mmsearch.indexing import pipeline

    read = pipeline.read_picture

    def refuse(folder, seen):
        if seen.name == "0001.png":
            (photos / "0001.png").unlink(missing_ok=True)
        if seen.name == "0002.png":
            raise PermissionError(13, "Permission denied")
        return read(folder, seen)

    monkeypatch.setattr(pipeline, "read_picture", refuse)
    report = index.add([photos], StandIn())
    assert (report.added, report.failed) == (15, 2)
    reasons = {Path(failure.path).name: failure.reason for failure in index.failures()}
    assert reasons == {"0001.png": "No such file or directory", "0002.png": "Permission denied"}
    monkeypatch.setattr(pipeline, "read_picture", read)
    report = index.add([photos], StandIn())
    assert (report.added, report.removed, report.failed, index.failures()) == (1, 1, 0, [])
    assert len(contents(index)) == 16


def test_a_file_replaced_while_it_is_read_is_never_mixed_up(index, photos, monkeypatch):
    from mmsearch.indexing import pipeline

    read = pipeline.read_picture

    def replace_after(folder, seen):
        result = read(folder, seen)
        if seen.name == "0001.png":
            shutil.copy(photos / "0009.png", photos / "0001.png")
        return result

    monkeypatch.setattr(pipeline, "read_picture", replace_after)
    index.add([photos], StandIn())
    monkeypatch.setattr(pipeline, "read_picture", read)
    assert index.add([photos], StandIn()).added == 1, "the change is noticed by the next run"
    known = contents(index)
    assert known[str(photos / "0001.png")][1:] == known[str(photos / "0009.png")][1:]


def test_a_model_that_gives_nonsense_is_an_error(index, photos):
    from mmsearch.core.errors import MmsearchError

    class Broken(StandIn):
        def encode_images(self, pixels):
            features = super().encode_images(pixels)
            features.pooled[0] = float("nan")
            return features

    with pytest.raises(MmsearchError, match="no numbers"):
        index.add([photos], Broken())
    assert index.add([photos], StandIn()).added == 17


def test_writing_fails_midway_and_is_taken_up_again(index, photos, monkeypatch):
    from mmsearch.indexing.shards import Shards

    append, calls = Shards.append, []

    def fail(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise StorageError("disk full")
        return append(self, *arguments)

    monkeypatch.setattr(Shards, "append", fail)
    with pytest.raises(StorageError, match="disk full"):
        index.add([photos], StandIn(), batch_size=4)
    assert len(index) == 8, "what was stored before stays"
    monkeypatch.setattr(Shards, "append", append)
    assert index.add([photos], StandIn()).added == 9
    assert len(contents(index)) == 17
