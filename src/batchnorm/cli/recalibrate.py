"""``batchnorm recalibrate``: population statistics for the user's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from batchnorm.cli.options import (
    BatchSize,
    Debug,
    Html,
    Json,
    Model,
    Names,
    Output,
    RequiredData,
    Seed,
    Verbose,
    Weights,
    data_option,
    examples,
    norms_option,
    output_option,
)

__all__ = ["EPILOG", "recalibrate"]

EPILOG = examples(
    "batchnorm recalibrate -m net:build -w net.pt -d images.npz -o better.pt",
    "batchnorm recalibrate -m net:build -w net.pt -d net:batches --names bn2",
    "torchrun --nproc-per-node 4 -m batchnorm recalibrate -m net:build -d x.npz",
)


def recalibrate(
    model: Model,
    data: RequiredData,
    weights: Weights = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    order: Annotated[
        Literal["sequential", "parallel"],
        norms_option(
            "--order",
            help="sequential: each norm measured with all earlier ones on their final statistics, exact for inference. "
            "parallel: all at once, on the statistics of each batch, as in training.",
        ),
    ] = "sequential",
    estimator: Annotated[
        Literal["pooled", "within"],
        norms_option(
            "--estimator",
            help="pooled: exact moments of all samples, however they are cut into batches. within: Algorithm 2 of "
            "the paper, the mean of the unbiased variances within batches.",
        ),
    ] = "pooled",
    names: Names = None,
    tolerance: Annotated[
        float | None,
        data_option(
            "--tolerance",
            metavar="X",
            help="Stop once no layer is less certain than this: the standard error in standard deviations.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        data_option(
            "--memory",
            metavar="SIZE",
            help="What the batches that wait in the sequential order may take: 4GB. Half of what is free by default.",
        ),
    ] = None,
    cache: Annotated[
        Path | None, data_option("--cache", metavar="DIR", help="Where to put batches beyond that; else run again.")
    ] = None,
    sharded: Annotated[
        bool,
        data_option(
            "--sharded",
            metavar="",
            help="Under torchrun: the loader gives each process its own part. Without it each takes every n-th batch.",
        ),
    ] = False,
    output: Output = None,
    population: Annotated[
        Path | None,
        output_option(
            "--population", metavar="FILE", help="Write the moments and their standard errors to FILE, .safetensors."
        ),
    ] = None,
    html: Html = None,
    json_: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """Recompute every norm's mean and variance from your data.

    Exact for inference, however the data is cut into batches, and in however
    many processes. Dropout stays off. Prints each layer's statistics before
    and after, and how sure they are. Frozen norms are left unless named.
    """
    from batchnorm.cli.output import check_apart, check_destinations, only_result_on_stdout, publish, writing

    check_destinations(output, html)
    check_destinations(population, None, (".safetensors",), option="--population")
    check_apart({"--output": output, "--population": population, "--html": html}, {"--weights": weights})
    with only_result_on_stdout():
        from batchnorm.cli.load import load_batches, load_model
        from batchnorm.cli.processes import processes
        from batchnorm.cli.save import save_model
        from batchnorm.statistics.recalibrate import recalibrate as run

        network = load_model(model, weights, seed=seed)
        batches = load_batches(data, network, batch_size=batch_size)
        with processes(network) as together:
            result = run(
                network,
                batches if sharded else together.part(batches),
                order=order,
                estimator=estimator,
                names=names or None,
                tolerance=tolerance,
                memory=memory,
                cache=cache,
                process_group=together.group,
                progress=None if together.speaks else False,
            )
        if not together.speaks:
            return 0
        with writing(weights) as files:
            files.write("--html", html, result.to_html)
            files.write("--population", population, result.population.save)
            save_model(network, output, files=files)
    publish(result, json_=json_, verbose=verbose, html=html, output=output)
    return 0
