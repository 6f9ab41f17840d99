"""``batchnorm fold``: norms absorbed into their neighbours, for deployment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.options import (
    BatchSize,
    Data,
    Debug,
    Html,
    Inputs,
    Json,
    ModelOrProgram,
    Seed,
    Verbose,
    Weights,
    data_option,
    examples,
    output_option,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.nn import Module

    from batchnorm.folding.result import FoldResult

__all__ = ["EPILOG", "fold"]

FOLDED = "What is folded"

EPILOG = examples(
    "batchnorm fold -m net:build -w net.pt -i 8,3,32,32 -o folded.safetensors",
    "batchnorm fold -m net:build -w net.pt -d images.npz -o folded.pt2",
    "batchnorm fold -m net.pt2 -o folded.pt2",
    "batchnorm fold -m net:build -i 8,3,32,32 -e 1,3,64,48 -e net:mapped",
    "batchnorm fold -m net:build -i 8,3,32,32 -o f.pt --pairs p.safetensors",
    "batchnorm fold -m net:build -d images.npz --input-mean 120 --input-std 60",
)


def fold(
    model: ModelOrProgram,
    weights: Weights = None,
    seed: Seed = 0,
    inputs: Inputs = None,
    data: Data = None,
    batch_size: BatchSize = 64,
    example: Annotated[
        list[str] | None,
        data_option(
            "--example",
            "-e",
            metavar="SOURCE",
            help="Fold only what holds on these inputs, too: a shape, 1,3,64,64; a file .npz; or MODULE:NAME, of which "
            "the first batch may be a dict of keyword arguments. Repeat it for several.",
        ),
    ] = None,
    keep_range: Annotated[
        bool,
        typer.Option(
            "--keep-range",
            metavar="",
            rich_help_panel=FOLDED,
            help="Leave norms that would make weights too small for a half-precision type.",
        ),
    ] = False,
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse",
            metavar="",
            rich_help_panel=FOLDED,
            help="Make one multiply-add per channel of each norm that is left, in one pass with the activation behind.",
        ),
    ] = False,
    input_mean: Annotated[
        str | None,
        typer.Option(
            "--input-mean",
            metavar="NUMBERS",
            rich_help_panel=FOLDED,
            help="Fold the normalization of the inputs too, so that the folded model takes raw ones: their mean, a "
            "number or one for each channel, 123.7,116.3,103.5. The inputs given here are raw then.",
        ),
    ] = None,
    input_std: Annotated[
        str | None,
        typer.Option(
            "--input-std",
            metavar="NUMBERS",
            rich_help_panel=FOLDED,
            help="Their standard deviation, likewise; inputs were divided by it.",
        ),
    ] = None,
    borders: Annotated[
        bool,
        typer.Option(
            "--borders",
            metavar="",
            rich_help_panel=FOLDED,
            help="Let convolutions that pad with zeros absorb a norm before them: they pad with a value per channel.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        output_option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the folded model: its state dict to .safetensors, .pt or .pth; to .pt2 a torch.export program, "
            "which runs without your code. Without it nothing is written.",
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        output_option(
            "--pairs",
            metavar="FILE",
            help="Write the norms and parameters from before to FILE, .safetensors: batchnorm unfold gives them back.",
        ),
    ] = None,
    html: Html = None,
    json_: Json = False,
    verbose: Verbose = False,
    strict: Annotated[
        bool, output_option("--strict", metavar="", help="Exit with 1 when a norm could not be folded.")
    ] = False,
    measure: Annotated[
        bool,
        output_option(
            "--measure",
            metavar="",
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
    from batchnorm.cli.output import (
        STATE_SUFFIXES,
        check_apart,
        check_destinations,
        only_result_on_stdout,
        publish,
        writing,
    )

    check_destinations(output, html, (*STATE_SUFFIXES, ".pt2"))
    check_destinations(pairs, None, (".safetensors",), option="--pairs")
    check_apart({"--output": output, "--pairs": pairs, "--html": html}, {"--weights": weights})
    with only_result_on_stdout():
        from batchnorm.cli.load import load_example, load_examples, load_model, load_program
        from batchnorm.cli.load.numbers import read_numbers
        from batchnorm.cli.save import save_model

        options: dict[str, Any] = {
            "input_mean": read_numbers("--input-mean", input_mean),
            "input_std": read_numbers("--input-std", input_std),
            "borders": borders,
            "keep_range": keep_range,
            "fuse": fuse,
        }
        network: Any
        if model.endswith(".pt2"):
            _require_program_options(model, weights, output, pairs)
            network = load_program(Path(model))
        else:
            network = load_model(model, weights, seed=seed).eval()
        has_own = model.endswith(".pt2") and not inputs and data is None
        first = None if has_own else load_example(network, inputs, data, batch_size=batch_size, seed=seed)
        options["examples"] = load_examples(network, example, batch_size=batch_size, seed=seed)
        result = _run(network, first, options)
        if measure and result.changed:
            result = result.measure(first)
        with writing(weights, model) as files:
            files.write("--html", html, result.to_html)
            files.write("--pairs", None if result.pairs is None else pairs, result.save_pairs)
            save_model(result.model, output, first, files)
        _note_what_files_fit(result, model, output, pairs)
    beside = None if pairs is None or result.pairs is None else str(pairs)
    publish(result, json_=json_, verbose=verbose, html=html, output=output, pairs=beside)
    return 1 if strict and result.left else 0


def _require_program_options(model: str, weights: Path | None, output: Path | None, pairs: Path | None) -> None:
    """Refuse what only goes with the user's own model."""
    from batchnorm.cli.errors import CommandError

    if weights is not None:
        raise CommandError(f"--weights {weights}: {model} is a program, which has its weights.")
    if pairs is not None:
        raise CommandError(f"--pairs {pairs}: the norms of a program are in the program, {model}; keep that.")
    if output is not None and output.suffix != ".pt2":
        raise CommandError(f"--output {output}: {model} is a program, and so is what is written: a .pt2 file.")


def _run(network: Module | ExportedProgram, example: Any, options: dict[str, Any]) -> FoldResult:
    from batchnorm.cli.errors import CommandError
    from batchnorm.errors import BatchNormError
    from batchnorm.folding.fold import fold as run

    try:
        return run(network, example, **options)
    except BatchNormError as error:
        if not str(error).startswith("fold: input_"):
            raise
        named = str(error).replace("input_mean", "--input-mean").replace("input_std", "--input-std")
        raise CommandError(named.removeprefix("fold: ")) from error


def _note_what_files_fit(result: FoldResult, model: str, output: Path | None, pairs: Path | None) -> None:
    """Note which models the files fit."""
    from batchnorm.cli.output import note

    if result.pairs is None:
        if pairs is not None:
            note(f"nothing was folded, so there is nothing to take back: {pairs} was not written.")
        return
    if pairs is not None:
        note(f"wrote {pairs}, from which batchnorm unfold gives the norms back.")
    if output is None or output.suffix == ".pt2":
        return
    file, first = (pairs, "") if pairs is not None else ("PAIRS", "write --pairs PAIRS as well, and ")
    note(
        f"{output} fits the folded model, not {model}, which has norms: {first}load it into "
        f"batchnorm.refold(model, '{file}'); or write a .pt2 file, which needs no code."
    )
