"""What a recalibration did, layer by layer, and the way back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.models.transaction import on_failure, transaction
from batchnorm.report import Document, Paragraph, Result, Section, Table, foremost
from batchnorm.report.document import Block
from batchnorm.report.result import finite_or_none
from batchnorm.statistics.buffers import write_all
from batchnorm.statistics.outcome import Outcome
from batchnorm.statistics.population import Population
from batchnorm.statistics.sites import Left

__all__ = ["LayerStatistics", "MeasurementPlan", "RecalibrateResult", "Written"]


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    r"""The statistics of one norm before and after.

    Attributes:
        name: the norm's name; ``""`` if the model itself is the norm.
        batches: how many batches the norm met.
        calls: how often it was called on them.
        values: how many values per channel it met (the fewest, where a mask makes them differ).
        single_calls: how many calls brought a single value per channel.
        eps: what the norm adds to the variance.
        mean_before: its running mean before, (C,).
        variance_before: its running variance before, (C,), unbiased by PyTorch's convention.
        mean_after: its running mean now, as stored, (C,).
        variance_after: its running variance now, as stored, (C,): unbiased (divisor n − 1; for ``"within"``, the mean
            of variances with divisor m − 1).
        uncertainty: how far they may be off, (C,): the standard error of the mean in standard deviations, or that of
            the variance relative to itself, whichever is larger; infinite where there was one batch only.
    """

    name: str
    batches: int
    calls: int
    values: int
    single_calls: int
    eps: float
    mean_before: Tensor
    variance_before: Tensor
    mean_after: Tensor
    variance_after: Tensor
    uncertainty: Tensor

    @property
    def overall_uncertainty(self) -> float:
        """The root mean square of the uncertainty over the channels."""
        return float(self.uncertainty.square().mean().sqrt())

    @property
    def mean_shift(self) -> Tensor:
        """(mean after − mean before) / √(variance after + ε): in standard deviations as inference uses them, (C,)."""
        return (self.mean_after.double() - self.mean_before.double()) / (self.variance_after.double() + self.eps).sqrt()

    @property
    def variance_ratio(self) -> Tensor:
        """(variance after + ε) / (variance before + ε), (C,)."""
        return (self.variance_after.double() + self.eps) / (self.variance_before.double() + self.eps)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the extremes over the channels; None where the old statistics were not finite."""
        ratio = self.variance_ratio
        return {
            "name": self.name,
            "batches": self.batches,
            "calls": self.calls,
            "values": self.values,
            "single_calls": self.single_calls,
            "largest_mean_shift": finite_or_none(float(self.mean_shift.abs().max())),
            "smallest_variance_ratio": finite_or_none(float(ratio.min())),
            "largest_variance_ratio": finite_or_none(float(ratio.max())),
            "uncertainty": finite_or_none(self.overall_uncertainty),
        }


@dataclass(frozen=True)
class MeasurementPlan:
    """How the statistics were asked for.

    Attributes:
        order: ``"sequential"`` or ``"parallel"``.
        estimator: ``"pooled"`` or ``"within"``.
        tolerance: the uncertainty that was asked for, or None.
        processes: how many measured together.
    """

    order: str
    estimator: str
    tolerance: float | None
    processes: int


@dataclass(frozen=True, eq=False)
class Written:
    """One buffer that was written: where it lives and what it held."""

    name: str
    owner: Module
    key: str
    before: Tensor


