"""``mmsearch migrate``: move an index between Milvus Lite and a Milvus server."""

from __future__ import annotations

from typing import Annotated

import typer

from .opening import milvus_token, open_index
from .options import IndexOption, QuietOption, WaitOption
from .output import print_line, progress, say, warn

EXAMPLES = """
Examples:

    mmsearch migrate --to http://milvus:19530         # from Milvus Lite to a server

    mmsearch migrate --to https://in01-xyz.zillizcloud.com        # Zilliz Cloud

    mmsearch migrate --to lite                        # and back into the index folder

    mmsearch migrate --to http://milvus:19530 --index-type IVF_SQ8 --index-params '{"nlist": 4096}'

The token of the server comes from $MMSEARCH_MILVUS_TOKEN: user:password, or an API key. No picture
is read: the vectors come from the shards. A move that was cut off goes on with the same command;
until it is complete the index works as before.

Exit codes: 0 moved, 2 wrong command line, 5 damaged index, 6 index in use, 8 Milvus not reached.
"""


def migrate(
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="URI",
            help="Milvus server or Zilliz Cloud; lite for Milvus Lite in the index folder.",
            show_default=False,
        ),
    ],
    index: IndexOption = None,
    index_type: Annotated[
        str | None,
        typer.Option(
            "--index-type", show_default="as it is", help="HNSW, IVF_SQ8, DISKANN, FLAT, ..."
        ),
    ] = None,
    index_params: Annotated[
        str | None,
        typer.Option("--index-params", metavar="JSON", help="""As '{"M": 32}'."""),
    ] = None,
    partition_by: Annotated[
        str | None,
        typer.Option("--partition-by", show_default="as it is", help="folder or none."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the vectors in the old place, too.")
    ] = False,
    wait: WaitOption = 0.0,
    quiet: QuietOption = False,
) -> None:
    """Move an index's vectors to another Milvus without embedding a picture again."""
    from ..indexing import migrate as moving
    from .index import read_index_params, read_partition_by

    params = read_index_params(index_params)
    parted = None if partition_by is None else read_partition_by(partition_by)
    with open_index(index, None, wait) as opened, progress(quiet=quiet) as bar:
        task = bar.add_task("moving vectors", total=None)
        moved = moving.migrate(
            opened,
            to,
            token=milvus_token(),
            index_type=index_type,
            index_params=params,
            partition_by=parted,
            keep=keep,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if moved.left_behind:
        warn(f"the old vectors are still there: {moved.left_behind}")
    print_line(f"{moved.images:,} vectors are at {to} now, {moved.written:,} written by this run")
    say("nothing was embedded again", quiet=quiet)
