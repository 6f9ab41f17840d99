"""``batchnorm demo``: the tour on real data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from batchnorm.cli.options import Debug, Json, Verbose, examples

__all__ = ["EPILOG", "demo"]

EPILOG = examples("batchnorm demo", "batchnorm demo --dataset mnist --root mnist --output mnist-report")


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder that report.html is written to.")
    ] = Path("batchnorm-report"),
    dataset: Annotated[
        Literal["digits", "mnist"],
        typer.Option("--dataset", help="digits: 8×8 pictures, shipped with scikit-learn. mnist: 28×28, from --root."),
    ] = "digits",
    root: Annotated[
        Path | None, typer.Option("--root", metavar="FOLDER", help="Folder of the four MNIST files, plain or .gz.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="Training steps: 3000 on digits, 50000 on mnist by default."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of weights and batches.")] = 0,
    json_: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """Take a network through its whole life on real pictures, in a minute.

    The first experiment of the batch normalization paper, three layers of 100
    sigmoid units with and without norm; then the winner is recalibrated,
    frozen, folded, checked and watched. It ends with one report in HTML.
    """
    from batchnorm.cli.output import check_folder, note, only_result_on_stdout, print_json, print_result

    check_folder("--output", output)
    with only_result_on_stdout():
        from batchnorm.demo import run_demo

        result = run_demo(output, dataset=dataset, root=root, steps=steps, seed=seed)
    if json_:
        print_json(result.to_dict() | {"html": str(result.report)})
    else:
        print_result(result, verbose=verbose)
        note(f"wrote {result.report}.")
    return 0
