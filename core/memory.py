"""What the C library keeps of freed memory, given back."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give what was freed back to the system, where the C library would keep it (glibc).

    A model's weights are hundreds of megabytes, and so is what Milvus Lite leaves behind a flush;
    each has an allocator of its own and cannot use what the other freed.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none and needs none
        if trim is not None:
            trim(0)
