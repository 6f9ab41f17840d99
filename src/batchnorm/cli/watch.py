"""``batchnorm watch``: is the data that the model meets still the data it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from batchnorm.cli.errors import reason
from batchnorm.cli.options import (
    BatchSize,
    Debug,
    Html,
    Json,
    Model,
    Names,
    RequiredData,
    Seed,
    Verbose,
    Weights,
    examples,
    norms_option,
)
from batchnorm.errors import BatchError, BatchNormError

if TYPE_CHECKING:
    from torch.nn import Module

    from batchnorm.monitor.watch import WatchResult

__all__ = ["EPILOG", "watch"]

EPILOG = examples(
    "batchnorm watch -m net:build -w net.pt -d images.npz",
    "batchnorm watch -m net:build -w net.pt -d net:batches --html drift.html",
)


def watch(
    model: Model,
    data: RequiredData,
    weights: Weights = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    names: Names = None,
    reference: Annotated[
        Path | None,
        norms_option(
            "--reference",
            metavar="FILE",
            help="Compare with the moments in a file of recalibrate --population, not with the stored statistics.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        norms_option(
            "--tolerance",
            metavar="D",
            help="Distance that is no drift, in stored standard deviations of the typical channel.",
        ),
    ] = 0.1,
    level: Annotated[
        float, norms_option("--level", metavar="P", help="Probability of a false alarm, for all norms together.")
    ] = 0.01,
    every: Annotated[
        int,
        norms_option(
            "--every", metavar="N", help="Look at the first of every N batches; the others run as without a watch."
        ),
    ] = 1,
    window: Annotated[
        int | None, norms_option("--window", metavar="N", help="Let only the last N samples count, at least 32.")
    ] = None,
    html: Html = None,
    json_: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """Compare what each norm meets in your data with what it has stored.

    The model is run in eval mode over all batches and is not changed. Per
    norm: the distance from the stored statistics with its noise taken off, and
    the channel that moved most. Beside it, saturated units behind sigmoid and
    tanh, and dead ones behind ReLU. Exits with 1 when a norm has drifted, and
    with 2 when too little was seen to tell.
    """
    from batchnorm.cli.output import check_destinations, only_result_on_stdout, publish, writing

    check_destinations(None, html)
    with only_result_on_stdout():
        from batchnorm.cli.load import load_batches, load_model
        from batchnorm.statistics.population import Population

        network = load_model(model, weights, seed=seed).eval()
        batches = load_batches(data, network, batch_size=batch_size)
        known = None if reference is None else Population.load(reference)
        result = _watch(
            network,
            batches,
            names=names or None,
            reference=known,
            every=every,
            window=window,
            tolerance=tolerance,
            level=level,
        )
        with writing() as files:
            files.write("--html", html, result.to_html)
    publish(result, json_=json_, verbose=verbose, html=html)
    return 1 if result.drifted else 0  # an error, where too little was seen for an answer


def _watch(network: Module, batches: Any, **options: Any) -> WatchResult:
    import torch

    from batchnorm.models.calling import call_on_batch
    from batchnorm.monitor.watch import watch as run
    from batchnorm.report.progress import progress_bar
    from batchnorm.statistics.stream import length_of, numbered

    with (
        torch.no_grad(),
        run(network, **options) as watching,
        progress_bar("Watching", length_of(batches), None) as advance,
    ):
        for index, batch in numbered("watch", batches):
            try:
                call_on_batch(network, batch)
            except BatchNormError:
                raise
            except Exception as error:
                raise BatchError(f"watch: the model failed on batch {index}, {reason(error)}.") from error
            advance()
    return watching.result()
