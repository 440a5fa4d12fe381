"""Which images a search may return, as a Milvus condition with its values kept apart from it."""

# Paths here are text: any bytes that a file system allows must come through.
# ruff: noqa: PTH100, PTH118

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import UsageError
from .catalog import prefix_range

NOT_TAKEN = -(1 << 62)  # stored where EXIF names no time; no real moment is that early
NO_PLACE = 999.0  # stored where EXIF names no place; no latitude or longitude


class Condition(NamedTuple):
    """A Milvus boolean expression with ``{name}`` where the values of ``values`` go."""

    expression: str
    values: dict[str, Any]

    def inlined(self) -> str:
        """Return the expression with the values written out, for a Milvus without templates.

        Milvus Lite and servers before 2.5 know no templates. Strings are written with the
        escapes of their grammars, so that no value can end its quotes.
        """
        return re.sub(r"\{(\w+)\}", lambda match: _literal(self.values[match[1]]), self.expression)


def _literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        for raw, name in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
            escaped = escaped.replace(raw, name)
        return f'"{escaped}"'
    return json.dumps(value)


def milvus_text(text: str) -> str:
    """Return a path in valid UTF-8, as Milvus needs it; undecodable bytes become ``\\xff``."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Filters:
    """What the user wants to see only; all that is given must hold.

    Moments are when a picture was taken, or when its file was changed where EXIF does not say.
    """

    folder: Path | None = None  # anywhere below it; or an archive.tar
    extensions: Sequence[str] = ()  # "jpg" or ".jpg"
    since: datetime | None = None
    until: datetime | None = None
    min_width: int | None = None
    min_height: int | None = None
    orientation: str | None = None  # "landscape", "portrait", "square"
    camera: str | None = None  # a part of the name, as EXIF spells it
    where: str | None = None  # an expression of its own, see indexing/where.py

    def condition(self) -> Condition | None:
        """Return the condition for Milvus, None when everything may be returned.

        Raises:
            UsageError: a value is not one of those allowed, or ``where`` cannot be read.
        """
        parts: list[str] = []
        values: dict[str, Any] = {}
        if self.folder is not None:
            parts.append(_below(self.folder, values))
        if self.extensions:
            parts.append("extension in {extensions}")
            values["extensions"] = [text.lower().lstrip(".") for text in self.extensions]
        if self.since is not None:
            parts.append(_moment(">=", "since"))
            values["since"] = _seconds(self.since)
        if self.until is not None:
            parts.append(_moment("<=", "until"))
            values["until"] = _seconds(self.until)
        for name in ("width", "height"):
            least = getattr(self, f"min_{name}")
            if least is not None:
                if abs(least) >= 2**63:  # Milvus keeps 64 bits
                    raise UsageError(f"--min-{name} {least} is beyond any picture")
                parts.append(f"{name} >= {{min_{name}}}")
                values[f"min_{name}"] = least
        if self.orientation is not None:
            parts.append(_shape(self.orientation))
        if self.camera is not None:
            parts.append("camera like {camera}")
            values["camera"] = f"%{self.camera}%"
        if self.where is not None:
            from .where import compile_where

            compiled = compile_where(self.where)
            parts.append(compiled.expression)
            values.update(compiled.values)
        if not parts:
            return None
        return Condition(" and ".join(f"({part})" for part in parts), values)


def _below(folder: Path, values: dict[str, Any]) -> str:
    """Paths with a prefix, as a range: no wildcard that a folder's name could contain."""
    path = os.path.abspath(folder)
    prefix = f"{path}!" if path.lower().endswith(".tar") else os.path.join(path, "")
    values["low"], values["high"] = map(milvus_text, prefix_range(prefix))
    return "path >= {low} and path < {high}"


def _moment(comparison: str, name: str) -> str:
    return (
        f"(taken != {NOT_TAKEN} and taken {comparison} {{{name}}}) or "
        f"(taken == {NOT_TAKEN} and modified {comparison} {{{name}}})"
    )


def _seconds(moment: datetime) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)  # as EXIF clocks are read
    return int(moment.timestamp())


def _shape(orientation: str) -> str:
    try:
        return {"landscape": "shape > 0", "portrait": "shape < 0", "square": "shape == 0"}[
            orientation
        ]
    except KeyError as error:
        raise UsageError(
            f"unknown orientation {orientation!r}", "Use landscape, portrait or square."
        ) from error
