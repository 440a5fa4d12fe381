"""Runs and relevance judgements in the TREC formats, for ``trec_eval`` and its kin.

    qrels   query 0 document grade
    run     query Q0 document rank score tag

Names are percent-encoded where they hold white space, which separates the columns. Scores are
written so that reading them back as 32-bit floats, as ``trec_eval`` does, gives the very order
they were ranked in: a score that ties with the one before it is lowered by the least amount.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO
from urllib.parse import quote, unquote

import numpy as np

from ..core.errors import InputError

_KEPT = "".join(chr(code) for code in range(33, 127) if chr(code) != "%")


def encode_name(name: str) -> str:
    """Return `name` without white space or controls; readable ASCII names stay as they are."""
    return quote(name, safe=_KEPT)


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Read relevance judgements: query -> document -> grade.

    Raises:
        InputError: it cannot be read, a line has not four columns, or its grade is not an integer.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}", "give --qrels a TREC file") from error
    judgements: dict[str, dict[str, int]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        columns = line.split()
        if not columns:
            continue
        try:
            query, _, document, grade = columns
            judgements.setdefault(unquote(query), {})[unquote(document)] = int(grade)
        except ValueError:
            raise InputError(
                f"{path}, line {number}: not a qrels line: {line.strip()[:80]!r}",
                "a line reads: query 0 document grade",
            ) from None
    if not judgements:
        raise InputError(f"{path} holds no judgements", "a line reads: query 0 document grade")
    return judgements


def write_qrels(file: TextIO, judgements: Iterable[tuple[str, str, int]]) -> None:
    """Write (query, document, grade) triples."""
    for query, document, grade in judgements:
        file.write(f"{encode_name(query)} 0 {encode_name(document)} {grade}\n")


def write_run(
    file: TextIO,
    queries: Sequence[str],
    documents: Sequence[str],
    order: np.ndarray,
    scores: np.ndarray,
    tag: str,
) -> None:
    """Write ranked lists.

    Args:
        file: where to.
        queries: Q names.
        documents: names; `order` points into them.
        order: (Q, N) documents, best first.
        scores: (Q, N) their scores, not increasing along a row.
        tag: the run's name, the last column.
    """
    names = [encode_name(name) for name in documents]
    for query, row, strict in zip(queries, order, strictly_decreasing(scores), strict=True):
        name = encode_name(query)
        for rank, (document, score) in enumerate(zip(row, strict, strict=True), start=1):
            file.write(f"{name} Q0 {names[document]} {rank} {score:.9g} {tag}\n")


def strictly_decreasing(scores: np.ndarray) -> np.ndarray:
    """Lower each score just below the one before it where it is not so already, (Q, N) float32."""
    strict = scores.astype(np.float32, copy=True)
    for column in range(1, strict.shape[1]):
        below = np.nextafter(strict[:, column - 1], np.float32(-np.inf))
        np.minimum(strict[:, column], below, out=strict[:, column])
    return strict
