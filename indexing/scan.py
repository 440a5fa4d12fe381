"""Which picture files there are: a walk over folders and tar archives that opens no picture.

A folder's path ends with the separator, an archive's with ``!``, so that path + name is always
the name by which a picture is known: ``/photos/cat.jpg``, ``/shards/00.tar!000123.jpg``.
"""

# Paths here are text: any bytes that a file system allows must come through.
# ruff: noqa: PTH116, PTH118, PTH122, PTH123

from __future__ import annotations

import os
import stat
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pathspec

from ..core.errors import InputError, UsageError

IGNORE_FILE = ".mmsearchignore"

# Thumbnails, waste bins and file-system innards that hold no picture a user put there.
SKIPPED_FOLDERS = frozenset(
    {"@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"}
)

# What Pillow with pillow-heif reads, and camera RAW; a test compares this with the libraries.
# Named here so that a run that finds nothing new imports no decoder.
PICTURE_SUFFIXES = frozenset(
    ".apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .flc .fli .ftc .ftu .gbr .gif .heic "  # noqa: SIM905
    ".heics .heif .heifs .hif .icb .icns .ico .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg "
    ".jpx .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd .pxr .qoi .ras .rgb .rgba .sgi "
    ".tga .tif .tiff .vda .vst .webp .xbm .xpm "
    ".3fr .arw .cr2 .cr3 .dng .erf .kdc .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srf "
    ".srw .x3f".split()
)

NO_FILE = "not a regular file"
_GONE = FileNotFoundError, NotADirectoryError


class Seen(NamedTuple):
    """A picture file as its folder lists it."""

    name: str
    size: int  # bytes
    mtime_ns: int  # of the archive, for a member of one
    offset: int = -1  # where an archive's member begins in it


@dataclass(frozen=True, slots=True)
class Folder:
    """One folder or archive and the pictures directly in it."""

    path: str  # ends with the separator, or with "!" for an archive
    files: list[Seen]
    left_alone: frozenset[str] = frozenset()  # names kept out by --include and --exclude
    whole: bool = True  # False where single files were named: the others are not looked at


@dataclass(frozen=True)
class Rules:
    """What the user asked to take and to leave, as gitignore patterns under each root."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def compile(self) -> tuple[pathspec.GitIgnoreSpec | None, pathspec.GitIgnoreSpec | None]:
        """Return matchers for include and exclude, None where there is no pattern.

        Raises:
            UsageError: a pattern is not in gitignore's syntax.
        """
        return _compile("--include", self.include), _compile("--exclude", self.exclude)


def _compile(option: str, patterns: Sequence[str]) -> pathspec.GitIgnoreSpec | None:
    try:
        return pathspec.GitIgnoreSpec.from_lines(patterns) if patterns else None
    except ValueError as error:
        raise UsageError(
            f"{option}: {error}", "Patterns follow .gitignore, for instance '*.png' or 'raw/'."
        ) from error


@dataclass
class Walk:
    """A walk over roots; iterate over it to get the folders, then ask what it could not see.

    Real folders come before symlinked ones, and a folder is entered once however many links
    lead to it, so that links and loops neither hide nor double anything.

    Attributes:
        problems: (path, reason) of what could not be listed.
        left_alone: path prefixes about whose files this walk says nothing: what cannot be looked
            at now but may well be there, and folders kept out by --exclude.
    """

    roots: Sequence[Path]
    rules: Rules = field(default_factory=Rules)
    problems: list[tuple[str, str]] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Folder]:
        self._include, self._exclude = self.rules.compile()
        entered: set[tuple[int, int]] = set()
        links: deque[_Place] = deque()
        single: dict[str, list[Seen]] = {}
        for root in map(os.path.abspath, self.roots):
            try:
                status = os.stat(root)
            except OSError as error:
                self._cannot_see(root, error)
                continue
            if stat.S_ISDIR(status.st_mode):
                place = _Place(os.path.join(root, ""), len(os.path.join(root, "")), ())
                yield from self._enter(place, entered, links)
            elif not stat.S_ISREG(status.st_mode):
                self.problems.append((root, NO_FILE))
            elif root.lower().endswith(".tar"):
                yield from self._archive(root)
            else:
                folder, name = os.path.split(root)
                seen = Seen(name, status.st_size, status.st_mtime_ns)
                single.setdefault(os.path.join(folder, ""), []).append(seen)
        while links:
            yield from self._enter(links.popleft(), entered, links)
        for path, files in single.items():
            yield Folder(path, sorted(set(files)), whole=False)

    def _enter(
        self, top: _Place, entered: set[tuple[int, int]], links: deque[_Place]
    ) -> Iterator[Folder]:
        """Walk one tree depth first in the order of names, putting symlinked folders off."""
        stack = [top]
        while stack:
            place = stack.pop()
            try:
                status = os.stat(place.path)
                if (status.st_dev, status.st_ino) in entered:
                    continue
                entered.add((status.st_dev, status.st_ino))
                with os.scandir(place.path) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                self.problems.append((place.path, error.strerror or str(error)))
                self.left_alone.append(place.path)
                continue
            try:
                place = place.with_ignore_file(entries)
            except (OSError, ValueError) as error:  # what it keeps out must not be taken
                reason = isinstance(error, OSError) and error.strerror
                self.problems.append((place.path + IGNORE_FILE, reason or str(error)))
                self.left_alone.append(place.path)
                continue
            files, passed, folders = self._sort(place, entries)
            yield Folder(place.path, files, frozenset(passed))
            for entry in reversed(folders):
                below = _Place(os.path.join(entry.path, ""), place.root_length, place.ignores)
                if not entry.is_symlink():
                    stack.append(below)
                elif not _contains(entry.path, place.path):
                    links.append(below)

    def _sort(
        self, place: _Place, entries: list[os.DirEntry[str]]
    ) -> tuple[list[Seen], list[str], list[os.DirEntry[str]]]:
        """Split a folder's entries into pictures, pictures passed over and folders to enter."""
        files: list[Seen] = []
        passed: list[str] = []
        folders: list[os.DirEntry[str]] = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
                continue
            try:
                if entry.is_dir():
                    if place.ignores_entry(entry.path + os.sep):
                        continue
                    if self._excluded(entry.path[place.root_length :] + os.sep):
                        self.left_alone.append(os.path.join(entry.path, ""))
                    else:
                        folders.append(entry)
                    continue
                if not is_picture_name(entry.name) or place.ignores_entry(entry.path):
                    continue
                relative = entry.path[place.root_length :]
                if self._excluded(relative) or not self._included(relative):
                    passed.append(entry.name)
                    continue
                status = entry.stat()
            except OSError as error:
                if self._cannot_see(entry.path, error):
                    passed.append(entry.name)
                continue
            if not stat.S_ISREG(status.st_mode):  # to read from a pipe is to wait for ever
                self.problems.append((entry.path, NO_FILE))
                continue
            files.append(Seen(entry.name, status.st_size, status.st_mtime_ns))
        return files, passed, folders

    def _archive(self, path: str) -> Iterator[Folder]:
        try:
            files, passed = [], []
            modified = os.stat(path).st_mtime_ns
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not (member.isfile() and is_picture_name(member.name)):
                        continue
                    if self._excluded(member.name) or not self._included(member.name):
                        passed.append(member.name)
                    else:
                        files.append(Seen(member.name, member.size, modified, member.offset_data))
        except (OSError, tarfile.TarError) as error:
            self.problems.append((path, str(error)))
            self.left_alone.append(f"{path}!")
            return
        yield Folder(f"{path}!", sorted(files), frozenset(passed))

    def _cannot_see(self, path: str, error: OSError) -> bool:
        """Name a problem; return whether the path may still be there, and leave it alone then."""
        self.problems.append((path, error.strerror or str(error)))
        if isinstance(error, _GONE):
            return False
        self.left_alone += [os.path.join(path, ""), f"{path}!"]
        return True

    def _excluded(self, relative: str) -> bool:
        return self._exclude is not None and self._exclude.match_file(relative)

    def _included(self, relative: str) -> bool:
        return self._include is None or self._include.match_file(relative)


