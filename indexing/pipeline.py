"""Pictures through the model into the index: decode beside compute beside write.

    walk -> [threads: read, hash, decode] -> batches -> model -> [thread: shards, Milvus, catalog]

Queues are bounded and the order is that of the walk, so memory does not grow with the collection
and two runs over the same files write the same rows. Pillow lets go of the interpreter lock while
it decodes, so threads decode in parallel and no picture is copied between processes.
"""

# Paths here are text: any bytes that a file system allows must come through.
# ruff: noqa: PTH100, PTH118, PTH122

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from ..core.errors import InputError, MmsearchError
from .catalog import Catalog, Content, Entry
from .scan import Seen, Walk, is_gone, read_picture
from .shards import RowFormat, Shards, quantise
from .vectors import VectorStore

if TYPE_CHECKING:
    from ..core.types import ImageFeatures
    from .encoder import Encoder
    from .images import InputSpec, Picture

COMMIT_ROWS = 256  # files recorded in one go: the most that a kill can lose, with those in flight


class Job(NamedTuple):
    """A file to read."""

    folder: str
    seen: Seen


@dataclass(slots=True)
class Plan:
    """What a run would do, without doing it."""

    added: int = 0  # new files
    changed: int = 0
    unchanged: int = 0
    retried: int = 0  # could not be read before
    missing: list[int] = field(default_factory=list)  # ids of files that are gone
    problems: list[tuple[str, str]] = field(default_factory=list)  # (path, why it is not listed)

    @property
    def to_do(self) -> int:
        """Files to read."""
        return self.added + self.changed + self.retried


class Survey:
    """Compare what lies on disk with what the catalog knows, folder by folder."""

    def __init__(self, walk: Walk, catalog: Catalog) -> None:
        self._walk = walk
        self._catalog = catalog

    def jobs(self, plan: Plan | None = None) -> Iterator[Job]:
        """Yield the files to read; with a plan, count everything into it and find the missing."""
        plan = plan or Plan()
        visited: set[str] = set()
        roots = [os.path.abspath(root) for root in self._walk.roots]
        for folder in self._walk:
            visited.add(folder.path)
            known = self._catalog.in_folder(folder.path)
            for seen in folder.files:
                was = known.get(seen.name)
                if was is None:
                    plan.added += 1
                elif not was.settled:
                    plan.retried += 1
                elif (was.size, was.mtime_ns) != (seen.size, seen.mtime_ns):
                    plan.changed += 1
                else:
                    plan.unchanged += 1
                    continue
                yield Job(folder.path, seen)
            if folder.whole:
                listed = {seen.name for seen in folder.files} | folder.left_alone
                plan.missing += [was.id for name, was in known.items() if name not in listed]
        plan.problems = list(self._walk.problems)
        for root in roots:
            plan.missing += self._gone(root, visited)
        plan.missing = list(dict.fromkeys(plan.missing))  # roots may lie in each other

    def _gone(self, root: str, visited: set[str]) -> Iterator[int]:
        """Yield the ids of known files in folders below a root that the walk did not find."""
        alone = tuple(self._walk.left_alone)
        for folder in self._catalog.folders_under(os.path.join(root, "")):
            if folder in visited or folder.startswith(alone or ("\0",)):
                continue
            if folder.endswith("!") and not is_gone(folder[:-1]):
                continue  # an archive, indexed by its own name
            yield from (known.id for known in self._catalog.in_folder(folder).values())
        if is_gone(root):
            if root.lower().endswith(".tar"):
                yield from self._catalog.ids_under(f"{root}!")
            folder, name = os.path.split(root)
            yield from self._catalog.ids_under(os.path.join(folder, ""), name)


@dataclass(slots=True)
class Loaded:
    """A file that was read: its record, and the picture if its content is new and good."""

    entry: Entry
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Events:
    """Who is told what while a run goes on; called from the running thread."""

    planned: Callable[[Plan], None] = lambda plan: None
    advanced: Callable[[int], None] = lambda files: None
    failed: Callable[[str, str], None] = lambda path, reason: None
    stage: Callable[[str], None] = lambda text: None


