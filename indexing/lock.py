"""One process at a time in an index, and a word about who it is."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import IO

from ..core.errors import IndexBusy, StorageError


class IndexLock:
    """An exclusive lock on an index folder, held until ``release`` or the process ends.

    The operating system drops the lock with the process, so a killed run leaves nothing behind
    that would have to be cleared away.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def acquire(self, wait: float = 0.0) -> None:
        """Take the lock, trying for ``wait`` seconds.

        Raises:
            IndexBusy: somebody else has it; the message says who and since when.
            StorageError: the folder cannot be written to.
        """
        if self._file is not None:
            return
        try:
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"cannot write to the index folder {self._path.parent}: {error.strerror}",
                "Searching and indexing need a writable index folder.",
            ) from error
        deadline = time.monotonic() + wait
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                owner = _describe(self._path)
                file.close()
                raise IndexBusy(
                    f"{owner} has the index {self._path.parent} open",
                    "Let it finish, or wait for it with --wait SECONDS.",
                )
            time.sleep(0.05)
        file.truncate(0)
        command = " ".join(Path(sys.argv[0]).name if i == 0 else a for i, a in enumerate(sys.argv))
        owner = {"pid": os.getpid(), "since": time.time(), "command": command[:200]}
        file.write(json.dumps(owner))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let go; harmless when the lock is not held."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def _describe(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        since = datetime.fromtimestamp(owner["since"]).strftime("%H:%M:%S")
        if owner["pid"] == os.getpid():
            return f"this process (since {since})"
        return f"process {owner['pid']} ({owner['command']!r}, since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[str]) -> bool:
        try:
            file.seek(1 << 30)  # beyond the text, which others must be able to read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
