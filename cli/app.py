"""The ``mmsearch`` command: its commands, the global options and the error boundary."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from . import ask, check, explain, index, migrate, models, query, remove, status, train
from .eval import eval_app
from .output import report_error

_EPILOG = "Start with:  mmsearch index ~/Pictures  then  mmsearch query 'red car'"

app = typer.Typer(
    name="mmsearch",
    help="Find pictures by what they show.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mmsearch {version('mmsearch')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Find pictures by what they show.

    Pictures are embedded with CLIP into a Milvus index; a query takes the nearest few hundred and
    a cross-attention scorer, in which the words attend over the picture's patches, orders them.
    """


app.command(epilog=index.EXAMPLES)(index.index)
app.command(epilog=query.EXAMPLES)(query.query)
app.command(epilog=status.EXAMPLES)(status.status)
app.command(epilog=check.EXAMPLES)(check.check)
app.command(epilog=remove.EXAMPLES)(remove.remove)
app.command(epilog=migrate.EXAMPLES)(migrate.migrate)
app.command(epilog=models.EXAMPLES)(models.models)
app.command(epilog=explain.EXAMPLES)(explain.explain)
app.command(epilog=ask.EXAMPLES)(ask.ask)
app.command(epilog=train.EXAMPLES)(train.train)
app.add_typer(eval_app, name="eval")


def main() -> None:
    """Run the command line; domain errors become one line, a hint and an exit code."""
    debug = "--debug" in sys.argv[1:]
    if not debug:
        # Libraries log through the root logger, some of them with tracebacks of what they handle.
        logging.basicConfig(handlers=[logging.NullHandler()])
    try:
        app(standalone_mode=True)
    except BaseException as error:
        if isinstance(error, (SystemExit, GeneratorExit)):
            raise
        sys.exit(report_error(error, debug=debug))
