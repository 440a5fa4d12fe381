"""What a picture says about itself."""

from __future__ import annotations

from typing import NamedTuple


class Facts(NamedTuple):
    """Size after EXIF orientation, and what EXIF tells where it does."""

    width: int  # pixels
    height: int
    taken: int | None = None  # seconds since 1970; a clock without a zone is taken as UTC
    latitude: float | None = None  # degrees, north positive
    longitude: float | None = None  # degrees, east positive
    camera: str = ""
