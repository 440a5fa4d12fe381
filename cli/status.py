"""``mmsearch status``: what an index holds and where."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .opening import index_dir
from .options import IndexOption
from .output import print_line, stdout

if TYPE_CHECKING:
    from ..core.types import Grid

EXAMPLES = """
Examples:

    mmsearch status

    mmsearch status --failed                          # what could not be read, and why

    mmsearch status --json | jq .images

It works while another process is indexing. Exit codes: 0, 5 no or damaged index.
"""


def status(
    index: IndexOption = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="List the files that are not searchable, with reasons.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an index holds, its model and where things are."""
    from ..indexing.index import read_stats

    stats, failures = read_stats(index_dir(index))
    manifest = stats.manifest
    milvus = manifest.milvus_uri or f"Milvus Lite in {stats.path}"
    if as_json:
        facts = {
            "index": str(stats.path),
            "images": stats.images,
            "contents": stats.contents,
            "failed": stats.failed,
            "picture_bytes": stats.picture_bytes,
            "index_bytes": stats.index_bytes,
            "unfinished": stats.unfinished,
            "model": manifest.encoder.model,
            "pretrained": manifest.encoder.pretrained,
            "grid": list(manifest.grid),
            "tiles": list(manifest.encoder.tiles),
            "patch_codes": manifest.patch_codes,
            "patch_pool": manifest.patch_pool,
            "milvus": manifest.milvus_uri,
            "collection": manifest.collection,
        }
        if failed:
            facts["failures"] = [dataclasses.asdict(failure) for failure in failures]
        print_line(json.dumps(facts, indent=2))
        return
    if failed:
        for failure in failures:
            print_line(f"{failure.path}\t{failure.reason}")
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "index": str(stats.path),
        "pictures": f"{stats.images:,}"
        + (f" ({stats.contents:,} distinct)" if stats.contents != stats.images else "")
        + f", {_size(stats.picture_bytes)}",
        "failed": f"{stats.failed:,}" + (" (list them with --failed)" if stats.failed else ""),
        "model": manifest.encoder.display_name,
        "features": f"{manifest.encoder.embed_dim}-d; patches {manifest.grid.height} x "
        f"{manifest.grid.width} x {manifest.encoder.patch_dim}{_tiling(manifest.encoder.tiles)}, "
        f"{manifest.patch_codes}{_pooling(manifest.patch_pool)}",
        "vectors": f"{milvus}, {manifest.index_type}",
        "on disk": _size(stats.index_bytes),
    }
    if stats.unfinished:
        rows["state"] = "a run is going on, or was cut off; `mmsearch index` completes it"
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    stdout.print(table, soft_wrap=True)


def _tiling(tiles: Grid) -> str:
    return "" if tiles.size == 1 else f" from {tiles} tiles"


def _pooling(pool: str) -> str:
    return "" if pool == "1" else f", pooled by {pool}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
