"""Errors a user can act on. Each names what happened and the way out; the CLI prints both.

Exit codes are part of the interface (see README, "Exit codes"):

    0    success
    1    the query ran and found nothing (as grep does)
    2    the command line is wrong
    3    an evaluation gate failed
    4    the input (pictures, captions, paths) cannot be used
    5    the index is missing, damaged or made with something else
    6    another process holds the index
    7    the model or scorer cannot be used
    8    the storage failed: disk full, read-only folder, Milvus unreachable
    70   a defect in mmsearch itself
    130  interrupted
"""

from __future__ import annotations


class MmsearchError(Exception):
    """Base of all errors that are the situation's fault rather than a defect.

    Args:
        message: what happened, naming the file or value at fault.
        hint: the way out, one sentence or command.
    """

    exit_code = 70

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MmsearchError):
    """A value on the command line or in a setting that cannot be used."""

    exit_code = 2


class GateFailed(MmsearchError):
    """An evaluation fell below its baseline."""

    exit_code = 3


class InputError(MmsearchError):
    """Pictures, captions or paths that cannot be used."""

    exit_code = 4


class BadIndex(MmsearchError):
    """The index is missing, damaged, newer than this program or made with another model."""

    exit_code = 5


class IndexBusy(MmsearchError):
    """Another process holds the index."""

    exit_code = 6


class ModelError(MmsearchError):
    """A model or scorer is unknown, cannot be loaded or does not fit the index."""

    exit_code = 7


class StorageError(MmsearchError):
    """Disk full, read-only folder, Milvus unreachable."""

    exit_code = 8