class _Place(NamedTuple):
    """A folder to enter and the ignore files that hold there, outermost first."""

    path: str
    root_length: int
    ignores: tuple[tuple[int, pathspec.GitIgnoreSpec], ...]  # (length of its folder, patterns)

    def with_ignore_file(self, entries: list[os.DirEntry[str]]) -> _Place:
        if not any(entry.name == IGNORE_FILE for entry in entries):
            return self
        text = Path(self.path, IGNORE_FILE).read_text(encoding="utf-8", errors="surrogateescape")
        patterns = pathspec.GitIgnoreSpec.from_lines(text.splitlines())
        return self._replace(ignores=(*self.ignores, (len(self.path), patterns)))

    def ignores_entry(self, path: str) -> bool:
        for length, patterns in reversed(self.ignores):  # the nearest ignore file decides
            verdict = patterns.check_file(path[length:]).include
            if verdict is not None:
                return verdict
        return False


def _contains(link: str, folder: str) -> bool:
    """Whether a link leads to the folder it lies in or one above: a loop, not a collection."""
    target = os.path.join(os.path.realpath(link), "")
    return os.path.join(os.path.realpath(folder), "").startswith(target)


def is_gone(path: str) -> bool:
    """Say whether there is nothing at a path, which is more than that it cannot be looked at."""
    try:
        os.stat(path)
    except _GONE:
        return True
    except OSError:  # no permission, a share that does not answer: nobody knows
        return False
    return False


def is_picture_name(name: str) -> bool:
    """Say whether a file's name promises a picture."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def split_path(path: str) -> tuple[str, str]:
    """Split a picture's full path into its folder (or archive) and its name there."""
    archive, mark, member = path.partition(".tar!")
    if mark:
        return f"{archive}{mark}", member
    folder, name = os.path.split(path)
    return os.path.join(folder, ""), name


def read_picture(folder: str, seen: Seen) -> tuple[bytes, Seen]:
    """Read a picture file in full, with the fingerprint of exactly what was read.

    Raises:
        InputError: it is too large, changes faster than it can be read, or its archive is not the
            one that was listed.
        OSError: it cannot be read.
    """
    from .images import MAX_BYTES

    in_archive = seen.offset >= 0
    for _ in range(3):
        with open(folder[:-1] if in_archive else folder + seen.name, "rb") as file:
            before = os.fstat(file.fileno())
            size = seen.size if in_archive else before.st_size
            if size > MAX_BYTES:
                raise InputError(f"the file of {size >> 20} MiB is too large for a picture")
            if in_archive and before.st_mtime_ns != seen.mtime_ns:  # its members lie elsewhere now
                raise InputError("the archive changed since it was listed", "Run it again.")
            if in_archive:
                file.seek(seen.offset)
            content = file.read(size)
            after = os.fstat(file.fileno())
        if len(content) == size and before.st_mtime_ns == after.st_mtime_ns:
            return content, seen._replace(size=size, mtime_ns=before.st_mtime_ns)
    raise InputError("the file changes while it is read")
