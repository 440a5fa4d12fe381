"""What the user sees: results on stdout, all else on stderr, errors as one line and a way out."""

from __future__ import annotations

import sys
import traceback

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..core.errors import MmsearchError

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def say(message: str, *, quiet: bool = False) -> None:
    """Tell the user something that is not a result (plain text, no markup)."""
    if not quiet:
        stderr.print(escape(message), soft_wrap=True)


def warn(message: str) -> None:
    """Tell the user something that went wrong without stopping the run."""
    stderr.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def print_line(text: str) -> None:
    """Write one line of a result; names that are not valid UTF-8 pass through byte for byte."""
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")


class _RateColumn(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s", style="cyan")


def progress(*, quiet: bool = False) -> Progress:
    """Return a progress display with rate and time left; silent when stderr is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=stderr,
        transient=True,
        disable=quiet or not stderr.is_terminal,
    )


def report_error(error: BaseException, *, debug: bool) -> int:
    """Print an error the way a user can act on and return the exit code for it."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, MmsearchError):
        stderr.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
        if error.hint:
            stderr.print(f"  {escape(error.hint)}", soft_wrap=True)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        stderr.print("interrupted")
        return 130
    stderr.print(
        f"[bold red]error:[/] a defect in mmsearch: {type(error).__name__}: {escape(str(error))}",
        soft_wrap=True,
    )
    if not debug:
        stderr.print("  Run the command again with --debug (before its name) for the traceback.")
    return 70
