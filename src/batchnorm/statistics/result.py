"""What a recalibration did, layer by layer, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.report import Document, Paragraph, Result, Section, Table
from batchnorm.report.document import Block
from batchnorm.report.result import finite_or_none
from batchnorm.statistics.buffers import write_all
from batchnorm.statistics.sites import Left

__all__ = ["LayerStatistics", "RecalibrateResult", "Written"]


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
        }


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
        estimator: ``"pooled"`` or ``"within"``.
        batches: how many batches the stream held.
        layers: the norms that were recalibrated.
        left: the norms that were not, each with the reason.
    """

    def __init__(
        self,
        estimator: str,
        batches: int,
        layers: Sequence[LayerStatistics],
        left: Sequence[Left],
        written: Sequence[Written],
    ) -> None:
        self.estimator = estimator
        self.batches = batches
        self.layers = tuple(layers)
        self.left = tuple(left)
        self._written: Sequence[Written] | None = written

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
        write_all(changes)
        self._written = None

    def document(self) -> Document:
        """Return one row a norm: what it met, and how far its statistics moved."""
        blocks: list[Block] = [Paragraph("No norm was called.", "bad")]
        if self.layers:
            blocks = [_layer_table([layer.to_dict() for layer in self.layers])]
        singles = sum(layer.single_calls for layer in self.layers)
        if singles:
            calls = "1 call" if singles == 1 else f"{singles} calls"
            blocks.append(Paragraph(f"{calls} brought a single value per channel, which has no variance of its own."))
        sections = [Section("", blocks)]
        if self.left:
            table = Table(("layer", "reason"), [(left.name, left.reason) for left in self.left])
            sections.append(Section("Left as they were", [table]))
        summary = (
            f"{len(self.layers)} norm{'s' * (len(self.layers) != 1)} measured on {self.batches} "
            f"batch{'es' * (self.batches != 1)}, {self.estimator} estimate; {len(self.left)} left as they were."
        )
        return Document("Recalibrate", summary, sections)

    def to_dict(self) -> dict[str, Any]:
        """Return the estimator, the number of batches, the layers and those left."""
        return {
            "estimator": self.estimator,
            "batches": self.batches,
            "layers": [layer.to_dict() for layer in self.layers],
            "left": [{"name": left.name, "reason": left.reason} for left in self.left],
        }

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.document().summary}>"


def _layer_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = {
        "name": "layer",
        "batches": "batches",
        "values": "values per channel",
        "largest_mean_shift": "largest mean shift (σ)",
        "smallest_variance_ratio": "smallest variance ratio",
        "largest_variance_ratio": "largest variance ratio",
    }
    caption = "Mean shift in standard deviations of the new statistics; variance ratio new to old; over the channels."
    return Table(tuple(columns.values()), [tuple(row[key] for key in columns) for row in rows], caption=caption)
