"""A small language for ``--where``, compiled to a Milvus condition.

    width >= 2000 and taken >= '2023-01-01' and path like '%/trips/%'
    (camera like '%iPhone%' or extension in ['heic', 'jpg']) and not size < 100kb

Only the fields below, comparisons, ``like``, ``in``, ``and``, ``or``, ``not`` and parentheses
exist, and values travel beside the expression: nothing a user writes becomes Milvus syntax.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from typing import Any, NamedTuple

from ..core.errors import UsageError
from .filters import NO_PLACE, NOT_TAKEN, Condition

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<number>-?\d+(?:\.\d+)?(?:[kmg]i?b|b)?\b)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<sign><=|>=|==|!=|=|<|>|\(|\)|\[|\]|,))""",
    re.VERBOSE | re.IGNORECASE,
)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}
_DEEPEST = 50  # parentheses and nots within one another
_COMPARISONS = {"=": "==", "==": "==", "!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


class _Token(NamedTuple):
    kind: str  # "text", "number", "word", "sign" or "end"
    text: str
    start: int


def _moment(token: _Token) -> int:
    if token.kind != "text":
        raise ValueError("is no date; write '2023-01-31' or '2023-01-31 18:00' in quotes")
    text = _unquote(token.text)
    if re.fullmatch(r"\d{4}", text):
        text += "-01-01"
    elif re.fullmatch(r"\d{4}-\d{2}", text):
        text += "-01"
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("is no date; write '2023-01-31' or '2023-01-31 18:00'") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return int(moment.timestamp())


def _count(token: _Token) -> int:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([a-z]*)", token.text.lower())
    if token.kind != "number" or match is None:
        raise ValueError("is no number")
    number = float(match[1]) * _UNITS[match[2]]
    if abs(number) >= 2**63:
        raise ValueError("is beyond any number of pixels or bytes")
    return round(number)


def _degrees(token: _Token) -> float:
    if token.kind != "number":
        raise ValueError("is no number")
    try:
        degrees = float(token.text)
    except ValueError:
        degrees = math.inf
    if not math.isfinite(degrees):
        raise ValueError("is no number of degrees")
    return degrees


def _words(token: _Token) -> str:
    if token.kind != "text":
        raise ValueError("is no text; put it in quotes")
    return _unquote(token.text)


def _extension(token: _Token) -> str:
    return _words(token).lower().lstrip(".")


class _Field(NamedTuple):
    read: Callable[[_Token], Any]
    absent: float | int | None = None  # what is stored where a picture does not say


FIELDS: dict[str, _Field] = {
    "path": _Field(_words),
    "extension": _Field(_extension),
    "camera": _Field(_words),
    "width": _Field(_count),
    "height": _Field(_count),
    "size": _Field(_count),
    "taken": _Field(_moment, NOT_TAKEN),
    "modified": _Field(_moment),
    "latitude": _Field(_degrees, NO_PLACE),
    "longitude": _Field(_degrees, NO_PLACE),
}


def compile_where(text: str) -> Condition:
    """Compile an expression.

    Raises:
        UsageError: it cannot be read; the message shows the word at fault.
    """
    return _Compiler(text).compile()


class _Compiler:
    """Recursive descent over or, and, not, comparisons."""

    def __init__(self, text: str) -> None:
        self._source = text
        self._tokens = self._split(text)
        self._at = 0
        self._depth = 0
        self._values: dict[str, Any] = {}

    def compile(self) -> Condition:
        expression = self._either()
        if self._next.kind != "end":
            raise self._wrong(self._next, "is one word too many; join conditions by and, or")
        return Condition(expression, self._values)

    def _split(self, text: str) -> list[_Token]:
        tokens = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise self._wrong(_Token("sign", text[at], at), "means nothing here")
            kind = match.lastgroup or ""
            tokens.append(_Token(kind, match[kind], match.start(kind)))
            at = match.end()
        return [*tokens, _Token("end", "", len(text))]

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        token = self._next
        self._at += token.kind != "end"
        return token

    def _takes(self, *words: str) -> bool:
        found = self._next.kind != "text" and self._next.text.lower() in words
        self._at += found
        return found

    def _expect(self, sign: str) -> None:
        if not self._takes(sign):
            raise self._wrong(self._next, f"stands where {sign} should")

    def _either(self) -> str:
        parts = [self._both()]
        while self._takes("or"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else f"({' or '.join(parts)})"

    def _both(self) -> str:
        parts = [self._one()]
        while self._takes("and"):
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else f"({' and '.join(parts)})"

    def _one(self) -> str:
        opening = self._next
        if not self._takes("not", "("):
            return self._comparison()
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._wrong(opening, f"is nested more than {_DEEPEST} deep")
        if opening.text == "(":
            inside = self._either()
            self._expect(")")
        else:
            inside = f"(not {self._one()})"
        self._depth -= 1
        return inside

    def _comparison(self) -> str:
        name = self._take()
        field = FIELDS.get(name.text.lower()) if name.kind == "word" else None
        if field is None:
            raise self._wrong(name, f"is no field{_nearest(name.text)}")
        left = name.text.lower()
        if self._takes("like"):
            token = self._next
            if field.read is not _words:
                raise self._wrong(name, "is no text, so it cannot be compared by like")
            return f"({left} like {self._value(token, field)})"
        if self._takes("in"):
            self._expect("[")
            values = [self._read(self._take(), field)]
            while self._takes(","):
                values.append(self._read(self._take(), field))
            self._expect("]")
            return f"({left} in {self._keep(values)})"
        sign = self._take()
        comparison = _COMPARISONS.get(sign.text)
        if comparison is None:
            raise self._wrong(sign, "stands where a comparison should: = != < <= > >= like in")
        day = self._day(field, comparison)
        right = day or f"{left} {comparison} {self._value(self._next, field)}"
        if field.absent is not None:
            right = f"{left} != {field.absent} and {right}"
        return f"({right})"

    def _day(self, field: _Field, comparison: str) -> str | None:
        """``taken = '2023-01-31'`` and ``<= '2023-01-31'`` mean the whole of that day."""
        token = self._next
        if field.read is not _moment or comparison not in ("==", "<=", ">"):
            return None
        name = self._tokens[self._at - 2].text.lower()
        try:
            date.fromisoformat(_unquote(token.text))
        except ValueError:
            return None
        start = self._read(self._take(), field)
        end = start + int(timedelta(days=1).total_seconds())
        if comparison == "==":
            return f"{name} >= {self._keep(start)} and {name} < {self._keep(end)}"
        return f"{name} {'<' if comparison == '<=' else '>='} {self._keep(end)}"

    def _value(self, token: _Token, field: _Field) -> str:
        self._take()
        return self._keep(self._read(token, field))

    def _read(self, token: _Token, field: _Field) -> Any:
        try:
            return field.read(token)
        except ValueError as error:
            raise self._wrong(token, str(error)) from error

    def _keep(self, value: Any) -> str:
        name = f"w{len(self._values)}"
        self._values[name] = value
        return f"{{{name}}}"

    def _wrong(self, token: _Token, what: str) -> UsageError:
        word = token.text or "the end"
        pointer = " " * token.start + "^" * max(1, len(token.text))
        return UsageError(
            f"--where: {word} {what}\n    {self._source}\n    {pointer}",
            "For instance: width >= 2000 and taken >= '2023-01-01' and path like '%/trips/%'",
        )


def _nearest(word: str) -> str:
    close = difflib.get_close_matches(word.lower(), FIELDS, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(FIELDS)}"


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1])
