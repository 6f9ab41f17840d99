"""``batchnorm fold``: norms absorbed into their neighbours, for deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.options import (
    OUTPUT,
    BatchSize,
    Data,
    Debug,
    Html,
    Inputs,
    Json,
    Model,
    Seed,
    Weights,
    examples,
)

__all__ = ["EPILOG", "fold"]

EPILOG = examples(
    "batchnorm fold -m net:build -w net.pt -i 8,3,32,32 -o folded.safetensors",
    "batchnorm fold -m net:build -w net.pt -d images.npz -o folded.pt2",
)


def fold(
    model: Model,
    weights: Weights = None,
    seed: Seed = 0,
    inputs: Inputs = None,
    data: Data = None,
    batch_size: BatchSize = 64,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            help="Write the folded model: its state dict to .safetensors, .pt or .pth; to .pt2 a torch.export program, "
            "which runs without your code. Without it nothing is written.",
        ),
    ] = None,
    html: Html = None,
    json_: Json = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", metavar="", rich_help_panel=OUTPUT, help="Exit with 1 when a norm could not be folded."
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            metavar="",
            rich_help_panel=OUTPUT,
            help="Also time the model before and after, in turn, and look at the memory of a pass.",
        ),
    ] = False,
    debug: Debug = False,
) -> int:
    """Fold norms into the layers before and after them, and verify the result.

    The model is put in eval mode, run once on the example input, folded, and
    compared with the original: a fold that differs by more than its stated
    bound is an error. Each norm that is left comes with the reason.
    """
    from batchnorm.cli.output import STATE_SUFFIXES, check_destinations, note, only_result_on_stdout, page, publish

    check_destinations(output, html, (*STATE_SUFFIXES, ".pt2"))
    with only_result_on_stdout():
        from batchnorm.cli.load import load_example, load_model
        from batchnorm.cli.save import save_model
        from batchnorm.graph.fold import fold as run

        network = load_model(model, weights, seed=seed).eval()
        example = load_example(network, inputs, data, batch_size=batch_size, seed=seed)
        result = run(network, example)
        if measure and result.folded:
            result = result.measure(example)
        with page(result, html):
            if output is not None:
                save_model(result.model, output, example)
        if output is not None and output.suffix != ".pt2" and result.folded:
            note(
                f"{output} fits the folded model, not {model}, which has norms: load it into "
                "batchnorm.fold(model, example_inputs).model, or write a .pt2 file, which needs no code."
            )
    publish(result, json_=json_, html=html, output=output)
    return 1 if strict and result.left else 0
