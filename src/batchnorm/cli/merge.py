"""``batchnorm merge``: checkpoints of one architecture averaged, their statistics mixed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.options import Debug, Html, Json, Model, Output, Seed, Verbose, examples

__all__ = ["EPILOG", "merge"]

EPILOG = examples(
    "batchnorm merge -m net:build -w a.pt -w b.pt -w c.pt -o soup.pt",
    "batchnorm merge -m net:build -w a.pt --by 6000 -w b.pt --by 2000 -o both.pt",
)


def merge(
    model: Model,
    weights: Annotated[
        list[Path],
        typer.Option(
            "--weights",
            "-w",
            metavar="FILE",
            help="A state dict: .safetensors, .pt, .pth, .ckpt, .bin. Repeat it for each model. No code in the files "
            "is ever run.",
        ),
    ],
    by: Annotated[
        list[float] | None,
        typer.Option(
            "--by",
            metavar="NUMBER",
            help="How much a model counts, such as its number of samples: one for each --weights, in the same order. "
            "Without it all count alike.",
        ),
    ] = None,
    seed: Seed = 0,
    output: Output = None,
    html: Html = None,
    json_: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """Average checkpoints of one architecture, and mix the statistics of their norms.

    A running variance of the merged model holds the variance between the models
    too. Prints by how much they disagree, norm by norm. The statistics are those
    of a mixture of the models, not of the averaged weights: where there is data,
    run batchnorm recalibrate on the merged file.
    """
    from batchnorm.cli.output import check_apart, check_destinations, note, only_result_on_stdout, publish, writing

    check_destinations(output, html)
    check_apart({"--output": output, "--html": html})
    with only_result_on_stdout():
        from batchnorm.cli.errors import CommandError
        from batchnorm.cli.load import load_model
        from batchnorm.cli.load.weights import fit_weights, read_weights
        from batchnorm.cli.save import save_model
        from batchnorm.errors import BatchNormError
        from batchnorm.models.copying import copy_model
        from batchnorm.statistics.merge import merge as run

        network = load_model(model, seed=seed)
        networks = []
        for path in weights:
            networks.append(copy_model(f"--model {model}", network, "Name a function that builds it."))
            fit_weights(networks[-1], read_weights(path), path)
        try:
            result = run(networks, by or None)
        except BatchNormError as error:
            named = re.sub(r"models\[(\d+)\]", lambda found: str(weights[int(found[1])]), str(error))
            raise CommandError(named.replace("merge: weights", "--by")) from error
        with writing(*weights) as files:
            files.write("--html", html, result.to_html)
            save_model(result.model, output, files=files)
        if output is not None and result.layers:
            note(f"with data, measure its statistics anew: batchnorm recalibrate -m {model} -w {output} -d DATA.")
    publish(result, json_=json_, verbose=verbose, html=html, output=output)
    return 0
