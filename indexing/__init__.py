"""From image files to a searchable index: scan, decode, encode, store, coarse search."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .encoder import load_encoder as load_encoder
    from .filters import Filters as Filters
    from .index import ImageIndex as ImageIndex

_PLACES = {"ImageIndex": ".index", "Filters": ".filters", "load_encoder": ".encoder"}
__all__ = ["Filters", "ImageIndex", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Load what is asked for, when it is asked for: torch and Milvus take seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name], __name__), name)
