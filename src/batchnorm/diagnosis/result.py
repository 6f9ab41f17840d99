"""What a diagnosis found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from batchnorm.diagnosis.case import Severity
from batchnorm.diagnosis.gaps import LayerGap
from batchnorm.diagnosis.trial import Gain
from batchnorm.report import Document, Facts, HeatMap, Plot, Result, Section, Series, Table, foremost
from batchnorm.report.document import Block, Tone
from batchnorm.report.result import finite_or_none
from batchnorm.statistics.sites import Left

__all__ = ["DiagnoseResult", "Finding", "Metrics"]


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        layer: the first layer that has it, in order of execution; ``""`` is the model itself.
        cause: its key, ``"never_updated"``.
        severity: ``"fatal"``: outputs mean nothing; ``"wrong"``: they are other than they should be; ``"doubtful"``:
            they may be right, and something is lost. ``"note"``: worth knowing, and no fault.
        evidence: the numbers it rests on, as a sentence.
        cure: a line of code, with ``batchnorm``, ``torch``, ``model`` and ``batches`` in scope; ``""`` where none is
            needed, or none is told because its own trial makes the metric worse.
        gain: what a trial of the cure brought; None where only training or other code can cure it.
        layers: every layer that has it.
        position: place of the first of them in the order of execution.
    """

    layer: str
    cause: str
    severity: Severity
    evidence: str
    cure: str
    gain: Gain | None = None
    layers: tuple[str, ...] = ()
    position: int = field(default=0, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as strings, numbers and lists."""
        return {
            "layer": self.layer,
            "layers": list(self.layers),
            "cause": self.cause,
            "severity": self.severity,
            "evidence": self.evidence,
            "cure": self.cure,
            "gain": None if self.gain is None else self.gain.to_dict(),
        }


@dataclass(frozen=True)
class Metrics:
    """The metric, or loss, on three bases.

    Attributes:
        training: every norm normalizes by the batch, everything else in eval mode.
        eval: the model as it is, in eval mode.
        recalibrated: every norm on population statistics: what ``batchnorm.recalibrate`` would bring.
        higher_is_better: whether more is better; None where neither the user nor outputs of other samples tell, and
            then the metric judges nothing.
    """

    training: float | None
    eval: float | None
    recalibrated: float | None
    higher_is_better: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the three numbers, and whether more is better."""
        return {name: finite_or_none(value) for name, value in vars(self).items()}


class DiagnoseResult(Result):
    """What :func:`batchnorm.diagnosis.diagnose.diagnose` found.

    Attributes:
        findings: the faults: the fatal ones first, then in order of execution.
        notes: what is worth knowing and no fault: a model that is untrained, or was fine-tuned with frozen norms.
        layers: the gap of every norm that was called, in order of execution.
        metrics: the metric on three bases; None if none was given.
        batches: how many batches were taken.
        samples: how many samples they hold.
        left: norms that could not be measured, each with the reason.
    """

    def __init__(
        self,
        findings: Sequence[Finding],
        layers: Sequence[LayerGap],
        metrics: Metrics | None,
        batches: int,
        samples: int,
        left: Sequence[Left] = (),
    ) -> None:
        self.findings = tuple(finding for finding in findings if finding.severity != "note")
        self.notes = tuple(finding for finding in findings if finding.severity == "note")
        self.layers = tuple(layers)
        self.metrics = metrics
        self.batches = batches
        self.samples = samples
        self.left = tuple(left)

    @property
    def healthy(self) -> bool:
        """Whether no fault was found."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Return the findings, the metrics, and the gap of each channel of each layer."""
        return {
            "healthy": self.healthy,
            "summary": self.summary,
            "batches": self.batches,
            "samples": self.samples,
            "findings": [finding.to_dict() for finding in self.findings],
            "notes": [note.to_dict() for note in self.notes],
            "metrics": None if self.metrics is None else self.metrics.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "left": [{"name": left.name, "reason": left.reason} for left in self.left],
        }

    def document(self) -> Document:
        """Return the findings, the metric on three bases, and the gap of every layer and channel."""
        sections = [Section("Findings", self._findings())] if self.findings else []
        if self.notes:
            sections.append(Section("Worth knowing, and no fault", self._notes()))
        if self.metrics is not None:
            sections.append(Section("The metric", [self._facts(self.metrics)]))
        if self.layers:
            sections.append(Section("Layers, in order of execution", [self._plot(), self._table()]))
            sections.append(Section("Layer by channel", self._heat_maps()))
        if self.left:
            table = Table(("layer", "reason"), [(left.name, left.reason) for left in self.left])
            sections.append(Section("Not measured", [table]))
        return Document("Diagnose", self.summary, sections, "good" if self.healthy else "bad")

    @property
    def summary(self) -> str:
        """The result in one line."""
        seen = f"{_count(len(self.layers), 'norm')} on {_count(self.samples, 'sample')}"
        if self.healthy:
            if self.notes:
                return f"Nothing wrong found: {seen}; {', '.join(note.cause for note in self.notes)}."
            return f"Nothing found: {seen}; each norm meets what it has stored."
        first = self.findings[0]
        more = f" First of {len(self.findings)} findings." if len(self.findings) > 1 else ""
        return f"{_shown(first.layer)}: {first.cause} ({first.severity}).{more} {seen}."

    def _findings(self) -> list[Block]:
        rows = [
            (i, _shown(f.layer), len(f.layers), f.cause, f.severity, f.evidence) for i, f in enumerate(self.findings, 1)
        ]
        cures = [(i, f.cure, None if f.gain is None else str(f.gain)) for i, f in enumerate(self.findings, 1)]
        tones: dict[int, Tone] = {i: "bad" for i, f in enumerate(self.findings) if f.severity != "doubtful"}
        return [
            Table(
                ("", "first layer", "layers", "cause", "severity", "evidence"),
                rows,
                tones=tones,
                shown=range(len(rows)),
                optional=("layers",),
            ),
            Table(
                ("", "cure", "trial of it"),
                cures,
                shown=range(len(cures)),
                caption="A trial runs the model as the cure would leave it; nothing is written. Gap: mean over the "
                "norms of the distance between what they normalize by and what they meet, in standard deviations.",
            ),
        ]

    def _notes(self) -> list[Block]:
        rows = [(_shown(note.layer), len(note.layers), note.cause, note.evidence, note.cure) for note in self.notes]
        columns = ("first layer", "layers", "what", "evidence", "code")
        return [Table(columns, rows, shown=range(len(rows)), optional=("layers",))]

    def _facts(self, metrics: Metrics) -> Facts:
        return Facts(
            [
                ("on batch statistics, as in training", metrics.training),
                ("in eval mode, as it is", metrics.eval),
                ("after a trial recalibration, undone", metrics.recalibrated),
                ("more is better", _DIRECTIONS[metrics.higher_is_better]),
            ]
        )

    def _plot(self) -> Plot:
        many = len(self.layers) > _MOST_BARS
        names = [i if many else _shown(layer.name) for i, layer in enumerate(self.layers, 1)]
        style: Literal["line", "bar"] = "line" if many else "bar"
        series = {
            "in eval mode": [layer.deployed_distance for layer in self.layers],
            "its own": [layer.distance for layer in self.layers],
            "after a trial recalibration": [layer.recalibrated_distance for layer in self.layers],
        }
        return Plot(
            "How far each norm is from what it meets",
            "norm, by its number in the table" if many else "norm",
            "standard deviations",
            [Series(name, names, [min(v, _MOST) if v == v else _MOST for v in y], style) for name, y in series.items()],
            caption="In eval mode a layer inherits the errors of those before it; its own gap is measured with those "
            f"before it put right. Gaps beyond {_MOST:g}, and statistics that are not finite, are shown as {_MOST:g}.",
        )

    def _table(self) -> Table:
        rows = [
            (
                number,
                _shown(layer.name),
                _size(layer.distance),
                _size(layer.deployed_distance),
                _size(float(layer.mean_shift.abs().max())),
                f"{float(layer.variance_ratio.min()):.3g}\u00a0–\u00a0{float(layer.variance_ratio.max()):.3g}",
                _size(float(layer.kl.mean())),
                _size(layer.relative_error),
            )
            for number, layer in enumerate(self.layers, 1)
        ]
        columns = (
            "", "layer", "own gap", "gap in eval mode", "largest shift (σ)", "variance ratio", "mean KL",
            "error (σ)",
        )  # fmt: skip
        off = [row for row, layer in enumerate(self.layers) if layer.off]
        return Table(
            columns,
            rows,
            caption="Gaps in standard deviations of the typical channel. Mean shift, variance ratio and KL (nats) of "
            "the measured statistics from the stored ones, every earlier norm put right. Coloured: a fault of its own.",
            tones=dict.fromkeys(off, "bad"),
            shown=foremost([layer.distance for layer in self.layers], off),
            optional=("mean KL", "error (σ)", "variance ratio", "largest shift (σ)"),
        )

    def _heat_maps(self) -> list[Block]:
        tones: dict[int, Tone] = {i: "bad" for i, layer in enumerate(self.layers) if layer.off}
        shifts = [(_shown(layer.name), layer.mean_shift.tolist()) for layer in self.layers]
        ratios = [(_shown(layer.name), layer.variance_ratio.log2().tolist()) for layer in self.layers]
        return [
            HeatMap("Mean shift of each channel", shifts, 1.0, "σ", "", tones),
            HeatMap("Variance ratio of each channel, as a power of two", ratios, 2.0, "", _WIDE, tones),
        ]


_DIRECTIONS = {True: "yes", False: "no", None: "not known: the metric judges nothing"}
_MOST = 3.0
_MOST_BARS = 20
"""More norms than these are drawn as lines: bars, and names below them, would be too narrow to be told apart."""
_WIDE = (
    "One row a layer, in order of execution; its channels from left to right, over the whole width. Of many channels "
    "the strongest of neighbours is shown. Purple, or an exclamation mark: not finite."
)


def _shown(name: str) -> str:
    return name or "(the model)"


def _size(value: float) -> float | str:
    """Return the number, or that it is too small to matter."""
    return "<0.001" if value < 0.001 else float(f"{value:.3g}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
