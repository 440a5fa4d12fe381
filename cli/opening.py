"""How commands get at an index: one place for defaults, environment and the Milvus token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import settings

if TYPE_CHECKING:
    from ..indexing.index import ImageIndex


def index_dir(index: Path | None) -> Path:
    """Return the index folder meant by ``--index``."""
    return index.expanduser() if index else settings.default_index_dir()


def milvus_token() -> str | None:
    """Return the Milvus token; it never comes from the command line, where others could read it."""
    return os.environ.get(settings.MILVUS_TOKEN_VARIABLE) or None


def open_index(index: Path | None, milvus: str | None = None, wait: float = 0.0) -> ImageIndex:
    """Open an existing index.

    Raises:
        BadIndex: there is none, or it is damaged.
        IndexBusy: another process holds it and did not let go within ``wait`` seconds.
    """
    from ..indexing.index import ImageIndex

    return ImageIndex.open(
        index_dir(index), milvus_uri=milvus, milvus_token=milvus_token(), wait=wait
    )
