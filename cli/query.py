"""``mmsearch query``: find pictures by words, by a picture, or by both."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import InputError, StorageError, UsageError
from .hits import Format, default_format, read_queries, write_hits
from .opening import open_index
from .options import DeviceOption, IndexOption, MilvusOption, QuietOption, WaitOption
from .output import say, stderr, warn

if TYPE_CHECKING:
    from ..rerank.searcher import Hit, Query, Searcher

EXAMPLES = """
Examples:

    mmsearch query "red car"

    mmsearch query "children playing in the snow" -k 3 --explain

    mmsearch query "red car" -k 3 --explain-dir why   # why/001-beach.png: where each word looks

    mmsearch query "red car" --where "width >= 2000 and taken >= '2023-01-01'"

    mmsearch query "beach at sunset" --in ~/Pictures/2024 --min-score 0.5

    mmsearch query --image cat.jpg                    # pictures like this one

    mmsearch query "beach" --image cat.jpg --minus "people"

    mmsearch query "dog" --paths | xargs -d '\\n' cp -t dogs/

    mmsearch query --file queries.txt --jsonl > hits.jsonl

Exit codes: 0 found, 1 nothing found, 5 no or damaged index, 6 index in use by another process.
"""


def query(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What the pictures should show.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", metavar="FILE|URL", help="Look for pictures like this (repeatable)."
        ),
    ] = None,
    minus: Annotated[
        list[str] | None,
        typer.Option("--minus", metavar="TEXT", help="Steer away from this (repeatable)."),
    ] = None,
    image_weight: Annotated[
        float, typer.Option("--image-weight", min=0, help="Weight of --image beside the text.")
    ] = 1.0,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="One query a line; - reads stdin."),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", "-i", help="Keep the model loaded; answer line by line."),
    ] = False,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Hits to show.")] = 10,
    candidates: Annotated[
        int,
        typer.Option("--candidates", min=1, max=10_000, help="Pictures handed to the scorer."),
    ] = 100,
    scorer: Annotated[
        str | None,
        typer.Option(
            "--scorer",
            metavar="NAME",
            show_default="cross where a trained head fits the index",
            help="How to rerank; see `mmsearch models --scorers`.",
        ),
    ] = None,
    no_rerank: Annotated[
        bool, typer.Option("--no-rerank", help="Coarse search only (--scorer coarse).")
    ] = False,
    min_score: Annotated[
        float | None,
        typer.Option("--min-score", min=0, max=1, help="Drop hits less probable than this."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--in", metavar="FOLDER", help="Only pictures below FOLDER.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--where",
            metavar="EXPR",
            help="Only pictures with these facts: path, extension, camera, width, height, size, "
            "taken, modified, latitude, longitude; = != < <= > >= like in, and, or, not.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show coarse score, rerank score and how hits moved.")
    ] = False,
    explain_dir: Annotated[
        Path | None,
        typer.Option(
            "--explain-dir",
            metavar="OUT",
            help="Write a PNG a hit into OUT: where each word of TEXT looks, and what it is worth.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="One JSON object a hit.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV with a header.")] = False,
    paths: Annotated[bool, typer.Option("--paths", help="Absolute paths, one a line.")] = False,
    nul: Annotated[
        bool, typer.Option("--print0", "-0", help="Absolute paths, each ended by NUL.")
    ] = False,
    index: IndexOption = None,
    milvus: MilvusOption = None,
    device: DeviceOption = "auto",
    wait: WaitOption = 0.0,
    quiet: QuietOption = False,
) -> None:
    """Find pictures by words, by a picture, or by both."""
    form = _one_format(
        {
            Format.json: as_json,
            Format.jsonl: as_jsonl,
            Format.csv: as_csv,
            Format.paths: paths,
            Format.nul: nul,
        }
    )
    if no_rerank and scorer not in (None, "coarse"):
        raise UsageError("--no-rerank and --scorer contradict each other", "Give one of them.")
    texts = _texts(text, file, interactive, image)
    if explain_dir and not (text and text.strip()):
        raise UsageError("--explain-dir explains one TEXT", "Give TEXT; not --file, --interactive.")
    from ..indexing.filters import Filters
    from ..indexing.remote_image import picture_source
    from ..rerank.searcher import Query, Searcher

    pictures = tuple(picture_source(name) for name in image or [])

    below, filters = _known_folder(folder), Filters(where=where)
    filters.condition()  # a mistake in it is told now, not after the model has loaded

    def as_query(words: str) -> Query:
        return Query(words, pictures, tuple(minus or []), image_weight)

    with open_index(index, milvus, wait) as opened:
        chosen = "coarse" if no_rerank else scorer
        searcher = Searcher(opened, chosen, device, on_notice=warn)
        if explain_dir:
            searcher.require_attention()
            _make(explain_dir)

        def answer(batch: list[str]) -> list[tuple[str, list[Hit]]]:
            found = searcher.search(
                [as_query(words) for words in batch],
                k,
                candidates,
                folder=below,
                filters=filters,
                min_score=min_score,
            )
            names = [words or ", ".join(image or []) for words in batch]
            return list(zip(names, found, strict=True))

        if interactive:
            _converse(searcher, answer, form, explain)
            return
        results = answer(texts)
        write_hits(results, form, explain=explain)
        if explain_dir:
            _write_sheets(explain_dir, searcher, texts[0], results[0][1], quiet)
    if not any(hits for _, hits in results):
        say("nothing found", quiet=quiet)
        raise typer.Exit(1)


def _one_format(asked: dict[Format, bool]) -> Format:
    wanted = [form for form, yes in asked.items() if yes]
    if len(wanted) > 1:
        raise UsageError(
            "more than one output format asked for", "Give one of --json --jsonl --csv --paths -0."
        )
    return wanted[0] if wanted else default_format()


def _texts(
    text: str | None, file: Path | None, interactive: bool, image: list[str] | None
) -> list[str]:
    """Settle what is asked: one text, the lines of a file, or the lines to come."""
    given = [text is not None, file is not None, interactive]
    if sum(given) > 1:
        raise UsageError("give TEXT, --file or --interactive, one of them")
    if file is not None:
        try:
            texts = read_queries(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise InputError(f"cannot read {file}: {reason}", "Give a text file or -.") from error
        if not texts:
            raise InputError(f"no queries in {file}", "Write one query a line.")
        return texts
    if interactive:
        return []
    if text is None and not image:
        raise UsageError("nothing to look for", 'Try: mmsearch query "red car"')
    if text is not None and not text.strip() and not image:
        raise UsageError("the query is empty", 'Try: mmsearch query "red car"')
    return [text or ""]


def _known_folder(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    # Not resolve(): the index names pictures by the way they were reached, symlinks included.
    absolute = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100
    if not absolute.exists():
        raise InputError(f"no such folder: {folder}", "--in takes a folder that was indexed.")
    return absolute


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror}") from error


def _write_sheets(
    folder: Path, searcher: Searcher, text: str, hits: Sequence[Hit], quiet: bool
) -> None:
    """Write a contact sheet for each hit; one scale for all, so that they can be compared.

    Raises:
        StorageError: a sheet cannot be written.
    """
    from ..rerank.sheets import scales, write_sheet

    shown = {}
    for hit in hits:
        each = searcher.show(hit.record, text)
        if each is None:
            say(f"no sheet for {hit.record.path}: it is gone, unreadable or changed", quiet=quiet)
        else:
            shown[folder / sheet_name(hit)] = each
    scale = scales(list(shown.values())) if shown else None
    for path, each in shown.items():
        try:
            write_sheet(path, [each], text, scale)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    say(f"contact sheets written into {folder}: {len(shown)}", quiet=quiet)


def sheet_name(hit: Hit) -> str:
    """Name a hit's sheet by rank and picture: "001-beach.png", safe on any file system."""
    stem = re.sub(r"[^\w.-]+", "_", Path(hit.record.path).stem)[:50]
    return f"{hit.rank:03d}-{stem}.png"


def _converse(searcher: Searcher, answer, form: Format, explain: bool) -> None:
    """Answer lines from the terminal until it ends; one bad query does not end it."""
    from ..core.errors import MmsearchError
    from .output import report_error

    with stderr.status("loading the model"):
        searcher.load()  # now, so that answers come fast
    if sys.stdin.isatty():
        say(f"{len(searcher.index):,} pictures, scorer {searcher.scorer_name}. Ctrl-D ends.")
    for line in _lines():
        try:
            write_hits(answer([line]), form, explain=explain)
        except MmsearchError as error:
            report_error(error, debug=False)


def _lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - gives input() a history and editing keys
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line of no text is refused as a query
    while True:
        try:
            if sys.stdin.isatty():
                stderr.print("[bold cyan]query>[/] ", end="")
            line = input()
        except (EOFError, KeyboardInterrupt):
            stderr.print()
            return
        if line.strip():
            yield line.strip()
