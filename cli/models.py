"""``mmsearch models``: which models and scorers there are, and how good they are known to be."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .options import IndexOption
from .output import print_line, say, stdout

EXAMPLES = """
Examples:

    mmsearch models                 # models worth choosing, with published recall

    mmsearch models --all           # every name and tag that open_clip knows

    mmsearch models --scorers       # how candidates can be reranked
"""


def models(
    scorers: Annotated[
        bool, typer.Option("--scorers", help="List the scorers of the second stage instead.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="List every model and tag that open_clip knows.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    index: IndexOption = None,
) -> None:
    """List what --model and --scorer can be."""
    if scorers:
        _list_scorers(index, as_json)
    elif everything:
        _list_everything(as_json)
    else:
        _list_models(as_json)


def _list_models(as_json: bool) -> None:
    from ..indexing import models as known

    rows: list[dict[str, Any]] = [
        asdict(known.bundled_model()) | {"cached": True},
        *(
            asdict(each) | {"cached": known.is_cached(each.model, each.pretrained)}
            for each in known.PUBLISHED
        ),
    ]
    if as_json:
        print_line(json.dumps(rows, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "pretrained"):
        table.add_column(name, no_wrap=True)
    for name in ("MB", "F30k R@1", "COCO R@5"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("here", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            row["pretrained"] or "",
            str(row["megabytes"]),
            _figure(row["flickr30k_r1"]),
            _figure(row["coco_r5"]),
            "[green]yes[/]" if row["cached"] else "",
        )
    stdout.print(table)
    say(f"Zero-shot text-to-image recall in per cent, as published: {known.PUBLISHED[0].source}")
    say(f"bundled: {known.bundled_model().source}")
    say(
        "Any other open_clip model works too: mmsearch models --all, hf-hub:ORG/NAME, local-dir:DIR"
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _list_everything(as_json: bool) -> None:
    from ..indexing.models import every_pretrained

    pairs = every_pretrained()
    if as_json:
        print_line(json.dumps([{"model": m, "pretrained": tag} for m, tag in pairs], indent=2))
        return
    for model, tag in pairs:
        print_line(f"{model}\t{tag}")


def _list_scorers(index, as_json: bool) -> None:
    from ..rerank.scorers import list_scorers
    from ..rerank.sparse import SELECTIONS
    from .opening import index_dir

    heads = index_dir(index) / "heads"
    rows = [asdict(info) for info in list_scorers(folder=heads if heads.is_dir() else None)]
    if as_json:
        print_line(json.dumps(rows, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("scorer", no_wrap=True)
    table.add_column("needs", overflow="fold")
    table.add_column("measured on validation")
    for row in rows:
        figures = ", ".join(f"{name} {value:.1f}" for name, value in row["figures"].items())
        table.add_row(row["name"], escape(row["needs"]), figures)
    stdout.print(table)
    ways = " or ".join(f"NAME:{each}" for each in SELECTIONS)
    say(f"A cross head reads a part of the patches as {ways}, which pays where they are hundreds.")
