"""``batchnorm diagnose``: why eval mode is bad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from batchnorm.cli.errors import CommandError
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
    data_option,
    examples,
)

__all__ = ["EPILOG", "diagnose"]

EPILOG = examples(
    "batchnorm diagnose -m net:build -w net.pt -d images.npz",
    "batchnorm diagnose -m net:build -w net.pt -d net:test --metric net:accuracy",
    "batchnorm diagnose -m net:build -d net:test --training-data net:train",
)


def diagnose(
    model: Model,
    data: RequiredData,
    weights: Weights = None,
    seed: Seed = 0,
    training_data: Annotated[
        str | None,
        data_option(
            "--training-data",
            metavar="SOURCE",
            help="Data of the training, as for --data: it tells a shift of the data from a fault of the model.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        data_option(
            "--metric",
            metavar="MODULE:NAME",
            help="A function of the model's output and the batch: a loss or a metric, the mean over the batch.",
        ),
    ] = None,
    higher_is_better: Annotated[
        bool | None,
        data_option(
            "--higher-is-better/--lower-is-better",
            help="Whether more of the metric is better. Found out by outputs of other samples if it is not said.",
        ),
    ] = None,
    batch_size: BatchSize = 64,
    names: Names = None,
    html: Html = None,
    json_: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """Find out why eval mode is bad: the guilty layer, the cause, the cure.

    The model is run on the first batches, until there are both 32 of them and
    1024 samples: in eval mode, on batch statistics, on population statistics,
    once for each cure that can be tried, and in a few experiments. It comes in
    the modes in which the function leaves it. Nothing is written. Exits with 1
    when something is wrong; a note is no fault.
    """
    from batchnorm.cli.output import check_destinations, only_result_on_stdout, publish, writing

    check_destinations(None, html)
    with only_result_on_stdout():
        from batchnorm.cli.load import load_batches, load_model
        from batchnorm.diagnosis.diagnose import diagnose as run

        network = load_model(model, weights, seed=seed)
        batches = load_batches(data, network, batch_size=batch_size)
        home = None if training_data is None else load_batches(training_data, network, batch_size=batch_size)
        measure = None if metric is None else _function(metric)
        result = run(
            network, batches, measure, higher_is_better=higher_is_better, training_batches=home, names=names or None
        )
        with writing() as files:
            files.write("--html", html, result.to_html)
    publish(result, json_=json_, verbose=verbose, html=html)
    return 0 if result.healthy else 1


def _function(spec: str) -> Callable[[Any, Any], Any]:
    """Return the function that ``--metric`` names.

    Raises:
        CommandError: there is none of that name, or it is no function.
    """
    from batchnorm.cli.load.objects import find_object

    found: Callable[[Any, Any], Any] = find_object("--metric", spec)
    if not callable(found):
        raise CommandError(
            f"--metric {spec}: expected a function of the model's output and the batch; got {type(found).__name__}."
        )
    return found
