"""A picture for a query, from a file or the web."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from ..core.errors import InputError

MAX_BYTES = 64 * 1024 * 1024
_SECONDS = 20


def picture_source(name: str) -> Path | bytes:
    """Return what ``images.decode`` takes: a path, or the bytes behind an http(s) URL.

    Raises:
        InputError: there is no such file, or the URL gives nothing of a sane size.
    """
    if not name.startswith(("http://", "https://")):
        path = Path(name).expanduser()
        if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises at a name too long
            raise InputError(f"no such picture: {name}", "Give a picture file or an http(s) URL.")
        return path
    request = urllib.request.Request(name, headers={"User-Agent": "mmsearch"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"cannot fetch {name}: {reason}", "Check the address.") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is larger than {MAX_BYTES >> 20} MB", "Download and shrink it.")
    return data
