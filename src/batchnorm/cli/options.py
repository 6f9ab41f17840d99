"""The options that several commands share, each described once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

__all__ = [
    "DATA",
    "BatchSize",
    "Data",
    "Debug",
    "Html",
    "Inputs",
    "Json",
    "Model",
    "ModelOrProgram",
    "Names",
    "Output",
    "RequiredData",
    "Seed",
    "Verbose",
    "Weights",
    "data_option",
    "examples",
    "norms_option",
    "output_option",
]

DATA = "What it is run on"
data_option = partial(typer.Option, rich_help_panel=DATA)
norms_option = partial(typer.Option, rich_help_panel="The norms")
output_option = partial(typer.Option, rich_help_panel="Output")

Model: TypeAlias = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODULE:NAME",
        help="The model, or a function that returns it: net:build is build() of ./net.py.",
    ),
]
ModelOrProgram: TypeAlias = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODULE:NAME",
        help="The model, or a function that returns it: net:build is build() of ./net.py. Or a torch.export program, a "
        "file .pt2.",
    ),
]
Weights: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="FILE",
        help="Its state dict: .safetensors, .pt, .pth, .ckpt, .bin. No code in the file is ever run.",
    ),
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all random numbers.")]
_DATA_HELP = (
    "Batches: a file .npz, whose array x (or inputs, or the first) is cut into batches; or MODULE:NAME, a loader or a "
    "function that returns one."
)
RequiredData: TypeAlias = Annotated[str, data_option("--data", "-d", metavar="SOURCE", help=_DATA_HELP)]
Data: TypeAlias = Annotated[
    str | None,
    data_option(
        "--data",
        "-d",
        metavar="SOURCE",
        help="Instead of --input, the first batch of a file .npz (its array x, or inputs, or the first), or of "
        "MODULE:NAME, a loader or a function that returns one.",
    ),
]
BatchSize: TypeAlias = Annotated[
    int, data_option("--batch-size", "-b", metavar="N", min=1, help="Samples in a batch cut from .npz.")
]
Inputs: TypeAlias = Annotated[
    list[str] | None,
    data_option(
        "--input",
        "-i",
        metavar="SHAPE",
        help="Run on a random normal tensor of this shape: 8,3,224,224. Repeat it for several arguments; "
        "8,16:int64 draws zeros and ones.",
    ),
]
Names: TypeAlias = Annotated[
    list[str] | None,
    norms_option(
        "--names",
        metavar="NAME",
        help="Only these norms: a name (layer1.0.bn1), what holds them (layer1), or a pattern (*.bn2). Repeat it for "
        "several.",
    ),
]
Output: TypeAlias = Annotated[
    Path | None,
    output_option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the state dict to FILE: .safetensors, .pt or .pth. Without it nothing is written.",
    ),
]
Html: TypeAlias = Annotated[
    Path | None, output_option("--html", metavar="FILE", help="Write the report as one HTML page.")
]
Json: TypeAlias = Annotated[bool, output_option("--json", metavar="", help="Print the result as JSON on stdout.")]
Verbose: TypeAlias = Annotated[
    bool, output_option("--verbose", metavar="", help="Print all rows, not only those that matter.")
]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", metavar="", help="On an error, show the traceback too.")]


def examples(*commands: str) -> str:
    """Return the end of a help page: commands to paste, each on one line that fits 80 columns."""
    lines = "".join(f"  {command}\n" for command in commands)
    legend = "(net:build is the function build() of ./net.py)" if "net:build" in lines else ""
    return f"[bold]Examples[/bold]\n{lines}{legend}"
