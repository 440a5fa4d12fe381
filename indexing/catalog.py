"""Which file is where: the SQLite book of an index.

Two tables. ``contents`` has a row per distinct picture content (by hash): where its features lie
in the shards, what the picture says of itself, or why it cannot be decoded. ``files`` has a row
per file seen, by folder and name, and points to its content. So a moved file, a copy or a file
restored from a backup finds its features again without being decoded.

Paths are stored as the file system's bytes; in Python they are str with surrogate escapes.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ..core.errors import BadIndex, StorageError
from ..core.types import ImageRecord
from .facts import Facts

_SCHEMA = """
CREATE TABLE IF NOT EXISTS contents (
    hash BLOB PRIMARY KEY,      -- xxh3_128 of the file's bytes
    shard INTEGER, row INTEGER, -- where its features lie; NULL when it cannot be decoded
    width INTEGER, height INTEGER, taken INTEGER, latitude REAL, longitude REAL, camera TEXT,
    failure TEXT                -- why it cannot be decoded
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY,     -- the id in Milvus
    folder BLOB NOT NULL,       -- ends with the separator, or ! for a tar
    name BLOB NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    content BLOB REFERENCES contents(hash),
    trouble TEXT,               -- why it could not be read; tried again by every run
    UNIQUE (folder, name)
);
CREATE INDEX IF NOT EXISTS files_by_content ON files(content);
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""
_LIVE = "files JOIN contents ON content = hash WHERE failure IS NULL"


class Known(NamedTuple):
    """A file as the catalog remembers it."""

    id: int
    size: int
    mtime_ns: int
    settled: bool  # False: it could not be read and is to be tried again


@dataclass(frozen=True, slots=True)
class Content:
    """What is known of a picture's bytes: where its features lie, or why it has none."""

    hash: bytes
    position: tuple[int, int] | None  # (shard, row)
    facts: Facts | None
    failure: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A file to be recorded."""

    id: int
    folder: str
    name: str
    size: int
    mtime_ns: int
    content: Content | None  # None: it could not be read
    trouble: str | None = None

    @property
    def path(self) -> str:
        """The full path."""
        return self.folder + self.name


@dataclass(frozen=True, slots=True)
class Failure:
    """A file that is not searchable and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Counts:
    """How much an index holds."""

    images: int  # searchable files
    contents: int  # distinct pictures among them
    failed: int
    bytes: int  # of the searchable files
    rows: int  # of the shards that count or once did


def id_of_path(path: str) -> int:
    """Return the positive 63-bit id that a path has in every index."""
    return xxhash.xxh3_64_intdigest(os.fsencode(path)) >> 1 or 1


def prefix_range(prefix: str) -> tuple[str, str]:
    """Return (low, high) such that low <= text < high holds for texts with this prefix only."""
    return prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)


