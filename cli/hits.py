"""Hits as a table, JSON, JSON lines, CSV, paths or plain columns."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from .output import print_line, stdout

if TYPE_CHECKING:
    from ..rerank.searcher import Hit

Results = Iterable[tuple[str, list["Hit"]]]  # (query as the user gave it, its hits)


class Format(str, Enum):
    """How hits are written."""

    table = "table"
    plain = "plain"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    paths = "paths"
    nul = "nul"


def write_hits(results: Results, form: Format, *, explain: bool) -> None:
    """Write the hits of each query to stdout.

    Args:
        results: pairs of a query and its hits; written as they come, except for JSON.
        form: how.
        explain: also show each hit's coarse score, coarse place and rerank score.
    """
    writers: dict[Format, Callable[[Results, bool], None]] = {
        Format.table: _write_tables,
        Format.plain: _write_plain,
        Format.json: _write_json,
        Format.jsonl: _write_jsonl,
        Format.csv: _write_csv,
        Format.paths: lambda results, _: _write_paths(results, b"\n"),
        Format.nul: lambda results, _: _write_paths(results, b"\0"),
    }
    writers[form](results, explain)
    sys.stdout.flush()


def relative_path(path: str) -> str:
    """Shorten a path to how it looks from here, when that is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive on Windows
        return path
    return relative if len(relative) < len(path) else path


def readable_size(size: int) -> str:
    """Format bytes as a person reads them."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 10 else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")


def _date(hit: Hit) -> datetime:
    return datetime.fromtimestamp(hit.record.mtime_ns / 1e9).astimezone()


def _score(hit: Hit) -> str:
    """The match probability in per cent, or the raw score where there is none."""
    return f"{hit.score:.3f}" if hit.probability is None else f"{hit.probability:.0%}"


def _write_tables(results: Results, explain: bool) -> None:
    several = False
    for query, hits in results:
        if several:
            stdout.print()
        several = True
        if not hits:
            stdout.print(f"[bold]{escape(query)}[/]: nothing found")
            continue
        table = Table(
            box=box.SIMPLE_HEAD, title=escape(query), title_justify="left", pad_edge=False
        )
        table.add_column("#", justify="right", style="dim")
        has_match = hits[0].probability is not None
        table.add_column("match" if has_match else "score", justify="right", style="bold green")
        table.add_column("picture", overflow="fold")
        table.add_column("size", justify="right", style="dim")
        table.add_column("date", style="dim", no_wrap=True)
        if explain:
            table.add_column("coarse", justify="right", style="cyan")
            table.add_column("coarse #", justify="right", style="cyan")
            table.add_column("rerank", justify="right", style="magenta")
            table.add_column("moved", justify="right", style="magenta")
        for hit in hits:
            shown = relative_path(hit.record.path).encode("utf-8", "surrogateescape")
            cells = [
                str(hit.rank),
                _score(hit),
                escape(shown.decode("utf-8", "replace")),
                readable_size(hit.record.size),
                f"{_date(hit):%Y-%m-%d}",
            ]
            if explain:
                moved = hit.coarse_rank - hit.rank
                cells += [
                    f"{hit.coarse_score:.3f}",
                    str(hit.coarse_rank),
                    f"{hit.score:.3f}",
                    f"{moved:+d}" if moved else "=",
                ]
            table.add_row(*cells)
        stdout.print(table)


def _write_plain(results: Results, explain: bool) -> None:
    for query, hits in results:
        for hit in hits:
            cells = [query, str(hit.rank), f"{_plain_score(hit):.4f}"]
            if explain:
                cells += [f"{hit.coarse_score:.4f}", str(hit.coarse_rank), f"{hit.score:.4f}"]
            print_line("\t".join([*cells, relative_path(hit.record.path)]))


def _plain_score(hit: Hit) -> float:
    return hit.score if hit.probability is None else hit.probability


def _fields(query: str, hit: Hit) -> dict[str, Any]:
    return {
        "query": query,
        "rank": hit.rank,
        "path": hit.record.path,
        "probability": None if hit.probability is None else round(hit.probability, 6),
        "score": round(hit.score, 6),
        "coarse_score": round(hit.coarse_score, 6),
        "coarse_rank": hit.coarse_rank,
        "size": hit.record.size,
        "modified": _date(hit).isoformat(timespec="seconds"),
        "width": hit.record.width,
        "height": hit.record.height,
    }


def _write_json(results: Results, explain: bool) -> None:
    whole = [
        {
            "query": query,
            "hits": [
                {name: value for name, value in _fields(query, hit).items() if name != "query"}
                for hit in hits
            ],
        }
        for query, hits in results
    ]
    print_line(_dump(whole, indent=2))


def _write_jsonl(results: Results, explain: bool) -> None:
    for query, hits in results:
        for hit in hits:
            print_line(_dump(_fields(query, hit)))


def _dump(value: Any, indent: int | None = None) -> str:
    # Names that are not UTF-8 hold lone surrogates: those must be escaped to be valid JSON.
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    return text


def _write_csv(results: Results, explain: bool) -> None:
    names: list[str] | None = None
    out = csv.writer(_SurrogateWriter())
    for query, hits in results:
        for hit in hits:
            fields = _fields(query, hit)
            if names is None:
                names = list(fields)
                out.writerow(names)
            out.writerow(["" if value is None else value for value in fields.values()])


class _SurrogateWriter:
    """Lets the csv module write names that are not valid UTF-8 byte for byte."""

    def write(self, text: str) -> int:
        return sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))


def _write_paths(results: Results, end: bytes) -> None:
    for _, hits in results:
        for hit in hits:
            sys.stdout.buffer.write(os.fsencode(hit.record.path) + end)


def default_format() -> Format:
    """A table for a person, plain columns for a pipe."""
    return Format.table if stdout.is_terminal else Format.plain


def read_queries(file: Path) -> list[str]:
    """Read one query a line; empty lines and lines that begin with ``#`` are passed over."""
    text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
