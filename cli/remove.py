"""``mmsearch remove``: take pictures out of the index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .opening import open_index
from .options import IndexOption, MilvusOption, QuietOption, WaitOption
from .output import print_line

EXAMPLES = """
Examples:

    mmsearch remove ~/Pictures/private

    mmsearch remove ~/Pictures/cat.jpg shards/00.tar

The files themselves are not touched. To keep a folder out for good, name it in .mmsearchignore:
the next run of `mmsearch index` would find it again.

Exit codes: 0, 4 nothing of the index lies there, 5 no index, 6 index in use.
"""


def remove(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Pictures, folders, .tar archives.")
    ],
    index: IndexOption = None,
    milvus: MilvusOption = None,
    wait: WaitOption = 0.0,
    quiet: QuietOption = False,
) -> None:
    """Take pictures out of the index; the files stay."""
    with open_index(index, milvus, wait) as opened:
        count = opened.remove(paths)
    if not quiet:
        print_line(f"{count:,} removed from the index")