class RecalibrateResult(Result):
    """What :func:`batchnorm.statistics.recalibrate.recalibrate` measured and wrote.

    Attributes:
        order: ``"sequential"`` or ``"parallel"``.
        estimator: ``"pooled"`` or ``"within"``.
        processes: how many processes measured together.
        tolerance: the uncertainty that was asked for, or None.
        batches: how many batches were used, in all processes.
        needed: how many it takes to reach the tolerance, by the law of 1/√n; None without one, or if nothing is known.
        layers: the norms that were recalibrated.
        left: the norms that were not, each with the reason.
        notes: what else there is to know.
        population: the moments and their sampling errors, to be kept beside the model.
    """

    def __init__(
        self,
        plan: MeasurementPlan,
        outcome: Outcome,
        layers: Sequence[LayerStatistics],
        left: Sequence[Left],
        written: Sequence[Written],
        population: Population,
    ) -> None:
        self.order = plan.order
        self.estimator = plan.estimator
        self.processes = plan.processes
        self.tolerance = plan.tolerance
        self.batches = outcome.batches
        self.needed = None if plan.tolerance is None else outcome.needed(plan.tolerance)
        self.layers = tuple(layers)
        self.left = tuple(left)
        self.notes = outcome.notes
        self.population = population
        self._written: Sequence[Written] | None = written

    @classmethod
    def of_nothing(cls, plan: MeasurementPlan) -> RecalibrateResult:
        """Return the result for a model that has nothing to measure."""
        return cls(plan, Outcome({}, 0), (), (), (), Population({}))

    def least_certain(self, number: int = 3) -> tuple[LayerStatistics, ...]:
        """Return the layers whose statistics are the least certain, the worst first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.overall_uncertainty, reverse=True)[:number])

    @transaction("undo", lambda result: (item.owner for item in result._written or ()))
    def undo(self) -> None:
        """Give every buffer that was written the value it had before, bit for bit, whatever happened to it since.

        A model that was moved to another device or cast in between gets the old values there, cast as it was.

        Raises:
            StateError: it was undone already, or a buffer is gone or of another size now; nothing is changed then.
        """
        if self._written is None:
            raise StateError("undo: this recalibration was already undone.")
        changes: list[tuple[Tensor, Tensor]] = []
        for item in self._written:
            buffer = getattr(item.owner, item.key, None)
            if not isinstance(buffer, Tensor) or buffer.shape != item.before.shape:
                now = tuple(buffer.shape) if isinstance(buffer, Tensor) else "no tensor"
                raise StateError(
                    f"undo: {item.name} held {tuple(item.before.shape)} values when it was recalibrated and is {now} "
                    "now; the layer was rebuilt since. Load the statistics from a checkpoint instead."
                )
            changes.append((buffer, item.before))
        on_failure(partial(setattr, self, "_written", self._written))
        write_all(changes)
        self._written = None

    def document(self) -> Document:
        """Return one row a norm: what it met, how far its statistics moved, and how sure they are."""
        blocks: list[Block] = [Paragraph("No norm was called.", "bad")]
        if self.layers:
            blocks = [_layer_table([layer.to_dict() for layer in self.layers]), Paragraph(self._certainty())]
        singles = sum(layer.single_calls for layer in self.layers)
        if singles:
            calls = "1 call" if singles == 1 else f"{singles} calls"
            blocks.append(Paragraph(f"{calls} brought a single value per channel, which has no variance of its own."))
        blocks += [Paragraph(note) for note in self.notes]
        sections = [Section("", blocks)]
        if self.left:
            table = Table(("layer", "reason"), [(left.name, left.reason) for left in self.left])
            sections.append(Section("Left as they were", [table]))
        together = f" in {self.processes} processes" if self.processes > 1 else ""
        summary = (
            f"{len(self.layers)} norm{'s' * (len(self.layers) != 1)} measured on {self.batches} "
            f"batch{'es' * (self.batches != 1)}{together}, {self.order} order, {self.estimator} estimate; "
            f"{len(self.left)} left as they were."
        )
        return Document("Recalibrate", summary, sections)

    def _certainty(self) -> str:
        """Say how sure the statistics are, and whether that is enough."""
        worst = self.least_certain()
        largest = worst[0].overall_uncertainty
        if not math.isfinite(largest):
            return "How sure this is cannot be told from a single batch."
        names = ", ".join(f"{layer.name or 'the model'} ({layer.overall_uncertainty:.2g})" for layer in worst)
        text = f"Least certain: {names}, in standard deviations."
        if self.tolerance is None:
            return text
        met = "reached" if largest <= self.tolerance else "not reached, for the stream ended"
        return f"{text} Tolerance {self.tolerance:g} {met}: {self.batches} batches used, about {self.needed} needed."

    def to_dict(self) -> dict[str, Any]:
        """Return how it was measured, the number of batches, the layers and those left."""
        return {
            "order": self.order,
            "estimator": self.estimator,
            "processes": self.processes,
            "tolerance": self.tolerance,
            "batches": self.batches,
            "needed": self.needed,
            "layers": [layer.to_dict() for layer in self.layers],
            "left": [{"name": left.name, "reason": left.reason} for left in self.left],
            "notes": list(self.notes),
        }


def _layer_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = {
        "name": "layer",
        "batches": "batches",
        "values": "values per channel",
        "largest_mean_shift": "largest mean shift (σ)",
        "smallest_variance_ratio": "smallest variance ratio",
        "largest_variance_ratio": "largest variance ratio",
        "uncertainty": "uncertainty",
    }
    caption = (
        "Mean shift in standard deviations of the new statistics; variance ratio new to old; over the channels. "
        "Uncertainty: the standard error of the mean in standard deviations, or of the variance relative to itself, "
        "whichever is larger; root mean square over the channels."
    )
    return Table(
        tuple(columns.values()),
        [tuple(row[key] for key in columns) for row in rows],
        caption=caption,
        shown=foremost([math.inf if row["largest_mean_shift"] is None else row["largest_mean_shift"] for row in rows]),
        optional=("values per channel", "batches"),
    )
