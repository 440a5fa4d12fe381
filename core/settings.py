"""Names of the environment variables and default places on disk."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

INDEX_VARIABLE = "MMSEARCH_INDEX"
MILVUS_URI_VARIABLE = "MMSEARCH_MILVUS_URI"
MILVUS_TOKEN_VARIABLE = "MMSEARCH_MILVUS_TOKEN"


def default_index_dir() -> Path:
    """Return $MMSEARCH_INDEX, or ``index`` in the user's data folder."""
    named = os.environ.get(INDEX_VARIABLE)
    return (
        Path(named).expanduser()
        if named
        else Path(platformdirs.user_data_dir("mmsearch")) / "index"
    )


def cache_dir() -> Path:
    """Return the user's cache folder for mmsearch (not created)."""
    return Path(platformdirs.user_cache_dir("mmsearch"))
