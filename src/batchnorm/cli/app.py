"""The commands, under one name."""

from __future__ import annotations

from typing import Annotated

import typer

from batchnorm.cli import check, demo, diagnose, fold, info, merge, recalibrate, unfold, watch

__all__ = ["app"]

_EPILOG = """\
[bold]Your model[/bold] is named as MODULE:NAME: net:build is the function build() of
./net.py. It is called without arguments; your code needs no change.

[bold]Exit code[/bold]  0: done. 1: done, and the answer is no (findings, drift).
2: an error, told in one sentence on stderr; every file is as it was.

[bold]Start with[/bold]
  batchnorm demo
  batchnorm check --help
"""

app = typer.Typer(
    name="batchnorm",
    help="The whole life of a batch-normalized PyTorch model: your own, without changes to it.",
    epilog=_EPILOG,
    rich_markup_mode="rich",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_OWN_MODEL = "On your own model"
app.command(epilog=check.EPILOG, rich_help_panel=_OWN_MODEL)(check.check)
app.command(epilog=diagnose.EPILOG, rich_help_panel=_OWN_MODEL)(diagnose.diagnose)
app.command(epilog=recalibrate.EPILOG, rich_help_panel=_OWN_MODEL)(recalibrate.recalibrate)
app.command(epilog=merge.EPILOG, rich_help_panel=_OWN_MODEL)(merge.merge)
app.command(epilog=fold.EPILOG, rich_help_panel=_OWN_MODEL)(fold.fold)
app.command(epilog=unfold.EPILOG, rich_help_panel=_OWN_MODEL)(unfold.unfold)
app.command(epilog=watch.EPILOG, rich_help_panel=_OWN_MODEL)(watch.watch)
app.command(epilog=demo.EPILOG, rich_help_panel="To look around")(demo.demo)
app.command(epilog=info.EPILOG, rich_help_panel="To look around")(info.info)


def _print_version(wanted: bool) -> None:
    if wanted:
        from batchnorm import __version__

        typer.echo(f"batchnorm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
