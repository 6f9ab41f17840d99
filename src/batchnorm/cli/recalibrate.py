"""``batchnorm recalibrate``: population statistics for the user's own model."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from batchnorm.cli.options import (
    NORMS,
    BatchSize,
    Debug,
    Html,
    Json,
    Model,
    Names,
    Output,
    RequiredData,
    Seed,
    Weights,
    examples,
)

__all__ = ["EPILOG", "recalibrate"]

EPILOG = examples(
    "batchnorm recalibrate -m net:build -w net.pt -d images.npz -o better.pt",
    "batchnorm recalibrate -m net:build -w net.pt -d net:batches --names bn2",
)


def recalibrate(
    model: Model,
    data: RequiredData,
    weights: Weights = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    estimator: Annotated[
        Literal["pooled", "within"],
        typer.Option(
            "--estimator",
            rich_help_panel=NORMS,
            help="pooled: exact moments of all samples, however they are cut into batches. within: Algorithm 2 of "
            "the paper, the mean of the unbiased variances within batches.",
        ),
    ] = "pooled",
    names: Names = None,
    output: Output = None,
    html: Html = None,
    json_: Json = False,
    debug: Debug = False,
) -> int:
    """Recompute every norm's mean and variance from one pass over your data.

    Only the norms run in batch mode; Dropout stays off. A last, smaller batch
    counts as what it is. Make the others about as large as in training: a norm
    behind another one meets what that one makes of each batch. Prints each
    layer's statistics before and after. Frozen norms are left unless named.
    """
    from batchnorm.cli.output import check_destinations, only_result_on_stdout, page, publish

    check_destinations(output, html)
    with only_result_on_stdout():
        from batchnorm.cli.load import load_batches, load_model
        from batchnorm.cli.save import save_model
        from batchnorm.statistics.recalibrate import recalibrate as run

        network = load_model(model, weights, seed=seed)
        batches = load_batches(data, network, batch_size=batch_size)
        result = run(network, batches, estimator=estimator, names=names or None)
        with page(result, html):
            if output is not None:
                save_model(network, output)
    publish(result, json_=json_, html=html, output=output)
    return 0
