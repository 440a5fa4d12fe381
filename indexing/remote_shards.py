"""Shards on any fsspec URL (``s3://bucket/x``, ``gs://``, ``http://``), read by ranges.

Object stores cannot append to an object, so a shard file is a folder of parts there, each named by
its first row and never changed::

    s3://bucket/x/000000.patches/0000000000
    s3://bucket/x/000000.patches/0000000512

A part counts up to the first row of the next. What is read stays in a local cache, row by row.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..core.errors import BadIndex, StorageError, UsageError
from ..core.settings import cache_dir

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CACHE_BYTES = 10 << 30  # the least recently filled parts go when the cache holds more
GAP_BYTES = 1 << 18  # rows closer than this are fetched by one request
_NAME = re.compile(r"\d{10}")
_T = TypeVar("_T")


def is_url(place: str) -> bool:
    """Say whether shards at ``place`` are reached through fsspec rather than as a local folder."""
    return "://" in place or "::" in place


class RemoteStorage:
    """Shards at an fsspec URL; see ``shards.Storage``.

    Credentials and end points are fsspec's own (``AWS_PROFILE``, ``~/.config/fsspec``, ...).

    Args:
        url: the folder of the shards.
        cache: where rows that were read are kept; None takes the user's cache folder.
        cache_bytes: how much may be kept there.

    Raises:
        UsageError: no filesystem of that kind is installed.
    """

    def __init__(self, url: str, cache: Path | None = None, cache_bytes: int = CACHE_BYTES) -> None:
        import fsspec

        try:
            self._files: AbstractFileSystem
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"cannot use --shards {url}: {error}",
                'S3 needs: pip install "mmsearch[cloud]"; see the fsspec documentation for others.',
            ) from error
        self.url = url
        self._root = root.rstrip("/")
        folder = hashlib.sha256(url.encode()).hexdigest()[:16]
        self._cache = (cache or cache_dir() / "shards") / folder
        self._cache_bytes = cache_bytes

    def rows(self, name: str, kind: np.dtype) -> RemoteRows:
        """Look at the parts of a shard file; rows are fetched when they are asked for."""
        parts = self._parts(name, kind)
        self._evict()
        return RemoteRows(self, [part for part in parts if part.rows], kind)

    def append(self, name: str, at: int, rows: np.ndarray) -> None:
        """Write rows as a new part, after removing the parts that a killed run left behind."""
        kind = np.dtype((rows.dtype, rows.shape[1:]))
        parts = self._parts(name, kind)
        if at > (parts[-1].end if parts else 0):
            raise BadIndex(
                f"{self.url}/{name} is shorter than the catalog says",
                "Run `mmsearch check --repair`.",
            )
        for part in reversed(parts):
            if part.start >= at:
                self.attempt(lambda path=part.path: self._files.rm_file(path))
        content = np.ascontiguousarray(rows).tobytes()
        path = f"{self._root}/{name}/{at:010d}"
        # Stores have no folders to make; file systems do, and say nothing if it is there.
        self.attempt(lambda: self._files.makedirs(f"{self._root}/{name}", exist_ok=True))
        self.attempt(lambda: self._files.pipe_file(path, content))

    def names(self) -> list[str]:
        """List the shard files."""
        return sorted(Path(entry["name"]).name for entry in self._list(self._root))

    def clear(self) -> None:
        """Delete all shard files."""
        for name in self.names():
            self.attempt(lambda name=name: self._files.rm(f"{self._root}/{name}", recursive=True))

    def fetch(self, wanted: list[tuple[str, int, int]]) -> list[bytes]:
        """Read byte ranges, each (path, start, end), at once where the filesystem can."""
        paths, starts, ends = (list(column) for column in zip(*wanted, strict=True))
        return self.attempt(lambda: self._files.cat_ranges(paths, starts, ends, on_error="raise"))

    def attempt(self, action: Callable[[], _T]) -> _T:
        """Run an action on the store; its failures become a StorageError."""
        try:
            return action()
        except Exception as error:  # each store's client raises its own kinds
            said = str(error) or type(error).__name__
            raise StorageError(
                f"cannot use the shards at {self.url}: {said}",
                "Check the URL, the credentials and the network.",
            ) from error

    def _list(self, folder: str) -> list[dict]:
        def listing() -> list[dict]:
            self._files.invalidate_cache()
            try:
                return self._files.ls(folder, detail=True)
            except FileNotFoundError:
                return []

        return self.attempt(listing)

    def _parts(self, name: str, kind: np.dtype) -> list[_Part]:
        entries = [
            (int(stem), entry)
            for entry in self._list(f"{self._root}/{name}")
            if _NAME.fullmatch(stem := Path(entry["name"]).name)
        ]
        # A plain web server lists names only.
        entries = [
            (start, entry if entry.get("size") is not None else self._facts(entry["name"]))
            for start, entry in entries
        ]
        entries.sort(key=lambda pair: pair[0])
        parts = []
        for place, (start, entry) in enumerate(entries):
            held = entry["size"] // kind.itemsize
            following = entries[place + 1][0] if place + 1 < len(entries) else start + held
            # An object written anew under the same name has another tag or time.
            facts = json.dumps(entry, sort_keys=True, default=str)
            version = hashlib.sha256(facts.encode()).hexdigest()[:16]
            cached = self._cache / f"{name}-{start:010d}-{version}"
            parts.append(_Part(entry["name"], start, max(0, min(held, following - start)), cached))
        return parts

    def _facts(self, path: str) -> dict:
        return self.attempt(lambda: self._files.info(path))

    def _evict(self) -> None:
        """Delete the parts filled longest ago until the cache is within its limit."""
        try:
            files = [(path, path.stat()) for path in self._cache.glob("*.rows")]
        except OSError:
            return  # another process is tidying up
        files.sort(key=lambda pair: pair[1].st_mtime)
        held = sum(_allocated(status) for _, status in files)
        for path, status in files:
            if held <= self._cache_bytes:
                return
            path.with_suffix(".have").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            held -= _allocated(status)


def _allocated(status: os.stat_result) -> int:
    """Bytes on disk: a part of which few rows were read is a sparse file."""
    return getattr(status, "st_blocks", status.st_size // 512) * 512


@dataclass(frozen=True, slots=True)
class _Part:
    path: str
    start: int  # its first row
    rows: int
    cached: Path  # without suffix: ``.rows`` holds rows, ``.have`` a byte for each that is there

    @property
    def end(self) -> int:
        return self.start + self.rows


class RemoteRows:
    """The rows of a shard file; index it with one row or an array of rows to read them."""

    def __init__(self, storage: RemoteStorage, parts: list[_Part], kind: np.dtype) -> None:
        self._storage = storage
        self._parts = parts
        self._kind = kind
        self._starts = np.array([part.start for part in parts], np.int64)

    def __len__(self) -> int:
        return self._parts[-1].end if self._parts else 0

    def __getitem__(self, index: int | np.ndarray) -> np.ndarray:
        """Read rows, (M, ...) for M of them, from the cache or else from the store.

        Raises:
            BadIndex: a row is in no part.
            StorageError: the store cannot be read.
        """
        wanted = np.atleast_1d(np.asarray(index, np.int64))
        result = np.empty((len(wanted), *self._kind.shape), self._kind.base)
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        tasks = []
        for number in np.unique(owners):
            places = np.flatnonzero(owners == number)
            part = self._parts[number] if number >= 0 else None
            if part is None or wanted[places].max() >= part.end:
                raise BadIndex(
                    f"the shards at {self._storage.url} lack rows that the catalog names",
                    "Run `mmsearch check --repair`.",
                )
            local = wanted[places] - part.start
            tasks.append((part, places, local, *self._open(part, local)))
        self._fill(
            [(part, need[have[need] == 0], rows, have) for part, _, need, rows, have in tasks]
        )
        for _, places, local, rows, _ in tasks:
            result[places] = rows[local]
        return result[0] if np.ndim(index) == 0 else result

    def _open(self, part: _Part, need: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map a part's cache: (rows, ...) and a byte a row that says whether it is there.

        There is room for the rows needed: on a full disk, writing to a mapping kills the process.
        """
        row_file, have_file = (
            part.cached.with_name(part.cached.name + suffix) for suffix in (".rows", ".have")
        )
        try:
            part.cached.parent.mkdir(parents=True, exist_ok=True)
            rows = _map(row_file, self._kind, part.rows)
            have = _map(have_file, np.dtype("u1"), part.rows)
            _reserve(have_file, 0, part.rows)
            size = self._kind.itemsize
            for first, last in _spans(need[have[need] == 0], GAP_BYTES // size):
                _reserve(row_file, first * size, last * size)
        except OSError:  # no room or no right to keep anything: read without keeping
            rows = np.empty((part.rows, *self._kind.shape), self._kind.base)
            have = np.zeros(part.rows, np.uint8)
        return rows, have

    def _fill(self, tasks: list[tuple[_Part, np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Fetch the missing rows of all parts together; mark them only once they are written."""
        size = self._kind.itemsize
        spans = [
            (part, first, last, rows, have)
            for part, missing, rows, have in tasks
            for first, last in _spans(missing, GAP_BYTES // size)
        ]
        if not spans:
            return
        fetched = self._storage.fetch(
            [(part.path, first * size, last * size) for part, first, last, _, _ in spans]
        )
        for (part, first, last, rows, have), content in zip(spans, fetched, strict=True):
            if len(content) != (last - first) * size:
                raise StorageError(f"{part.path} is shorter than its listing says")
            values = np.frombuffer(content, self._kind.base).reshape(-1, *self._kind.shape)
            rows[first:last] = values
            have[first:last] = 1


def _map(path: Path, kind: np.dtype, count: int) -> np.ndarray:
    """Map a cache file of ``count`` rows, made sparse if it is not there."""
    with path.open("ab") as file:
        if file.tell() < count * kind.itemsize:
            file.truncate(count * kind.itemsize)
    return np.memmap(path, kind.base, "r+", shape=(count, *kind.shape))


def _reserve(path: Path, start: int, end: int) -> None:
    """Allocate a stretch of a sparse file; what is there stays. Not all systems can (macOS)."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), start, end - start)


def _spans(rows: np.ndarray, gap: int) -> Iterator[tuple[int, int]]:
    """Join rows into spans (first, last + 1), bridging gaps of up to ``gap`` rows."""
    rows = np.unique(rows)
    if len(rows):
        breaks = np.flatnonzero(np.diff(rows) > gap + 1)
        for run in np.split(rows, breaks + 1):
            yield int(run[0]), int(run[-1]) + 1
