"""From candidates to an order: scorers, attention, training, attention maps.

``load_scorer`` loads on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scorers import load_scorer as load_scorer

__all__ = ["load_scorer"]


def __getattr__(name: str) -> Any:
    if name == "load_scorer":
        from .scorers import load_scorer

        return load_scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
