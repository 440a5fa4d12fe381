"""An index of pictures: make or open one, add files to it, search it.

with ImageIndex.open(folder) as index:
    found = index.search(text.pooled.numpy(), 100)
    patches = index.patches(found.ids[0])
"""

# Paths here are text: any bytes that a file system allows must come through.
# ruff: noqa: PTH100, PTH118

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import BadIndex, InputError, StorageError
from ..core.memory import return_freed_memory
from ..core.types import Candidates, ImageRecord, PatchBatch
from .catalog import Catalog, Failure
from .filters import Condition, Filters
from .lock import IndexLock
from .manifest import FILE_NAME, Manifest
from .pipeline import Events, Job, Plan, Survey, Tally, run
from .pooling import check_pool
from .remote_shards import RemoteStorage, is_url
from .scan import Rules, Walk, is_gone, split_path
from .shards import LocalStorage, Shards
from .vectors import VectorStore

if TYPE_CHECKING:
    from .encoder import Encoder, EncoderSpec
    from .ray_embed import RayCluster

__all__ = ["Events", "Failure", "Filters", "ImageIndex", "IndexReport", "IndexStats", "Plan"]

CATALOG, SHARDS, VECTORS = "catalog.sqlite", "shards", "vectors.db"
_UNFINISHED = "unfinished"  # set in the catalog while a run writes


@dataclass(frozen=True)
class IndexReport:
    """What a run did."""

    added: int  # new or changed files that are searchable now
    unchanged: int
    moved: int  # found again by content under another name
    removed: int
    failed: int
    seconds: float
    interrupted: bool = False
    left: int = 0  # files not reached when interrupted
    problems: list[tuple[str, str]] = field(default_factory=list)  # folders that cannot be listed


@dataclass(frozen=True)
class IndexStats:
    """What an index holds."""

    path: Path
    manifest: Manifest
    images: int  # searchable files
    contents: int  # distinct pictures among them
    failed: int
    picture_bytes: int
    index_bytes: int  # on this machine's disk
    unfinished: bool  # a run was cut off, or is still going


