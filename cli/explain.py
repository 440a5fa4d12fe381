"""``mmsearch explain``: where each word of a query looks in a picture, and what that was worth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..core.errors import StorageError, UsageError
from .opening import index_dir
from .options import DeviceOption, IndexOption, QuietOption
from .output import say, stdout

if TYPE_CHECKING:
    import numpy as np

    from ..rerank.sheets import Shown
    from ..rerank.viewing import Viewer

EXAMPLES = """
Examples:

    mmsearch explain beach.jpg "red car on a beach"

    mmsearch explain beach.jpg "red car on a beach" --png sheet.png --html page.html

    mmsearch explain first.jpg "two dogs" --compare second.jpg    # why one ranks above the other
"""


def explain(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture to look into.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The query.")],
    compare: Annotated[
        Path | None,
        typer.Option("--compare", metavar="IMAGE", help="Another picture, on the same scale."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write a contact sheet.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page to hover over.")
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            "--scorer",
            metavar="NAME",
            show_default="the head that fits, else late",
            help="Which scorer to look into.",
        ),
    ] = None,
    index: IndexOption = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Show where each word of a query looks in a picture, and which patches raised the score.

    The picture need not be in the index; the index (if there is one) says which model to use and
    how it keeps patches, so that the score is that of a query.
    """
    if not text.strip():
        raise UsageError("the query is empty", "Give some words.")
    from ..rerank import sheets

    viewer = open_viewer(index, scorer, device)
    shown = [viewer.show(path, text) for path in ([image, compare] if compare else [image])]
    attention, _ = sheets.scales(shown)
    for each in shown:
        _print_maps(each, attention)
    if compare:
        _print_comparison(shown[0], shown[1])
    if png:
        with writing(png, quiet=quiet):
            sheets.write_sheet(png, shown, text)
    if html:
        with writing(html, quiet=quiet):
            html.write_text(sheets.html_page(shown, text), encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path, *, quiet: bool) -> Iterator[None]:
    """Say that a file was written.

    Raises:
        StorageError: it cannot be.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    say(f"wrote {path}", quiet=quiet)


def open_viewer(index: Path | None, scorer: str | None, device: str) -> Viewer:
    """Load the index's model, or the bundled one where there is no index."""
    from ..indexing.encoder import encoder_for, load_encoder
    from ..indexing.manifest import Manifest
    from ..rerank.viewing import Viewer

    folder = index_dir(index)
    if index is None and not (folder / "manifest.json").exists():
        return Viewer(load_encoder("bundled", device=device), scorer)
    manifest = Manifest.read(folder)
    encoder = encoder_for(manifest.encoder, device)
    return Viewer(encoder, scorer, folder / "heads", manifest.row_format)


def _print_maps(shown: Shown, attention: float) -> None:
    """A terminal's view: one small map a word, with its weight and its share of the score."""
    explanation = shown.explanation
    match = explanation.probability
    verdict = "" if match is None else f", match {match:.0%}"
    stdout.print(
        f"[bold]{escape(shown.name)}[/]  score {explanation.score:.3f}, "
        f"cosine {explanation.cosine:.3f}{verdict}"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("word", "weight", "adds", "where it looks"):
        table.add_column(heading, justify="right" if heading in ("weight", "adds") else "left")
    cells = explanation.whole.size
    shares = explanation.word_shares
    for at, word in enumerate(explanation.words):
        added = "" if shares is None else f"{shares[at]:+.3f}"
        picture = (
            heat_text(explanation.maps[at] * cells / attention)
            if stdout.is_terminal
            else _name_peak(explanation.maps[at])
        )
        table.add_row(escape(word), f"{explanation.word_weights[at]:.0%}", added, picture)
    stdout.print(table)
    row, column = divmod(int(explanation.contributions.argmax()), explanation.whole.shape[1])
    low = divmod(int(explanation.contributions.argmin()), explanation.whole.shape[1])
    stdout.print(
        f"most raised by the patch in row {row + 1}, column {column + 1} "
        f"({explanation.contributions.max():+.3f}), most lowered by row {low[0] + 1}, "
        f"column {low[1] + 1} ({explanation.contributions.min():+.3f}); "
        f"found by {explanation.method}"
    )


def _name_peak(cells: np.ndarray) -> str:
    """Say in words where a map (h, w) is highest, for output that has no colours."""
    row, column = divmod(int(cells.argmax()), cells.shape[1])
    return f"row {row + 1}, column {column + 1} ({cells.max() * cells.size:.1f} x even)"


def heat_text(strength: np.ndarray) -> Text:
    """Draw a map of 0 to 1 with half blocks, two rows of patches in one line of text."""
    from ..rerank.sheets import heat

    colours = heat(strength)  # (h, w, 3)
    lines = []
    for top in range(0, len(colours), 2):
        out = Text()
        for column in range(colours.shape[1]):
            upper = "#{:02x}{:02x}{:02x}".format(*colours[top, column])
            below = colours[top + 1, column] if top + 1 < len(colours) else None
            lower = "" if below is None else " on #{:02x}{:02x}{:02x}".format(*below)
            out.append("▀", style=upper + lower)
        lines.append(out)
    return Text("\n").join([*lines, Text()])


def _print_comparison(first: Shown, second: Shown) -> None:
    """Say which words and which stage put one picture above the other."""
    a, b = first.explanation, second.explanation
    ahead, behind = (first, second) if a.score >= b.score else (second, first)
    stdout.print(
        f"[bold]{escape(ahead.name)}[/] is ahead of {escape(behind.name)} by "
        f"{ahead.explanation.score - behind.explanation.score:.3f}"
    )
    if a.word_shares is None or b.word_shares is None:
        return
    sign = 1 if ahead is first else -1
    words = sign * (a.word_shares - b.word_shares)  # (words,)
    terms = [(sign * (a.terms[name] - b.terms[name]), f"({name})") for name in a.terms]
    parts = [*zip(words.tolist(), a.words, strict=True), *(each for each in terms if each[0])]
    for value, word in sorted(parts, key=lambda part: -abs(part[0])):
        stdout.print(f"  {value:+.3f}  {escape(word)}")
