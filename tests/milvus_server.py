"""A real Milvus server for the tests and the benchmarks, from the PyPI package ``milvus``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TOKEN = "root:Milvus"  # what a fresh server with authentication accepts
START_SECONDS = 300
START_ATTEMPTS = 4

# Ends with its parent, however that ends. Milvus's own launcher takes the next port where
# connections of a killed server still linger on this one.
_LAUNCHER = """
import milvus, os, signal, socket, threading, time
def follow(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
def bind(self, port):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        return listener
    except OSError:
        return None
milvus.MilvusServerConfig.try_bind_port = bind
milvus.main()
"""


def why_no_server() -> str:
    """Return why a server cannot be started here, or nothing."""
    if sys.platform != "linux":
        return "the package milvus ships a server for Linux only"
    if importlib.util.find_spec("milvus") is None:
        return "needs the package milvus: pip install 'milvus<2.4'"
    return ""


class MilvusServer:
    """Milvus standalone with its data in a folder, on a free port of this machine.

    Args:
        folder: where its data and logs go; a server started again there finds its collections.
        authorization: whether clients need a token (``TOKEN``).
    """

    def __init__(self, folder: Path, *, authorization: bool = False) -> None:
        self.folder = folder
        self.authorization = authorization
        self.port = _free_port()
        self._process: subprocess.Popen | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return TOKEN if self.authorization else ""

    def start(self) -> None:
        """Start it and wait until it answers; a crash on the way is met by starting again."""
        for _ in range(START_ATTEMPTS - 1):
            # Milvus 2.3 can lose a race between its own parts on a busy machine
            with contextlib.suppress(RuntimeError):
                self._start_once()
                return
        self._start_once()

    def _start_once(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-u",
            "-c",
            _LAUNCHER,
            "--data",
            str(self.folder),
        ]
        command += ["--proxy-port", str(self.port)]
        if self.authorization:
            command += ["--authorization-enabled", "true"]
        with (self.folder / "start.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            ended = self._process.poll() is not None or self._server_state() == "Z"
            if ended or time.monotonic() > deadline:
                said = (self.folder / "start.log").read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"Milvus did not start: {said}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)):
                return False
        # Only the launcher knows when all parts of the server are healthy; it says so by a banner.
        return b"Welcome to use Milvus" in (self.folder / "start.log").read_bytes()

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def memory(self) -> int:
        """Return the resident memory of the server in bytes."""
        pages = int(Path(f"/proc/{self._server()}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _server(self) -> int | None:
        """Return the server's process, which is the launcher's only child; None before."""
        assert self._process is not None
        launcher = self._process.pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return int(children[0]) if children else None

    def _server_state(self) -> str:
        """Return R, S, ... as in /proc, Z when it has crashed, nothing before it is there."""
        child = self._server()
        return Path(f"/proc/{child}/stat").read_text().rsplit(") ", 1)[1][0] if child else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
