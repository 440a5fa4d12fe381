"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one move, so that nobody reads half of it; its mode follows the umask."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, in one move.

    Not by its ``save_file``: that leaves a file which only its owner may read; teams share indexes.
    """
    from safetensors.torch import save

    write_whole(path, save({name: each.contiguous() for name, each in tensors.items()}))
