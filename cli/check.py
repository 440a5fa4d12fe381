"""``mmsearch check``: do catalog, shards and Milvus agree?"""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.errors import BadIndex
from .opening import open_index
from .options import IndexOption, MilvusOption, QuietOption, WaitOption
from .output import print_line, progress, say

EXAMPLES = """
Examples:

    mmsearch check

    mmsearch check --repair                           # rebuilds Milvus from the shards if need be

Exit codes: 0 all is well or mended, 5 something is wrong (each finding is a line).
"""


def check(
    index: IndexOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what is wrong, without embedding anything.")
    ] = False,
    milvus: MilvusOption = None,
    wait: WaitOption = 0.0,
    quiet: QuietOption = False,
) -> None:
    """Verify that catalog, shards and Milvus agree, reading every row."""
    from ..indexing import check as checks

    with open_index(index, milvus, wait) as opened, progress(quiet=quiet) as bar:
        task = bar.add_task("checking", total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if repair:
            for line in checks.repair(opened, tell):
                print_line(line)
        findings = checks.check(opened, tell)
        count = len(opened)
    for finding in findings:
        print_line(finding.message)
    if any(not finding.harmless for finding in findings):
        raise BadIndex("the index is damaged", "Mend it: mmsearch check --repair")
    if findings:
        say("nothing is lost; the next run of `mmsearch index` completes this", quiet=quiet)
    else:
        say(f"{count:,} pictures: catalog, shards and Milvus agree", quiet=quiet)
