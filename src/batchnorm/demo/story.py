"""The tour, told as a report: what was done, what was seen, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from batchnorm.demo.stations import Stations
from batchnorm.demo.training import PERCENTILES, Probe, TrainingRun
from batchnorm.report import Document, Facts, Paragraph, Plot, Section, Series, Table
from batchnorm.report.document import Block, Tone

__all__ = ["tell"]


def tell(tour: Stations) -> Document:
    """Return the report of a tour."""
    only_shifted = [row.result.drifted for row in tour.watched] == [False] + [True] * (len(tour.watched) - 1)
    whole = tour.frozen.kept and not tour.folded.left and only_shifted
    return Document(
        "The life of a batch-normalized network",
        f"{tour.dataset}: {tour.pictures[0]:,} training and {tour.pictures[1]:,} test pictures, "
        f"{tour.steps:,} steps of 60, seed {tour.seed}, {tour.seconds:.0f} s in all.",
        [
            _headline(tour),
            _training(tour),
            _inside(tour),
            _statistics(tour),
            _freeze(tour),
            _fold(tour),
            _placement(tour),
            _watch(tour),
        ],
        tone="good" if whole else "bad",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _steps_to(run: TrainingRun, accuracy: float) -> int | None:
    return next((probe.step for probe in run.probes if probe.accuracy >= accuracy), None)


def _headline(tour: Stations) -> Section:
    plain = next(run for run in tour.runs if not run.norm and run.learning_rate == tour.best_rate)
    goal = max(probe.accuracy for probe in plain.probes)
    slow, fast = _steps_to(plain, goal), _steps_to(tour.winner, goal)
    flagged = [row.name for row in tour.watched if row.result.drifted]
    return Section(
        "In short",
        [
            Facts(
                [
                    (f"best accuracy of the plain network ({_percent(goal)}) reached by it after", f"{slow:,} steps"),
                    ("… and by the network with norms after", f"{fast:,} steps" if fast else "never"),
                    (
                        "norms folded away",
                        f"{len(tour.folded.folded)} of {len(tour.folded.folded) + len(tour.folded.left)}",
                    ),
                    ("largest change of an output by folding", tour.folded.error),
                    ("a forward pass is faster by", f"{tour.inference.speedup:.2f} ×"),
                    ("pictures flagged by the watch", ", ".join(flagged) or "none"),
                ]
            )
        ],
    )


def _curves(runs: Sequence[TrainingRun], value: Callable[[Probe], float]) -> list[Series]:
    return [
        Series(
            run.name,
            [probe.step for probe in run.probes],
            [value(probe) for probe in run.probes],
            style="line" if run.norm else "dashed",
        )
        for run in runs
    ]


def _training(tour: Stations) -> Section:
    rows = [
        [
            run.name,
            _percent(run.probes[-1].accuracy),
            _percent(max(probe.accuracy for probe in run.probes)),
            _steps_to(run, 0.9),
            run.loss,
        ]
        for run in tour.runs
    ]
    tried = ", ".join(f"{rate:g} → {loss:.3f}" for rate, loss in tour.losses.items())
    return Section(
        "Train",
        [
            Paragraph(
                "Three hidden layers of 100 sigmoid units, the same initial weights and the same batches in every run. "
                f"Mean training loss of the plain network by learning rate: {tried}. It likes {tour.best_rate:g} best; "
                f"the larger rate is {tour.runs[-1].learning_rate:g}."
            ),
            Plot(
                "Test accuracy while training",
                "training steps",
                "share classified right",
                _curves(tour.runs, lambda probe: probe.accuracy),
                log_x=True,
            ),
            Table(
                ["run", "final accuracy", "best accuracy", "steps to 90 %", "mean training loss"],
                rows,
                caption="Accuracy in eval mode, with the moving averages that training keeps.",
            ),
        ],
    )


def _inside(tour: Stations) -> Section:
    pair = [run for run in tour.runs if run.learning_rate == tour.best_rate]
    series = []
    for run in pair:
        for index, percentile in enumerate(PERCENTILES):
            series.append(
                Series(
                    f"{run.name}, {percentile} %",
                    [probe.step for probe in run.probes],
                    [probe.percentiles[index] for probe in run.probes],
                    style="line" if run.norm else "dashed",
                    group=run.name,
                )
            )
    return Section(
        "Look inside",
        [
            Plot(
                "Input of one unit of the last hidden layer",
                "training steps",
                "pre-activation",
                series,
                log_x=True,
                caption="The 15th, 50th and 85th percentile over the test pictures, as in the paper's figure 1.",
            ),
            Plot(
                "Saturated sigmoid units",
                "training steps",
                "share of units",
                _curves(tour.runs, lambda probe: probe.saturated),
                log_x=True,
                caption="Over the three hidden layers and all test pictures: the slope of the sigmoid is below 5 % of "
                "its maximum.",
            ),
        ],
    )


def _statistics(tour: Stations) -> Section:
    layers = tour.recalibrated.layers
    names = [f"norm {i + 1}" for i in range(len(layers))]
    average, population = tour.contenders
    return Section(
        "Measure the population",
        [
            Paragraph(
                f"The moving averages of the fastest network ({tour.winner.name}) remember the last few dozen batches. "
                f"One pass of batchnorm.recalibrate over all {tour.pictures[0]:,} training pictures replaces them with "
                "exact pooled moments: running_var = M2 / (n − 1)."
            ),
            Table(
                ["statistics", "test accuracy", "test cross-entropy"],
                [[c.name, _percent(c.accuracy), c.loss] for c in (average, population)],
            ),
            Plot(
                "How far the moving averages were off",
                "norm",
                "largest over the channels",
                [
                    Series("mean, in standard deviations", names, [_off(layer.mean_shift) for layer in layers], "bar"),
                    Series(
                        "variance, |ln ratio|", names, [_off(layer.variance_ratio.log()) for layer in layers], "bar"
                    ),
                ],
            ),
            *_blocks(tour.recalibrated.document()),
        ],
    )


def _off(channels: Tensor) -> float:
    return float(channels.abs().max())


def _freeze(tour: Stations) -> Section:
    kept = "bit-identical" if tour.frozen.kept else "changed"
    return Section(
        "Freeze",
        [
            Paragraph(
                f"batchnorm.freeze on {len(tour.frozen.result.layers)} norms, then model.train() and a forward over "
                f"inverted pictures: the statistics are {kept}.",
                tone="good" if tour.frozen.kept else "bad",
            )
        ],
    )


def _fold(tour: Stations) -> Section:
    return Section(
        "Fold and verify",
        [
            *_blocks(_without(tour.folded.document(), "Channel ranges, for int8")),
            Table(
                ["model", "time of a forward over 60 pictures, µs", "test accuracy"],
                [
                    ["with norms, eval mode", tour.inference.before, _percent(tour.contenders[1].accuracy)],
                    ["folded", tour.inference.after, _percent(tour.folded_accuracy)],
                ],
                caption="Medians of 15 rounds in which both models run in turn, one thread.",
            ),
        ],
    )


def _placement(tour: Stations) -> Section:
    return Section(
        "Check and place",
        [
            Paragraph("batchnorm.check on the network with norms:"),
            *_blocks(tour.checked.document()),
            Paragraph("batchnorm.place on the plain network:"),
            *_blocks(tour.placed.document()),
        ],
    )


def _watch(tour: Stations) -> Section:
    sets = {row.name: row.result for row in tour.watched}
    rows = [
        [
            row.name,
            "drifted" if row.result.drifted else "as in training",
            f"{sum(layer.flagged for layer in row.result.layers)} of {len(row.result.layers)}",
            _percent(row.accuracy),
        ]
        for row in tour.watched
    ]
    tones: dict[int, Tone] = {i: "bad" if row.result.drifted else "good" for i, row in enumerate(tour.watched)}
    names = [f"norm {i + 1}" for i in range(len(tour.watched[0].result.layers))]
    distances = [
        Series(name, names, [layer.distance or 0.0 for layer in result.layers], "bar") for name, result in sets.items()
    ]
    saturated = [
        [name, *(_percent(use.saturated or 0.0) for use in result.saturation)] for name, result in sets.items()
    ]
    return Section(
        "Watch",
        [
            Paragraph(
                "The stored statistics are a fingerprint of the training pictures. batchnorm.watch compares them with "
                "what each norm meets; it sees no labels."
            ),
            Table(["pictures", "verdict", "norms that drifted", "test accuracy"], rows, tones=tones),
            Plot(
                "Distance from the stored statistics",
                "norm",
                "stored standard deviations",
                [*distances, Series("tolerance", names, [tour.watched[0].result.tolerance] * len(names), "dashed")],
                caption="How far the typical channel is from its stored mean and standard deviation, sampling noise "
                "taken off. Zero is as in training.",
            ),
            Table(
                ["pictures", *(f"sigmoid {i + 1}" for i in range(len(saturated[0]) - 1))],
                saturated,
                caption="Share of saturated values behind each sigmoid.",
            ),
        ],
    )


def _without(document: Document, title: str) -> Document:
    """Return a report without one of its sections."""
    return replace(document, sections=[section for section in document.sections if section.title != title])


def _blocks(document: Document) -> list[Block]:
    """Return what another verb's report says, without its title."""
    blocks = [block for section in document.sections for block in section.blocks]
    return [Paragraph(document.summary, document.tone), *blocks] if document.summary else blocks
