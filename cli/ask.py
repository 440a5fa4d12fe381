"""``mmsearch ask``: answer a question about a picture from given choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..core.errors import UsageError
from .explain import open_viewer, writing
from .options import DeviceOption, IndexOption, QuietOption
from .output import print_line, say, stdout

EXAMPLES = """
Examples:

    mmsearch ask street.jpg "what color is the car?" --choices red,blue,white

    mmsearch ask park.jpg "what is the dog doing?" --choices running,sleeping --png where.png

Each choice fills in a caption ("red car"); the captions compete for the picture.
"""


def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In English.")],
    choices: Annotated[
        str, typer.Option("--choices", metavar="A,B,C", help="Possible answers, by commas.")
    ],
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Show where the answer looked.")
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option("--scorer", metavar="NAME", show_default="the head that fits, else late"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
    index: IndexOption = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Answer a question about a picture by scoring the caption each choice makes true."""
    named = list(dict.fromkeys(each.strip() for each in choices.split(",") if each.strip()))
    if len(named) < 2:
        raise UsageError("--choices needs at least two different answers", "Say --choices red,blue")
    if not question.strip():
        raise UsageError("the question is empty")
    import numpy as np

    from ..rerank.asking import fill_in

    viewer = open_viewer(index, scorer, device)
    captions = fill_in(question, named)
    scores = viewer.score(image, captions)
    sharpened = np.exp(scores - scores.max())
    shares = sharpened / sharpened.sum()
    order = np.argsort(-scores, kind="stable")
    if as_json:
        answers = [
            {"choice": named[at], "caption": captions[at], "share": round(float(shares[at]), 4)}
            for at in order
        ]
        print_line(json.dumps({"answer": named[order[0]], "answers": answers}))
    else:
        for at in order:
            answer, caption = escape(f"{named[at]:<16}"), escape(captions[at])
            stdout.print(f"{shares[at]:6.1%}  {answer} [dim]{caption}[/]")
    shown = viewer.show(image, captions[order[0]])
    peak = divmod(int(shown.explanation.whole.argmax()), shown.explanation.whole.shape[1])
    say(
        f"looked most at row {peak[0] + 1} of {shown.explanation.whole.shape[0]}, "
        f"column {peak[1] + 1} of {shown.explanation.whole.shape[1]}",
        quiet=quiet,
    )
    if png:
        from ..rerank.sheets import write_sheet

        with writing(png, quiet=quiet):
            write_sheet(png, [shown], f"{question}  {named[order[0]]}")