class ImageIndex:
    """An open index. Make it with ``create`` or ``open``; close it, or use it in ``with``.

    Attributes:
        path: its folder.
        manifest: its model and formats.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        milvus_token: str | None,
        wait: float,
        lock: IndexLock | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock or IndexLock(path)
        self._wait = wait
        if manifest.milvus_uri is None:  # Milvus Lite serves one process at a time
            self._lock.acquire(wait)
        try:
            self._catalog = Catalog(path / CATALOG)
        except BaseException:
            self._lock.release()
            raise
        self._shards = Shards(_storage(path, manifest), manifest.row_format)
        self._vectors = VectorStore(
            manifest.milvus_uri or str(path / VECTORS),
            manifest.collection,
            manifest.encoder.embed_dim,
            token=milvus_token,
            index_type=manifest.index_type,
            index_params=manifest.index_params,
            by_folder=manifest.partition_by == "folder",
        )

    @classmethod
    def create(
        cls,
        path: Path,
        encoder: EncoderSpec,
        *,
        milvus_uri: str | None = None,
        milvus_token: str | None = None,
        patch_codes: str = "int8",
        patch_pool: str = "1",
        index_type: str = "HNSW",
        index_params: dict[str, Any] | None = None,
        partition_by: str = "none",
        shards: str | None = None,
        rebuild: bool = False,
        wait: float = 0.0,
    ) -> ImageIndex:
        """Make an empty index.

        Args:
            path: a folder that does not exist or is empty.
            encoder: the model whose features it will hold.
            milvus_uri: a Milvus server; None for Milvus Lite in the folder.
            milvus_token: "user:password" or an API key for it; never stored.
            patch_codes: "int8", "int4" or "fp16".
            patch_pool: "1" stores all patches, "2" and "cluster:N" fewer; see ``pooling``.
            index_type: HNSW, or another that the Milvus knows.
            index_params: how Milvus is to build it; None for good ones.
            partition_by: "folder" groups the vectors by folder, "none" does not.
            shards: an fsspec URL or another folder for the shards.
            rebuild: clear away the index that is there.
            wait: seconds to wait for another process to let go of it.

        Raises:
            UsageError: there is no such pooling, or it has more clusters than there are patches.
            BadIndex: there is an index already, or the folder holds something else.
            StorageError: the folder cannot be written to, or Milvus cannot be reached.
            IndexBusy: another process holds it.
        """
        path = Path(os.path.abspath(path))
        check_pool(patch_pool, encoder.grid)
        collection = "images" if milvus_uri is None else collection_name(path)
        manifest = Manifest(
            encoder,
            patch_codes,
            patch_pool,
            milvus_uri=milvus_uri,
            collection=collection,
            index_type=index_type,
            index_params=index_params,
            partition_by=partition_by,
            shards=None if shards is None else place_of_shards(shards),
        )
        lock = IndexLock(path)
        try:
            _make_room(path, lock, rebuild, wait)
            index = cls(path, manifest, milvus_token=milvus_token, wait=wait, lock=lock)
        except BaseException:
            lock.release()
            raise
        try:
            if shards is not None:
                _claim(_storage(path, manifest), shards, rebuild)
            index._vectors.create()
            manifest.write(path)
        except BaseException:
            index.close()
            raise
        return index

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        milvus_uri: str | None = None,
        milvus_token: str | None = None,
        wait: float = 0.0,
    ) -> ImageIndex:
        """Open an index.

        Args:
            path: its folder.
            milvus_uri: where its Milvus server is now, if not where it was.
            milvus_token: "user:password" or an API key for it.
            wait: seconds to wait for another process to let go of it.

        Raises:
            BadIndex: there is none, it is damaged, or its vectors are not on a server.
            IndexBusy: another process holds it; the message says who and since when.
        """
        path = Path(os.path.abspath(path))
        manifest = Manifest.read(path)
        _catalog_of(path)
        if milvus_uri is not None and milvus_uri != manifest.milvus_uri:
            if manifest.milvus_uri is None:
                raise BadIndex(
                    f"the index in {path} keeps its vectors in its folder, not at {milvus_uri}",
                    f"Move them: mmsearch migrate --to {milvus_uri}  (or leave --milvus and "
                    "$MMSEARCH_MILVUS_URI unset).",
                )
            manifest = replace(manifest, milvus_uri=milvus_uri)
        return cls(path, manifest, milvus_token=milvus_token, wait=wait)

    def close(self) -> None:
        """Let go of everything."""
        try:
            self._vectors.close()
        finally:
            self._catalog.close()
            self._lock.release()

    def __enter__(self) -> ImageIndex:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._catalog.live_count()

    # Writing.

    def plan(
        self, paths: Sequence[Path], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> Plan:
        """Say what ``add`` would do, opening no picture.

        Raises:
            InputError: a path does not exist and no file of the index was below it.
            UsageError: a pattern is not in gitignore's syntax.
        """
        return survey(self._catalog, paths, include, exclude)

    def add(
        self,
        paths: Sequence[Path],
        encoder: Encoder | Callable[[], Encoder],
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        keep_missing: bool = False,
        batch_size: int | None = None,
        workers: int | None = None,
        cluster: RayCluster | None = None,
        stop: threading.Event | None = None,
        on_event: Events | None = None,
    ) -> IndexReport:
        """Bring the index up to date with files and folders.

        New and changed pictures are embedded, moved ones found again by their content, and files
        that are gone leave the index, all below ``paths`` only.

        Args:
            paths: files, folders and tar archives.
            encoder: the index's model, or what loads it should there be anything to embed.
            include: gitignore patterns of what to take.
            exclude: gitignore patterns of what to leave.
            keep_missing: keep what is gone from the disk.
            batch_size: pictures a step; None for one that suits the device.
            workers: threads that decode; None for one a core.
            cluster: embed on a Ray cluster instead of here; ``encoder`` and ``workers`` rest then.
            stop: set it to end after the batch in flight.
            on_event: who is told of progress.

        Raises:
            InputError: a path does not exist.
            BadIndex: the encoder is not the one the index was made with.
            StorageError: the disk is full or Milvus fails; what was stored before is kept.
        """
        started = time.monotonic()
        events = on_event or Events()
        stopped = stop.is_set if stop else lambda: False
        self._complete(events)
        plan = self.plan(paths, include=include, exclude=exclude)
        events.planned(plan)
        report = IndexReport(0, plan.unchanged, 0, 0, 0, 0.0, problems=plan.problems)
        if plan.to_do or (plan.missing and not keep_missing):
            self.mark_unfinished()
            gone = plan.missing
            if plan.to_do:
                walk = Walk(paths, Rules(include, exclude))
                seen = Plan()
                jobs = Survey(walk, self._catalog).jobs(seen)
                if cluster is None:
                    tally = self._embed(jobs, encoder, batch_size, workers, stopped, events)
                else:
                    tally = self._embed_on(cluster, jobs, batch_size, stopped, events)
                report = replace(report, added=tally.stored, failed=tally.failed)
                still = set(seen.missing)  # a file may have come back meanwhile
                gone = [number for number in gone if number in still]
            else:
                tally = Tally()
            if not stopped() and not keep_missing:
                # A new name of a missing file's content is that file, moved.
                moved = self._catalog.count_moved(gone, tally.found_again)
                self._forget(gone)
                report = replace(
                    report,
                    added=report.added - moved,
                    moved=moved,
                    removed=len(gone) - moved,
                )
            events.stage("building the search index")
            return_freed_memory()
            self._vectors.flush()
            self.mark_finished()
        done = report.added + report.moved + report.failed
        return replace(
            report,
            interrupted=stopped(),
            left=max(0, plan.to_do - done) if stopped() else 0,
            seconds=time.monotonic() - started,
        )

    def _embed(
        self,
        jobs: Iterable[Job],
        encoder: Encoder | Callable[[], Encoder],
        batch_size: int | None,
        workers: int | None,
        stopped: Callable[[], bool],
        events: Events,
    ) -> Tally:
        model = encoder() if callable(encoder) else encoder
        theirs, ours = model.spec, self.manifest.encoder
        if theirs.tiles != ours.tiles:
            raise BadIndex(
                f"the index was made with {ours.tiles} tiles, not {theirs.tiles}",
                "Load its encoder with encoder_for(index.manifest.encoder).",
            )
        if (theirs.weights_hash, theirs.patch_kind) != (ours.weights_hash, ours.patch_kind):
            raise BadIndex(
                f"the index was made with {ours.display_name}, not {theirs.display_name}",
                "Leave --model out, use another --index, or start over with --rebuild.",
            )
        return run(
            jobs,
            model,
            self._shards,
            self._vectors,
            self._catalog,
            batch_size=batch_size or (16 if model.device.type == "cpu" else 256),
            workers=workers or min(16, os.cpu_count() or 1),
            stopped=stopped,
            events=events,
        )

    def _embed_on(
        self,
        cluster: RayCluster,
        jobs: Iterable[Job],
        batch_size: int | None,
        stopped: Callable[[], bool],
        events: Events,
    ) -> Tally:
        from .ray_embed import run_on_ray

        return run_on_ray(
            jobs,
            cluster,
            self.manifest.encoder,
            self._shards,
            self._vectors,
            self._catalog,
            batch_size=batch_size or 64,
            stopped=stopped,
            events=events,
        )

    def _complete(self, events: Events) -> None:
        """Take the lock, and make whole what a run that was cut off left behind."""
        self.hold()
        if self._catalog.get_state(_UNFINISHED):
            events.stage("completing a run that was cut off")
            self.reconcile()
            self.mark_finished()

    def _forget(self, ids: Sequence[int]) -> None:
        """Remove files: from Milvus first, so that a kill leaves no image without a record."""
        if ids:
            self._vectors.delete(ids)
            self._catalog.remove(ids)

    def remove(self, paths: Sequence[Path]) -> int:
        """Take files, or all below folders and archives, out of the index; the files stay.

        Returns:
            How many were taken out.

        Raises:
            InputError: nothing of the index lies at one of the paths.
        """
        self._complete(Events())
        ids: list[int] = []
        for path in paths:
            found = self._ids_at(os.path.abspath(path))
            if not found:
                raise InputError(
                    f"nothing of the index lies at {path}", "See `mmsearch status` for what does."
                )
            ids += found
        self.mark_unfinished()
        self._forget(ids)
        self._vectors.flush()
        self.mark_finished()
        return len(ids)

    def _ids_at(self, path: str) -> list[int]:
        folder, name = split_path(path)
        return (
            self._catalog.ids_under(folder, name)
            or self._catalog.ids_under(os.path.join(path, ""))
            or self._catalog.ids_under(f"{path}!")
        )

    def hold(self) -> None:
        """Keep other processes from writing to the index until it is closed.

        Raises:
            IndexBusy: another process writes to it.
        """
        self._lock.acquire(self._wait)

    def reconcile(self) -> tuple[int, int]:
        """Make Milvus agree with the catalog, from the shards and without the model.

        Returns:
            How many images were put into Milvus, and how many taken out.
        """
        self._lock.acquire(self._wait)
        live, _ = self._catalog.live()
        there = self._vectors.ids()
        lacking = np.setdiff1d(live, there)
        orphans = np.setdiff1d(there, live)
        self._vectors.delete(orphans.tolist())
        self.push(lacking.tolist())
        if len(lacking) or len(orphans):
            self._vectors.flush()
        return len(lacking), len(orphans)

    def push(self, ids: Sequence[int], target: VectorStore | None = None) -> None:
        """Write images into Milvus, the index's own or another, from the shards."""
        store = target or self._vectors
        for start in range(0, len(ids), 1000):
            entries = self._catalog.entries(ids[start : start + 1000])
            positions = [entry.content.position for entry in entries if entry.content]
            store.upsert(entries, self._shards.pooled(np.array(positions, np.int64).reshape(-1, 2)))

    def reset_vectors(self) -> None:
        """Make the Milvus collection anew and empty, whatever state it is in."""
        self._vectors.close()
        if self.manifest.milvus_uri is None:
            _clear(self.path / VECTORS)
        self._vectors.create()

    def mark_unfinished(self) -> None:
        """Say that catalog and Milvus may differ from now on, should this process be killed."""
        self._catalog.set_state(_UNFINISHED, str(os.getpid()))

    def mark_finished(self) -> None:
        """Say that catalog and Milvus agree."""
        self._catalog.set_state(_UNFINISHED, None)

    @property
    def parts(self) -> tuple[Catalog, Shards, VectorStore]:
        """The three places of storage, for checks and moves."""
        return self._catalog, self._shards, self._vectors

    # Reading.

    def search(
        self,
        pooled: np.ndarray,
        limit: int,
        *,
        folder: Path | None = None,
        filters: Filters | None = None,
    ) -> Candidates:
        """Return the nearest images of each query.

        Args:
            pooled: (Q, D) float32, normalised text or image vectors.
            limit: N, candidates wanted; at most 16,384.
            folder: only images below it, or in this archive.tar.
            filters: only images with these facts.

        Raises:
            UsageError: a filter cannot be read.
            StorageError: Milvus fails.
        """
        wanted = filters or Filters()
        if folder is not None:
            wanted = replace(wanted, folder=folder)
        condition: Condition | None = wanted.condition()
        below = None
        if folder is not None and self.manifest.partition_by == "folder":
            path = os.path.abspath(folder)
            below = self._catalog.folders_under(os.path.join(path, ""))
            below += self._catalog.folders_under(f"{path}!")
        limit = max(1, min(limit, len(self)))
        found = self._vectors.search(pooled, limit, condition, folders=below)
        return self._known(found) if self._catalog.get_state(_UNFINISHED) else found

    def _known(self, found: Candidates) -> Candidates:
        """Drop images that a cut-off run left in Milvus without a record."""
        live, _ = self._catalog.live()
        ids, scores = found.ids.copy(), found.scores.copy()
        for row in range(len(ids)):
            keep = np.isin(ids[row], live)
            count = int(keep.sum())
            ids[row, :count], scores[row, :count] = ids[row, keep], scores[row, keep]
            ids[row, count:], scores[row, count:] = -1, -np.inf
        return Candidates(ids, scores)

    def records(self, ids: Sequence[int]) -> list[ImageRecord]:
        """Return the records of images, in the order asked for.

        Raises:
            BadIndex: an id is not known.
        """
        return self._catalog.records(ids)

    def id_of(self, path: Path | str) -> int | None:
        """Return the id of a searchable file, None if it is not in the index."""
        return self._catalog.id_at(*split_path(os.path.abspath(path)))

    def patches(self, ids: Sequence[int]) -> PatchBatch:
        """Return the patch features of images, (M, P, C), in the order asked for.

        Raises:
            BadIndex: an id is not known, or its features are missing from the shards.
        """
        return self._shards.patches(self._catalog.positions(ids))

    def patches_there(self, ids: Sequence[int]) -> PatchBatch:
        """Return the same, with what cannot be read marked in ``PatchBatch.present``.

        Raises:
            BadIndex: an id is not known.
        """
        return self._shards.patches(self._catalog.positions(ids), allow_missing=True)

    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all ids (M,) ascending and pooled vectors (M, D) float32, for exact search."""
        ids, positions = self._catalog.live()
        return ids, self._shards.pooled(positions)

    def failures(self) -> list[Failure]:
        """Return all files that were seen but are not searchable, with the reasons."""
        return self._catalog.failures()

    def stats(self) -> IndexStats:
        """Count what the index holds."""
        return _stats(self.path, self.manifest, self._catalog)


def read_plan(
    path: Path,
    paths: Sequence[Path],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rebuild: bool = False,
) -> Plan:
    """Say what adding files to an index would do, even if it is yet to be made.

    Args:
        path: the index's folder.
        paths: files, folders and tar archives.
        include: gitignore patterns of what to take.
        exclude: gitignore patterns of what to leave.
        rebuild: as if the index were empty; it may be damaged then.

    Raises:
        BadIndex: the index is damaged.
        InputError, UsageError: as ImageIndex.plan.
    """
    path = Path(os.path.abspath(path))
    if (path / FILE_NAME).exists() and not rebuild:
        Manifest.read(path)
        catalog = Catalog(_catalog_of(path), read_only=True)
    else:
        catalog = Catalog(":memory:")
    try:
        return survey(catalog, paths, include, exclude)
    finally:
        catalog.close()


def survey(
    catalog: Catalog, paths: Sequence[Path], include: Sequence[str], exclude: Sequence[str]
) -> Plan:
    """Compare the disk with a catalog; see ImageIndex.plan."""
    plan = Plan()
    for _ in Survey(Walk(paths, Rules(include, exclude)), catalog).jobs(plan):
        pass
    for path in paths:
        where = os.path.abspath(path)
        known = any(catalog.ids_under(*split_path(where))) or catalog.folders_under(
            os.path.join(where, "")
        )
        if is_gone(where) and not (known or catalog.ids_under(f"{where}!")):
            raise InputError(f"there is no file or folder {path}", "Check the spelling.")
    return plan


def read_stats(path: Path) -> tuple[IndexStats, list[Failure]]:
    """Return what an index holds and what failed, even while another process writes to it.

    Raises:
        BadIndex: there is no index, or it is damaged.
    """
    path = Path(os.path.abspath(path))
    manifest = Manifest.read(path)
    catalog = Catalog(_catalog_of(path), read_only=True)
    try:
        return _stats(path, manifest, catalog), catalog.failures()
    finally:
        catalog.close()


def _stats(path: Path, manifest: Manifest, catalog: Catalog) -> IndexStats:
    counts = catalog.counts()
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                size += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # Milvus Lite merged it away just now
                continue
    return IndexStats(
        path,
        manifest,
        counts.images,
        counts.contents,
        counts.failed,
        counts.bytes,
        size,
        catalog.get_state(_UNFINISHED) is not None,
    )


def _make_room(path: Path, lock: IndexLock, rebuild: bool, wait: float) -> None:
    """Make the folder, lock it, and clear it of an earlier index but of nothing else."""
    ours = {FILE_NAME, CATALOG, f"{CATALOG}-wal", f"{CATALOG}-shm", SHARDS, VECTORS, "lock"}
    ours |= {"manifest.part", "heads"}
    _refuse_finished(path, rebuild)  # at once, where there is no need to wait
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = {entry.name for entry in path.iterdir()} - ours
        if others:
            raise BadIndex(
                f"{path} holds other things ({sorted(others)[0]!r})",
                "Give the index a folder of its own with --index DIR.",
            )
        lock.acquire(wait)
        _refuse_finished(path, rebuild)  # another process may have made it meanwhile
        for name in (FILE_NAME, f"{CATALOG}-wal", f"{CATALOG}-shm", CATALOG):
            (path / name).unlink(missing_ok=True)
        for name in (SHARDS, VECTORS):
            _clear(path / name)
        (path / SHARDS).mkdir()
    except OSError as error:
        raise StorageError(
            f"cannot write to the index folder {path}: {error.strerror}",
            "Give another with --index DIR.",
        ) from error


def _refuse_finished(path: Path, rebuild: bool) -> None:
    if (path / FILE_NAME).exists() and not rebuild:
        raise BadIndex(f"there is an index in {path} already", "Open it, or use --rebuild.")


def _clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _catalog_of(path: Path) -> Path:
    """Return where the catalog of an index with a manifest lies."""
    if not (path / CATALOG).is_file():
        raise BadIndex(
            f"the index in {path} has lost its {CATALOG}",
            "Restore it from a backup, or rebuild: mmsearch index --rebuild PATH...",
        )
    return path / CATALOG


def _storage(path: Path, manifest: Manifest) -> LocalStorage | RemoteStorage:
    """Return where an index keeps its shards."""
    place = manifest.shards
    if place is not None and is_url(place):
        return RemoteStorage(place)
    return LocalStorage(path / SHARDS if place is None else Path(place))


def place_of_shards(place: str) -> str:
    """Return a place for shards as the manifest names it."""
    return place if is_url(place) else os.path.abspath(place)


def _claim(storage: LocalStorage | RemoteStorage, place: str, rebuild: bool) -> None:
    """Make sure that the shards of no other index lie there."""
    if storage.names():
        if not rebuild:
            raise BadIndex(
                f"there are shards in {place} already",
                "Give the index a place of its own, or clear it with --rebuild.",
            )
        storage.clear()


def collection_name(path: Path) -> str:
    """Name a collection on a shared server after the folder, uniquely."""
    import re

    from .catalog import id_of_path

    stem = re.sub(r"\W+", "_", path.name, flags=re.ASCII)[:40] or "index"
    return f"mmsearch_{stem}_{id_of_path(str(path)):016x}"
