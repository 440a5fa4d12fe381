"""From candidates to an order: scorers, attention, training, attention maps."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scorers import load_scorer as load_scorer
    from .searcher import Hit as Hit
    from .searcher import Query as Query
    from .searcher import Searcher as Searcher

_PLACES = {
    "Hit": ".searcher",
    "Query": ".searcher",
    "Searcher": ".searcher",
    "load_scorer": ".scorers",
}
__all__ = ["Hit", "Query", "Searcher", "load_scorer"]


def __getattr__(name: str) -> Any:
    """Load what is asked for, when it is asked for: torch takes a second or more."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name], __name__), name)
