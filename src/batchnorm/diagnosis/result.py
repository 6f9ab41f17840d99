"""What a diagnosis found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from batchnorm.diagnosis.case import Severity
from batchnorm.diagnosis.gaps import LayerGap
from batchnorm.diagnosis.trial import Gain
from batchnorm.report import Document, Facts, Paragraph, Plot, Result, Section, Series, Table
from batchnorm.report.document import Block
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
            they may be right, and something is lost.
        evidence: the numbers it rests on, as a sentence.
        cure: a line of code, with ``batchnorm``, ``torch``, ``model`` and ``batches`` in scope.
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
    """

    training: float | None
    eval: float | None
    recalibrated: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the three numbers."""
        return {name: finite_or_none(value) for name, value in vars(self).items()}


class DiagnoseResult(Result):
    """What :func:`batchnorm.diagnosis.diagnose.diagnose` found.

    Attributes:
        findings: the faults: the fatal ones first, then in order of execution.
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
        self.findings = tuple(findings)
        self.layers = tuple(layers)
        self.metrics = metrics
        self.batches = batches
        self.samples = samples
        self.left = tuple(left)

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Return the findings, the metrics, and the gap of each channel of each layer."""
        return {
            "healthy": self.healthy,
            "summary": self._summary(),
            "batches": self.batches,
            "samples": self.samples,
            "findings": [finding.to_dict() for finding in self.findings],
            "metrics": None if self.metrics is None else self.metrics.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "left": [{"name": left.name, "reason": left.reason} for left in self.left],
        }

    def document(self) -> Document:
        """Return the findings, and the gap of each layer."""
        sections = [Section("Findings", self._findings())] if self.findings else []
        sections.append(Section("Layers, in order of execution", self._layers()))
        return Document("Diagnose", self._summary(), sections, "good" if self.healthy else "bad")

    def _summary(self) -> str:
        seen = f"{len(self.layers)} norm{'s' * (len(self.layers) != 1)} on {self.samples} samples"
        if self.healthy:
            return f"Nothing found: {seen}, each meets what it has stored."
        first = self.findings[0]
        more = f", and {len(self.findings) - 1} more" if len(self.findings) > 1 else ""
        return f"{first.layer or 'the model'}: {first.cause}{more} ({seen})."

    def _findings(self) -> list[Block]:
        rows = [
            (i, f.layer or "(the model)", f.cause, f.severity, f.evidence, str(f.gain) if f.gain else None)
            for i, f in enumerate(self.findings, 1)
        ]
        blocks: list[Block] = [Table(("", "layer", "cause", "severity", "evidence", "trial of the cure"), rows)]
        blocks += [Paragraph(f"{i}: {f.cure}") for i, f in enumerate(self.findings, 1)]
        return blocks

    def _layers(self) -> list[Block]:
        rows = [
            (layer.name or "(the model)", layer.off, layer.distance, layer.deployed_distance, layer.batches)
            for layer in self.layers
        ]
        blocks: list[Block] = [Table(("layer", "off", "own gap", "gap in eval mode", "batches"), rows)]
        if self.metrics is not None:
            blocks.insert(
                0,
                Facts(
                    [
                        ("on batch statistics", self.metrics.training),
                        ("in eval mode", self.metrics.eval),
                        ("after a trial recalibration", self.metrics.recalibrated),
                    ]
                ),
            )
        names = [layer.name for layer in self.layers]
        blocks.append(
            Plot(
                "Gap",
                "norm",
                "standard deviations",
                [
                    Series("its own", names, [layer.distance for layer in self.layers], "bar"),
                ],
            )
        )
        return blocks

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._summary()}>"
