"""mmsearch index, status, check and remove as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from mmsearch.cli import check, index, remove, status
from mmsearch.cli.output import report_error
from mmsearch.indexing.index import ImageIndex

from .test_index import make_pictures

COMMANDS = (check, index, remove, status)
RUN = "import sys; from tests.test_cli_index import main; sys.exit(main(sys.argv[1:]))"


def main(words: list[str]) -> int:
    """The four commands behind the error boundary, as cli/app.py puts them."""
    app = typer.Typer(pretty_exceptions_enable=False)
    for module in COMMANDS:
        name = module.__name__.rsplit(".", 1)[1]
        app.command(name, epilog=module.EXAMPLES)(getattr(module, name))
    try:
        return app(words, standalone_mode=False) or 0
    except Exception as error:
        return report_error(error, debug=False)


class Shell:
    """Run commands against one index, here or in a process of their own."""

    def __init__(self, folder: Path, model: Path, capture, monkeypatch) -> None:
        self.model = f"local-dir:{model}"
        self._capture = capture
        self._monkeypatch = monkeypatch
        self.use(folder / "index")

    def use(self, folder: Path) -> None:
        self.index = folder
        self._monkeypatch.setenv("MMSEARCH_INDEX", str(folder))

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        self._capture.readouterr()
        code = main(list(map(str, words)))
        return (code, *self._capture.readouterr())

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, words)],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def shell(tmp_path, tiny_model_dir, capfd, monkeypatch) -> Shell:
    return Shell(tmp_path, tiny_model_dir, capfd, monkeypatch)


@pytest.fixture
def photos(tmp_path) -> Path:
    make_pictures(tmp_path / "photos", 9)
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no picture")
    return tmp_path / "photos"


def test_a_life(shell, photos):
    assert shell("index", photos, "--dry-run") == (
        0,
        "would add 10 pictures to a new index\n",
        "",
    )
    code, out, error = shell("index", photos, "--model", shell.model)
    assert code == 0, error
    assert out.startswith("9 added, 0 unchanged, 0 removed, 1 failed (mmsearch status --failed) in")
    assert "bad.jpg: not a picture" in error
    code, out, error = shell("index", photos)
    assert (code, error) == (0, "")
    assert out.startswith("0 added, 10 unchanged, 0 removed, 0 failed in")
    (photos / "0000.png").unlink()
    make_pictures(photos, 1, 50)
    code, out, _ = shell("index", photos, "-n")
    assert out == (
        "would read 1 new, 0 changed and 0 failed files, leave 9 as they are and remove 1\n"
    )
    code, out, _ = shell("index", photos, "--keep-missing")
    assert out.startswith("1 added, 9 unchanged, 0 removed")
    code, out, _ = shell("index", photos, "--rebuild")
    assert out.startswith("9 added, 0 unchanged")
    code, out, _ = shell("status")
    assert "9, " in out
    assert shell.model in out
    code, out, _ = shell("status", "--json", "--failed")
    facts = json.loads(out)
    assert (facts["images"], facts["failed"], facts["model"]) == (9, 1, shell.model)
    assert facts["failures"][0]["path"] == str(photos / "bad.jpg")
    assert shell("status", "--failed")[1].startswith(f"{photos}/bad.jpg\tnot a picture")
    assert shell("remove", photos / "0001.png", "-q")[:2] == (0, "")
    code, _, error = shell("remove", photos / "0001.png")
    assert (code, "nothing of the index" in error) == (4, True)
    code, _, error = shell("check")
    assert (code, "8 pictures: catalog, shards and Milvus agree" in error) == (0, True)


def test_refusals(shell, photos, tmp_path, tiny_model):
    for words, code, says in [
        (("index", tmp_path / "nowhere"), 4, "no file or folder"),
        (("index", tmp_path), 4, "no pictures"),
        (("index", photos, "--patch-codes", "int2"), 2, "int2"),
        (("index", photos, "--exclude", "!"), 2, "--exclude"),
        (("status",), 5, "no index"),
        (("check",), 5, "no index"),
    ]:
        if "no pictures" in says:
            (tmp_path / "empty").mkdir()
            words = ("index", tmp_path / "empty")
        found, out, error = shell(*words)
        assert (found, out) == (code, ""), error
        assert says in error
        assert len(error.strip().splitlines()) == 2, "one line and a way out"
    assert not shell.index.exists(), "a refusal makes nothing"
    assert shell("index", photos, "--model", shell.model, "-q")[0] == 0
    make_pictures(photos, 1, 70)
    code, _, error = shell("index", photos, "--model", f"local-dir:{tiny_model('vit-wide')}")
    assert (code, "the index was made with" in error) == (5, True)
    code, _, error = shell("index", photos, "--milvus", "http://nowhere:1")
    assert (code, "migrate" in error) == (5, True)


def test_damage_is_found_and_mended(shell, photos):
    assert shell("index", photos, "--model", shell.model, "-q")[0] == 0
    with ImageIndex.open(shell.index) as opened:
        opened.parts[2].delete(opened.pooled()[0][:2].tolist())
    code, out, error = shell("check")
    assert (code, out) == (5, "2 pictures are missing from Milvus\n")
    assert "check --repair" in error
    assert shell("check", "--repair")[:2] == (0, "put 2 pictures into Milvus\n")


@pytest.mark.parametrize("damage", ["garbage", "no catalog", "manifest"])
def test_the_printed_way_out_of_damage_works(shell, photos, damage):
    assert shell("index", photos, "--model", shell.model, "-q")[0] == 0
    if damage == "garbage":
        (shell.index / "catalog.sqlite").write_bytes(b"SQLite format 3\0" + b"garbage" * 600)
    elif damage == "no catalog":
        (shell.index / "catalog.sqlite").unlink()
    else:
        (shell.index / "manifest.json").write_text("{")
    for command in (("index", photos), ("index", photos, "-n"), ("check",), ("status",)):
        code, _, error = shell(*command)
        assert (code, "mmsearch index --rebuild" in error) == (5, True), (command, error)
    words = ("index", photos, "--rebuild", "--model", shell.model)
    assert shell(*words, "-n")[:2] == (0, "would add 10 pictures to a new index\n")
    code, out, error = shell(*words)
    assert (code, out.startswith("9 added, 0 unchanged")) == (0, True), error
    assert shell("check")[:2] == (0, "")


def test_what_an_index_was_made_with_stays(shell, photos, tmp_path):
    choices = {
        "--patch-codes": ("int4", "fp16"),
        "--patch-pool": ("2", "1"),
        "--tiles": ("2x2", "3x3"),
        "--patch-kind": ("penultimate", "aligned"),
        "--index-type": ("FLAT", "HNSW"),
        "--partition-by": ("folder", "none"),
        "--shards": (str(tmp_path / "shards"), str(tmp_path / "others")),
    }
    words = [word for option, (value, _) in choices.items() for word in (option, value)]
    assert shell("index", photos, "--model", shell.model, "-q", *words)[0] == 0
    manifest = (shell.index / "manifest.json").read_text()
    for option, (value, other) in choices.items():
        code, _, error = shell("index", photos, option, other)
        assert code == 5
        assert f"the index was made with {option} {value}, not {other}" in error
    code, _, error = shell("index", photos, "--index-params", '{"M": 8}')
    assert (code, "the index was made without --index-params" in error) == (5, True)
    assert shell("index", photos, "-q", *words)[0] == 0
    code, _, error = shell("index", photos, "-q", "--rebuild")
    assert code == 0, error
    assert (shell.index / "manifest.json").read_text() == manifest
    assert shell("index", photos, "-q", "--rebuild", "--patch-codes", "int8")[0] == 0
    changed = (shell.index / "manifest.json").read_text()
    assert changed == manifest.replace('"int4"', '"int8"')


def test_busy_and_waiting(shell, photos):
    assert shell("index", photos, "--model", shell.model, "-q")[0] == 0
    with ImageIndex.open(shell.index):
        other = shell.start("index", photos)
        _, error = other.communicate(timeout=60)
        assert other.returncode == 6
        assert f"process {os.getpid()}" in error
        assert "--wait" in error
        assert shell("status")[0] == 0, "status never waits"
        waiting = shell.start("check", "--wait", "60")
        time.sleep(2)
        assert waiting.poll() is None
    assert waiting.wait(60) == 0
    waiting.communicate()


def test_interrupted(shell, photos):
    make_pictures(photos, 1500, 1000)
    process = shell.start("index", photos, "--model", shell.model, "--batch-size", "4")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (shell.index / "shards" / "000000.patches").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "stopping after the batches in flight" in error
    assert "the same command goes on from here" in error
    added = int(out.split()[0].replace(",", ""))
    assert added > 0
    assert shell("check", "-q")[0] == 0
    code, out, _ = shell("index", photos)
    assert code == 0
    assert out.startswith(f"{1509 - added:,} added, ")
    assert json.loads(shell("status", "--json")[1])["images"] == 1509


def test_the_disk_is_full(shell, tmp_path, photos):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs a small tmpfs, which only root may mount")
    try:
        make_pictures(photos, 300, 100)
        shell.use(small / "index")
        # In a process of its own: Milvus Lite leaves its files open when a write fails.
        full = shell.start("index", photos, "--model", shell.model)
        _, error = full.communicate(timeout=120)
        assert full.returncode == 8, error
        # Whichever write meets the end first: a shard's, or the catalog's.
        assert "No space left" in error or "disk is full" in error
        grow = ["mount", "-o", "remount,size=100m", str(small)]
        subprocess.run(grow, check=True)
        assert shell("index", photos)[0] == 0
        assert shell("check")[:2] == (0, "")
        assert json.loads(shell("status", "--json")[1])["images"] == 309
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_read_only_folder(shell, tmp_path, photos):
    closed = tmp_path / "closed"
    closed.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(closed)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs a read-only mount, which only root may make")
    try:
        shell.use(closed / "index")
        code, _, error = shell("index", photos, "--model", shell.model)
        assert (code, "cannot write to the index folder" in error) == (8, True), error
    finally:
        subprocess.run(["umount", str(closed)], check=True)