def load(job: Job, spec: InputSpec, catalog: Catalog) -> Loaded:
    """Read, hash and decode one file; whatever is wrong with it ends in its record."""
    from .images import MissingDecoder, UndecodableImage, decode

    folder, seen = job
    path = folder + seen.name
    number = catalog.id_for(path)
    try:
        content, seen = read_picture(folder, seen)
        digest = xxhash.xxh3_128_digest(content)
        known = catalog.content(digest)
        if known is None:
            suffix = os.path.splitext(seen.name)[1]
            try:
                picture = decode(content, spec, suffix)
            except MissingDecoder:
                raise
            except UndecodableImage as error:
                known = Content(digest, None, None, error.message)
            else:
                fresh = Content(digest, None, picture.facts, None)
                return Loaded(Entry(number, folder, *seen[:3], fresh), picture)
        return Loaded(Entry(number, folder, *seen[:3], known))
    except OSError as error:
        reason = error.strerror or str(error)
    except InputError as error:
        reason = error.message
    return Loaded(Entry(number, folder, *seen[:3], None, reason))


def load_in_order(
    jobs: Iterable[Job],
    spec: InputSpec,
    catalog: Catalog,
    pool: Executor,
    ahead: int,
    stopped: Callable[[], bool],
) -> Iterator[Loaded]:
    """Load files in a pool, at most ``ahead`` of them before they are asked for, in order."""
    source = iter(jobs)
    waiting: deque[Future[Loaded]] = deque()
    try:
        while True:
            while len(waiting) < ahead and not stopped():
                job = next(source, None)
                if job is None:
                    break
                waiting.append(pool.submit(load, job, spec, catalog))
            if not waiting or stopped():
                return
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class Writer:
    """The thread that stores batches: shards, then Milvus, then the catalog.

    A kill between any two of them leaves nothing that the next run does not overwrite: rows of
    the shards beyond what the catalog names, and images in Milvus under ids that come again.
    """

    def __init__(self, shards: Shards, vectors: VectorStore, catalog: Catalog) -> None:
        self._shards = shards
        self._vectors = vectors
        self._catalog = catalog
        self._queue: queue.Queue[tuple[list[Entry], Encoded | None] | None] = queue.Queue(2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def put(self, entries: list[Entry], encoded: Encoded | None) -> None:
        """Hand over files and the features of those with new content, in the same order.

        Raises:
            StorageError: an earlier batch could not be stored.
        """
        self._raise()
        self._queue.put((entries, encoded))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._store(*batch)
                except BaseException as error:  # handed to the thread that puts
                    self._error = error

    def _store(self, entries: list[Entry], encoded: Encoded | None) -> None:
        contents: dict[bytes, Content] = {}  # what this batch settles, by hash
        pooled: dict[bytes, np.ndarray] = {}
        if encoded is not None:
            fresh = [
                entry.content
                for entry in entries
                if entry.content and entry.content.facts and entry.content.position is None
            ]
            keep: list[int] = []
            for at, content in enumerate(fresh):
                known = contents.get(content.hash) or self._catalog.content(content.hash)
                if known is None:
                    keep.append(at)
                contents[content.hash] = known or content
            if keep:
                shard, row = self._shards.append(
                    self._catalog.end(),
                    encoded.pooled[keep],
                    encoded.records[keep],
                )
                for number, at in enumerate(keep):
                    content = fresh[at]
                    contents[content.hash] = Content(
                        content.hash, (shard, row + number), content.facts, None
                    )
                    pooled[content.hash] = encoded.pooled[at]
        settled = [_settle(entry, contents) for entry in entries]
        live = [entry for entry in settled if entry.content and entry.content.position]
        dead = [entry.id for entry in settled if not (entry.content and entry.content.position)]
        if live:
            self._vectors.upsert(live, self._pooled_of(live, pooled))
        if dead:  # a file that was searchable before may no longer be
            known_before = self._catalog.entries(dead)
            if known_before:
                self._vectors.delete([entry.id for entry in known_before])
        self._catalog.commit(settled)

    def _pooled_of(self, live: list[Entry], fresh: dict[bytes, np.ndarray]) -> np.ndarray:
        """Return (N, D), from this batch where it has them, else from the shards."""
        result = np.empty((len(live), self._shards.row.embed_dim), np.float32)
        stored: list[int] = []
        for at, entry in enumerate(live):
            vector = fresh.get(entry.content.hash) if entry.content else None
            if vector is None:
                stored.append(at)
            else:
                result[at] = vector
        if stored:
            positions = [live[at].content.position for at in stored]  # type: ignore[union-attr]
            result[stored] = self._shards.pooled(np.array(positions, np.int64))
        return result


def _settle(entry: Entry, contents: dict[bytes, Content]) -> Entry:
    if entry.content is None or entry.content.hash not in contents:
        return entry
    return Entry(
        entry.id, entry.folder, entry.name, entry.size, entry.mtime_ns, contents[entry.content.hash]
    )


@dataclass(frozen=True, slots=True)
class Encoded:
    """Features ready to be stored."""

    pooled: np.ndarray  # (N, D) float32
    records: np.ndarray  # (N,) of RowFormat.patches

    @classmethod
    def of(cls, features: ImageFeatures, row: RowFormat) -> Encoded:
        """Bring a batch of features to their stored form."""
        return cls(features.pooled.float().cpu().numpy(), quantise(features.patches, row))


@dataclass(slots=True)
class Tally:
    """What a run has done so far."""

    stored: int = 0  # files with a searchable picture
    encoded: int = 0  # pictures that went through the model
    failed: int = 0
    found_again: list[int] = field(default_factory=list)  # ids of files whose content was known

    def count(self, loaded: Loaded, events: Events) -> None:
        """Count a file that was read."""
        entry = loaded.entry
        reason = entry.trouble or (entry.content.failure if entry.content else None)
        if reason is not None:
            self.failed += 1
            events.failed(entry.path, reason)
            return
        self.stored += 1
        if loaded.picture is None:
            self.found_again.append(entry.id)


def run(
    jobs: Iterable[Job],
    encoder: Encoder,
    shards: Shards,
    vectors: VectorStore,
    catalog: Catalog,
    *,
    batch_size: int,
    workers: int,
    stopped: Callable[[], bool],
    events: Events,
) -> Tally:
    """Take files through the model into the index; when stopped, what was encoded is stored.

    Raises:
        StorageError: the disk is full or Milvus fails; all batches before are stored.
        MmsearchError: the model gives no finite features at all.
    """
    tally = Tally()
    batch = _Batch()
    running: deque[tuple[_Batch, Future[Encoded] | None]] = deque()
    with (
        Writer(shards, vectors, catalog) as writer,
        _threads(encoder, workers) as (decoding, computing, lanes),
    ):

        def start() -> None:
            nonlocal batch
            future = None
            if batch.pixels:
                future = computing.submit(_encode, encoder, np.stack(batch.pixels), shards.row)
            running.append((batch, future))
            batch = _Batch()

        def finish() -> None:
            done, future = running.popleft()
            writer.put(done.entries, future.result() if future else None)
            events.advanced(len(done.entries))
            tally.encoded += len(done.pixels)

        ahead = (lanes + 1) * batch_size
        spec = encoder.spec.input_spec
        for loaded in load_in_order(jobs, spec, catalog, decoding, ahead, stopped):
            batch.entries.append(loaded.entry)
            if loaded.picture is not None:
                batch.pixels.append(loaded.picture.pixels)
            tally.count(loaded, events)
            if len(batch.pixels) == batch_size or len(batch.entries) >= COMMIT_ROWS:
                start()
                while len(running) > lanes:
                    finish()
        if batch.entries:
            start()
        while running:
            finish()
    return tally


@dataclass(slots=True)
class _Batch:
    """Files on their way through the model, and the pixels of those that need it."""

    entries: list[Entry] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)  # (H, W, 3) uint8 each


def _encode(encoder: Encoder, pixels: np.ndarray, row: RowFormat) -> Encoded:
    encoded = Encoded.of(encoder.encode_images(pixels), row)
    if not np.isfinite(encoded.pooled).all():
        raise MmsearchError(
            "the model gave features that are no numbers", "Try --precision fp32, or another model."
        )
    return encoded


@contextmanager
def _threads(encoder: Encoder, workers: int) -> Iterator[tuple[Executor, Executor, int]]:
    """Give threads that decode, threads that run the model, and how many batches run at once.

    On a CPU they are the same, one a core and each with a model run of its own: no core waits for
    another at the end of every layer, and decoding fills what the model leaves. A GPU takes one
    batch after the other while all cores decode.
    """
    if encoder.device.type != "cpu":
        with ThreadPoolExecutor(workers, "decode") as decoding, ThreadPoolExecutor(1) as computing:
            yield decoding, computing, 2
        return
    import torch

    before = torch.get_num_threads()
    one_each = partial(torch.set_num_threads, 1)
    with ThreadPoolExecutor(workers, "embed", initializer=one_each) as pool:
        try:
            yield pool, pool, workers
        finally:
            torch.set_num_threads(before)
