"""Options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core import settings

IndexOption = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIR",
        envvar=settings.INDEX_VARIABLE,
        show_default="user data folder",
        help="The index folder.",
    ),
]
MilvusOption = Annotated[
    str | None,
    typer.Option(
        "--milvus",
        metavar="URI",
        envvar=settings.MILVUS_URI_VARIABLE,
        show_default="Milvus Lite in the index folder",
        help="Milvus server or Zilliz Cloud; its token comes from $MMSEARCH_MILVUS_TOKEN.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait",
        metavar="SECONDS",
        min=0,
        help="Wait this long for another mmsearch process to let go of the index.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say more about what is done.")
]