class Catalog:
    """An open catalog; usable from several threads.

    Args:
        path: the file, or ":memory:".
        read_only: open for reading while another process may be writing.

    Raises:
        BadIndex: it is not a catalog, or damaged.
        StorageError: it cannot be opened or written to.
    """

    def __init__(self, path: Path | str, *, read_only: bool = False) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._live: tuple[tuple[int, int], int] | None = None  # (state of the file, live files)
        with self._errors():
            target = f"{Path(path).as_uri()}?mode=ro" if read_only else str(path)
            self._db = sqlite3.connect(
                target, uri=read_only, check_same_thread=False, isolation_level=None, timeout=30
            )
            if not read_only:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(_SCHEMA)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"catalog {self._path}: {error}",
                "Make sure that the folder is writable and the disk is not full.",
            ) from error
        except sqlite3.DatabaseError as error:
            raise BadIndex(
                f"catalog {self._path} is damaged: {error}",
                "Rebuild the index: mmsearch index --rebuild PATH...",
            ) from error

    def _all(self, query: str, *values: object) -> list[tuple]:
        with self._errors():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # What a run needs.

    def in_folder(self, folder: str) -> dict[str, Known]:
        """Return what is known of the files directly in a folder, by name."""
        rows = self._all(
            "SELECT name, id, size, mtime_ns, content IS NOT NULL FROM files WHERE folder = ?",
            os.fsencode(folder),
        )
        return {
            os.fsdecode(name): Known(number, size, mtime_ns, bool(settled))
            for name, number, size, mtime_ns, settled in rows
        }

    def folders_under(self, prefix: str) -> list[str]:
        """Return the folders at or below a prefix that hold known files."""
        low, high = map(os.fsencode, prefix_range(prefix))
        rows = self._all(
            "SELECT DISTINCT folder FROM files WHERE folder >= ? AND folder < ? ORDER BY folder",
            low,
            high,
        )
        return [os.fsdecode(folder) for (folder,) in rows]

    def content(self, digest: bytes) -> Content | None:
        """Return what is known of a content."""
        rows = self._all(
            "SELECT shard, row, width, height, taken, latitude, longitude, camera, failure "
            "FROM contents WHERE hash = ?",
            digest,
        )
        if not rows:
            return None
        shard, row, *facts, failure = rows[0]
        if failure is not None:
            return Content(digest, None, None, failure)
        return Content(digest, (shard, row), Facts(*facts), None)

    def id_for(self, path: str) -> int:
        """Return the id for a path, stepping aside should another path's hash be the same."""
        number = id_of_path(path)
        while True:
            rows = self._all("SELECT folder, name FROM files WHERE id = ?", number)
            if not rows or os.fsdecode(rows[0][0] + rows[0][1]) == path:
                return number
            number += 1

    def commit(self, entries: Sequence[Entry]) -> None:
        """Record files and their contents in one transaction."""
        with self._transaction() as db:
            for content in (entry.content for entry in entries if entry.content):
                facts = content.facts
                shard, row = content.position or (None, None)
                known = (None,) * 6 if facts is None else tuple(facts)
                db.execute(
                    "INSERT OR IGNORE INTO contents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (content.hash, shard, row, *known, content.failure),
                )
            db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        entry.id,
                        os.fsencode(entry.folder),
                        os.fsencode(entry.name),
                        entry.size,
                        entry.mtime_ns,
                        entry.content.hash if entry.content else None,
                        entry.trouble,
                    )
                    for entry in entries
                ],
            )

    def remove(self, ids: Iterable[int]) -> None:
        """Forget files; their contents stay known, in case the files come back."""
        with self._transaction() as db:
            db.executemany("DELETE FROM files WHERE id = ?", ((number,) for number in ids))

    def forget_contents(self, hashes: Iterable[bytes]) -> None:
        """Forget contents and the files that have them, so that they are read anew."""
        with self._transaction() as db:
            for digest in hashes:
                db.execute("DELETE FROM files WHERE content = ?", (digest,))
                db.execute("DELETE FROM contents WHERE hash = ?", (digest,))

    def end(self) -> tuple[int, int]:
        """Return the (shard, row) after the last row that counts."""
        rows = self._all(
            "SELECT shard, row + 1 FROM contents WHERE shard IS NOT NULL "
            "ORDER BY shard DESC, row DESC LIMIT 1"
        )
        return rows[0] if rows else (0, 0)

    # What a search needs.

    def records(self, ids: Sequence[int]) -> list[ImageRecord]:
        """Return the records of searchable images in the order asked for.

        Raises:
            BadIndex: an id is not known.
        """
        found: dict[int, ImageRecord] = {}
        for part in _parts(ids):
            rows = self._all(
                "SELECT id, folder, name, size, mtime_ns, width, height "
                f"FROM {_LIVE} AND id IN ({_marks(part)})",
                *part,
            )
            for number, folder, name, size, mtime_ns, width, height in rows:
                path = os.fsdecode(folder + name)
                found[number] = ImageRecord(number, path, size, mtime_ns, width, height)
        try:
            return [found[number] for number in map(int, ids)]
        except KeyError as error:
            raise _unknown(error.args[0]) from error

    def positions(self, ids: Sequence[int]) -> np.ndarray:
        """Return (M, 2) int64, the shard and row of each image, in the order asked for.

        Raises:
            BadIndex: an id is not known.
        """
        found: dict[int, tuple[int, int]] = {}
        for part in _parts(ids):
            rows = self._all(
                f"SELECT id, shard, row FROM {_LIVE} AND id IN ({_marks(part)})", *part
            )
            found.update((number, (shard, row)) for number, shard, row in rows)
        try:
            places = [found[number] for number in map(int, ids)]
        except KeyError as error:
            raise _unknown(error.args[0]) from error
        return np.array(places, np.int64).reshape(-1, 2)

    def live(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (M,) of all searchable images, ascending, and their positions (M, 2)."""
        rows = self._all(f"SELECT id, shard, row FROM {_LIVE} ORDER BY id")
        table = np.array(rows, np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1:]

    def entries(self, ids: Sequence[int]) -> list[Entry]:
        """Return searchable files with their contents, in the order of their ids."""
        result: list[Entry] = []
        for part in _parts(ids):
            rows = self._all(
                "SELECT id, folder, name, size, mtime_ns, hash, shard, row, width, height, taken, "
                f"latitude, longitude, camera FROM {_LIVE} AND id IN ({_marks(part)}) ORDER BY id",
                *part,
            )
            for number, folder, name, size, mtime_ns, digest, shard, row, *facts in rows:
                content = Content(digest, (shard, row), Facts(*facts), None)
                result.append(
                    Entry(number, os.fsdecode(folder), os.fsdecode(name), size, mtime_ns, content)
                )
        return result

    def all_positions(self) -> tuple[list[bytes], np.ndarray]:
        """Return the hash and the position of every content that has features."""
        rows = self._all("SELECT hash, shard, row FROM contents WHERE shard IS NOT NULL")
        places = np.array([row[1:] for row in rows], np.int64).reshape(-1, 2)
        return [row[0] for row in rows], places

    def id_at(self, folder: str, name: str) -> int | None:
        """Return the id of a searchable file, None if there is none."""
        rows = self._all(
            f"SELECT id FROM {_LIVE} AND folder = ? AND name = ?",
            os.fsencode(folder),
            os.fsencode(name),
        )
        return rows[0][0] if rows else None

    def ids_under(self, folder: str, name: str | None = None) -> list[int]:
        """Return the ids of all files, failed ones too, below a folder or of one name in it."""
        if name is not None:
            values = os.fsencode(folder), os.fsencode(name)
            rows = self._all("SELECT id FROM files WHERE folder = ? AND name = ?", *values)
        else:
            low, high = map(os.fsencode, prefix_range(folder))
            rows = self._all("SELECT id FROM files WHERE folder >= ? AND folder < ?", low, high)
        return [number for (number,) in rows]

    def count_moved(self, gone: Sequence[int], found: Sequence[int]) -> int:
        """Count those of the files gone whose content is that of a file just found."""
        left = self._contents_of(gone)
        came = self._contents_of(found)
        return sum(min(count, came.get(digest, 0)) for digest, count in left.items())

    def _contents_of(self, ids: Sequence[int]) -> Counter[bytes]:
        found: Counter[bytes] = Counter()
        for part in _parts(ids):
            rows = self._all(f"SELECT content FROM {_LIVE} AND id IN ({_marks(part)})", *part)
            found.update(digest for (digest,) in rows)
        return found

    def failures(self) -> list[Failure]:
        """Return all files that are not searchable, by path."""
        rows = self._all(
            "SELECT folder, name, coalesce(trouble, failure) FROM files "
            "LEFT JOIN contents ON content = hash "
            "WHERE content IS NULL OR failure IS NOT NULL ORDER BY folder, name"
        )
        return [Failure(os.fsdecode(folder + name), reason) for folder, name, reason in rows]

    def live_count(self) -> int:
        """Count the searchable files, anew only after a write: every search asks for it."""
        ((others,),) = self._all("PRAGMA data_version")  # changes with writes of other connections
        state = others, self._db.total_changes
        if self._live is None or self._live[0] != state:
            self._live = state, self._all(f"SELECT count(*) FROM {_LIVE}")[0][0]
        return self._live[1]

    def counts(self) -> Counts:
        """Count what there is."""
        ((images, contents, size),) = self._all(
            f"SELECT count(*), count(DISTINCT content), coalesce(sum(size), 0) FROM {_LIVE}"
        )
        ((files,),) = self._all("SELECT count(*) FROM files")
        ((rows,),) = self._all("SELECT count(*) FROM contents WHERE shard IS NOT NULL")
        return Counts(images, contents, files - images, size, rows)

    def get_state(self, key: str) -> str | None:
        """Return a remembered fact about the index."""
        rows = self._all("SELECT value FROM state WHERE key = ?", key)
        return rows[0][0] if rows else None

    def set_state(self, key: str, value: str | None) -> None:
        """Remember a fact about the index, or forget it."""
        with self._transaction() as db:
            if value is None:
                db.execute("DELETE FROM state WHERE key = ?", (key,))
            else:
                db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, value))

    def integrity(self) -> str | None:
        """Let SQLite check the file; return what is wrong, None if nothing."""
        rows = self._all("PRAGMA quick_check(1)")
        return None if rows == [("ok",)] else rows[0][0]


def _parts(ids: Sequence[int], size: int = 900) -> Iterator[list[int]]:
    numbers = [int(number) for number in ids]
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _marks(part: Sequence[int]) -> str:
    return ",".join("?" * len(part))


def _unknown(number: int) -> BadIndex:
    return BadIndex(
        f"the vectors name image {number}, which the catalog does not know",
        "Run `mmsearch check --repair`.",
    )
