"""``mmsearch export``: take the vectors and facts elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import StorageError, UsageError
from .opening import open_index
from .options import IndexOption, MilvusOption, QuietOption, WaitOption
from .output import say

EXAMPLES = """
Examples:

    mmsearch export --parquet pictures.parquet        # a row per picture: path, facts, vector

    mmsearch export --npy vectors.npy                 # float32; paths in vectors.npy.paths.txt

Exit codes: 0, 2 no or two formats, 5 no index, 6 index in use, 8 cannot write.
"""


def export(
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="Paths, facts and vectors.")
    ] = None,
    npy: Annotated[
        Path | None,
        typer.Option("--npy", metavar="FILE", help="Vectors; their paths go to FILE.paths.txt."),
    ] = None,
    index: IndexOption = None,
    milvus: MilvusOption = None,
    wait: WaitOption = 0.0,
    quiet: QuietOption = False,
) -> None:
    """Write the pooled vectors of all pictures, with their paths and facts, to a file."""
    if (parquet is None) == (npy is None):
        raise UsageError("name one of --parquet FILE and --npy FILE", "See mmsearch export --help.")
    with open_index(index, milvus, wait) as opened:
        try:
            if parquet is not None:
                from ..indexing.export import write_parquet

                count = write_parquet(opened, parquet)
            else:
                from ..indexing.export import write_npy

                assert npy is not None
                count = write_npy(opened, npy)
        except OSError as error:
            raise StorageError(
                f"cannot write {parquet or npy}: {error.strerror or error}",
                "Name a file in a folder that exists and can be written to.",
            ) from error
    say(f"{count:,} pictures written to {parquet or npy}", quiet=quiet)
