"""The walk: what is seen, what is passed over, and what it admits not to know."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from mmsearch.core.errors import InputError, UsageError
from mmsearch.indexing import scan
from mmsearch.indexing.scan import Rules, Seen, Walk, read_picture, split_path


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (1 + len(name)))


def seen(root: Path, *roots: Path, **rules) -> list[str]:
    walk = Walk(roots or [root], Rules(**rules))
    paths = [folder.path + file.name for folder in walk for file in folder.files]
    return [os.path.relpath(path, root) for path in paths]


def test_pictures_by_name_hidden_things_passed_over(tmp_path):
    touch(tmp_path, "b.JPG", "a.png", "notes.txt", ".hidden.jpg", ".git/c.jpg", "@eaDir/d.jpg")
    touch(tmp_path, "z/e.heic", "z/f.NEF", "z/y/g.webp")
    assert seen(tmp_path) == ["a.png", "b.JPG", "z/e.heic", "z/f.NEF", "z/y/g.webp"]


def test_ignore_files_nest_and_negate(tmp_path):
    touch(tmp_path, "a.jpg", "raw/b.jpg", "keep/raw/c.jpg", "keep/d.gif", "keep/e.gif", "f.gif")
    (tmp_path / ".mmsearchignore").write_text("/raw/\n*.gif\n# a comment\n")
    (tmp_path / "keep" / ".mmsearchignore").write_text("!e.gif\n")
    assert seen(tmp_path) == ["a.jpg", "keep/e.gif", "keep/raw/c.jpg"]


def test_include_and_exclude(tmp_path):
    touch(tmp_path, "a.jpg", "b.png", "trips/c.jpg", "trips/d.png", "raw/e.jpg")
    assert seen(tmp_path, include=["*.jpg"], exclude=["raw/"]) == ["a.jpg", "trips/c.jpg"]
    walk = Walk([tmp_path], Rules(include=["*.jpg"], exclude=["raw/"]))
    passed = {folder.path: set(folder.left_alone) for folder in walk}
    assert passed == {f"{tmp_path}/": {"b.png"}, f"{tmp_path}/trips/": {"d.png"}}
    assert walk.left_alone == [f"{tmp_path}/raw/"]
    with pytest.raises(UsageError, match="--exclude"):
        list(Walk([tmp_path], Rules(exclude=["!"])))


def test_links_and_loops(tmp_path):
    touch(tmp_path, "photos/b/x.jpg", "elsewhere/y.jpg")
    photos = tmp_path / "photos"
    (photos / "a").symlink_to("b")  # sorts before what it points to
    (photos / "up").symlink_to("..")
    (photos / "self").symlink_to(".")
    (photos / "out").symlink_to(tmp_path / "elsewhere")
    (photos / "file.jpg").symlink_to(tmp_path / "elsewhere" / "y.jpg")
    (photos / "dangling.jpg").symlink_to("nothing")
    found = seen(tmp_path, photos)
    assert found[:3] == ["photos/file.jpg", "photos/b/x.jpg", "photos/out/y.jpg"]
    assert len(found) == 3


def test_roots_that_overlap_and_single_files(tmp_path):
    touch(tmp_path, "a/b/c.jpg", "a/d.jpg", "a/odd.bin")
    found = seen(tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "odd.bin")
    assert found == ["a/d.jpg", "a/b/c.jpg", "a/odd.bin"]
    walk = Walk([tmp_path / "a" / "d.jpg"])
    assert [folder.whole for folder in walk] == [False]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path):
    touch(tmp_path, "closed/a.jpg", "open/b.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        walk = Walk([tmp_path])
        assert [file.name for folder in walk for file in folder.files] == ["b.jpg"]
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert walk.problems == [(f"{tmp_path}/closed/", "Permission denied")]
    assert walk.left_alone == [f"{tmp_path}/closed/"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "closed/a.jpg", "open/b.jpg")
    scandir = os.scandir

    def refuse(path):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    walk = Walk([tmp_path])
    assert [file.name for folder in walk for file in folder.files] == ["b.jpg"]
    assert walk.problems == [(f"{tmp_path}/closed/", "Permission denied")]
    assert walk.left_alone == [f"{tmp_path}/closed/"]


def test_what_cannot_be_looked_at_is_left_alone(tmp_path, monkeypatch):
    touch(tmp_path, "stale/a.jpg", "shy/b.jpg", "link/c.jpg", "gone.jpg", "open.jpg")
    (tmp_path / "to link").symlink_to(tmp_path / "link")
    look, scandir = os.stat, os.scandir

    class Shy:
        """An entry of a folder that may be listed but not looked into."""

        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path, self._entry = entry.name, entry.path, entry

        def is_symlink(self) -> bool:
            return self._entry.is_symlink()

        def is_dir(self) -> bool:
            if self.name == "to link":
                raise PermissionError(13, "Permission denied", self.path)
            return self._entry.is_dir()

        def stat(self) -> os.stat_result:
            if self.name == "gone.jpg":
                raise FileNotFoundError(2, "No such file or directory", self.path)
            if self.name == "b.jpg":
                raise PermissionError(13, "Permission denied", self.path)
            return self._entry.stat()

    class Listing:
        def __init__(self, path: str) -> None:
            self._entries = [Shy(entry) for entry in scandir(path)]

        def __enter__(self) -> list[Shy]:
            return self._entries

        def __exit__(self, *error: object) -> None: ...

    def refuse(path, **options):
        if str(path).startswith(str(tmp_path / "stale")):
            raise OSError(116, "Stale file handle", str(path))
        return look(path, **options)

    walk = Walk([tmp_path, tmp_path / "stale"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        patch.setattr(os, "scandir", Listing)
        folders = {folder.path: folder for folder in walk}
    assert [file.name for file in folders[f"{tmp_path}/"].files] == ["open.jpg"]
    assert folders[f"{tmp_path}/"].left_alone == {"to link"}
    assert folders[f"{tmp_path}/shy/"].left_alone == {"b.jpg"}
    assert {f"{tmp_path}/stale/", f"{tmp_path}/to link/"} <= set(walk.left_alone)
    assert f"{tmp_path}/gone.jpg/" not in walk.left_alone
    assert (str(tmp_path / "stale"), "Stale file handle") in walk.problems


def test_only_files_are_read(tmp_path):
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe.tar")
    assert seen(tmp_path) == ["a.jpg"]
    walk = Walk([tmp_path / "pipe.jpg", tmp_path / "pipe.tar"])
    assert list(walk) == []
    assert [reason for _, reason in walk.problems] == ["not a regular file"] * 2


def test_an_ignore_file_that_cannot_be_used_is_named(tmp_path):
    touch(tmp_path, "a.jpg", "folder/b.jpg", "folder/below/c.jpg", "pattern/d.jpg")
    (tmp_path / "folder" / ".mmsearchignore").mkdir()
    (tmp_path / "pattern" / ".mmsearchignore").write_text("!\n")
    walk = Walk([tmp_path])
    assert [file.name for folder in walk for file in folder.files] == ["a.jpg"]
    assert [path for path, _ in walk.problems] == [
        f"{tmp_path}/folder/.mmsearchignore",
        f"{tmp_path}/pattern/.mmsearchignore",
    ]
    assert walk.left_alone == [f"{tmp_path}/folder/", f"{tmp_path}/pattern/"]


def test_an_archive_rewritten_since_it_was_listed(tmp_path):
    """Where a member lay, another lies now."""
    touch(tmp_path, "a.jpg", "b.jpg")

    def pack(*names: str) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name in names:
                tar.add(tmp_path / name, name)

    pack("a.jpg", "b.jpg")
    (folder,) = Walk([tmp_path / "x.tar"])
    pack("b.jpg", "a.jpg")
    os.utime(tmp_path / "x.tar", ns=(0, folder.files[0].mtime_ns + 1_000_000))
    with pytest.raises(InputError, match="archive changed"):
        read_picture(folder.path, folder.files[0])


def test_archives(tmp_path):
    touch(tmp_path, "a.jpg", "b.txt", "c.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("c.png", "b.txt", "a.jpg"):
            tar.add(tmp_path / name, f"in/{name}")
    (folder,) = Walk([tmp_path / "x.tar"])
    assert folder.path == f"{tmp_path}/x.tar!"
    assert [file.name for file in folder.files] == ["in/a.jpg", "in/c.png"]
    content, _ = read_picture(folder.path, folder.files[0])
    assert content == (tmp_path / "a.jpg").read_bytes()
    assert split_path(f"{tmp_path}/x.tar!in/a.jpg") == (f"{tmp_path}/x.tar!", "in/a.jpg")
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    walk = Walk([tmp_path / "bad.tar"])
    assert list(walk) == []
    assert walk.problems[0][0] == f"{tmp_path}/bad.tar"


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg")
    path = tmp_path / "a.jpg"
    fingerprint = Seen("a.jpg", 0, 0)
    content, now = read_picture(f"{tmp_path}/", fingerprint)
    assert (now.size, now.mtime_ns) == (len(content), path.stat().st_mtime_ns)
    fstat = os.fstat

    def restless(number):
        os.utime(path, ns=(0, fstat(number).st_mtime_ns + 1_000_000))
        return fstat(number)

    monkeypatch.setattr(scan.os, "fstat", restless)
    with pytest.raises(InputError, match="changes while it is read"):
        read_picture(f"{tmp_path}/", fingerprint)


def test_any_bytes_a_file_system_allows(tmp_path):
    names = [b"caf\xe9.jpg", "🐈 'quoted\" \n.png".encode(), b"%_\\.gif"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    found = [os.fsencode(file.name) for folder in Walk([tmp_path]) for file in folder.files]
    assert sorted(found) == sorted(names)
