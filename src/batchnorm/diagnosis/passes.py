"""One pass after the other over the same batches, each on another basis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from batchnorm.diagnosis.norm_record import Basis, NormRecord, NormRecorder
from batchnorm.diagnosis.readings import Measure, Reader, Reading
from batchnorm.errors import StateError
from batchnorm.models.calling import Forward
from batchnorm.statistics.collect import OnBatch
from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.failures import explained
from batchnorm.statistics.operators import NormCall
from batchnorm.statistics.sites import Site, Sites

__all__ = ["Pass", "Passes"]

_GROUPS = 32
"""Standard errors come from about so many groups of samples."""


@dataclass(frozen=True)
class Pass:
    """What came of one pass.

    Attributes:
        records: what each norm met, in order of execution.
        metric: the mean over all samples; None if no metric is given.
        readings: the metric of each batch.
    """

    records: dict[Site, NormRecord]
    metric: float | None
    readings: tuple[Reading, ...] = ()


class Passes:
    """Runs a model over batches, on any basis.

    Args:
        model: the model, which the caller has set aside and will restore.
        sites: its norms.
        batches: kept batches.
        forward: how the model is called on one.
        metric: from output and batch to a number; None if there is none.
        advance: called after each batch.
    """

    def __init__(
        self,
        model: Module,
        sites: Sites,
        batches: Sequence[Any],
        forward: Forward,
        metric: Measure | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.sites = sites
        self.batches = batches
        self.forward = forward
        self._metric = metric
        self.advance = advance

    def over(self, batches: Sequence[Any], *, measured: bool = False) -> Passes:
        """Return the same over other batches; without a metric, unless these are ``measured`` by it, too."""
        return Passes(self.model, self.sites, batches, self.forward, self._metric if measured else None, self.advance)

    def run(self, basis: Basis, *, tolerant: bool = False) -> Pass:
        """Run the model once over all batches.

        Raises:
            ArgumentTypeError: a batch, or the metric, is of a type that cannot be used.
            BatchError: the model or the metric failed.
            NonFiniteError: a norm met NaN or infinity, unless ``tolerant``.
        """
        groups = max(1, _GROUPS // len(self.batches))
        collector = NormRecorder(self.sites, basis, groups_a_batch=groups, tolerant=tolerant)
        reader = None if self._metric is None else Reader(self._metric)
        for index, batch in enumerate(self.batches):
            output = self._call(collector, index, batch)
            if reader is not None:
                reader.take(output, batch, index)
            self.advance()
        if reader is None:
            return Pass(collector.records, None)
        return Pass(collector.records, reader.mean, tuple(reader.readings))

    def outputs(self, batch: Any) -> Any:
        """Call the model on one batch, as it is, and return what it gives."""
        return self.forward(self.model, batch)

    def input_of(self, site: Site, batch: Any) -> Tensor:
        """Return what the norm is given in its first call on a batch, on batch statistics; the rest is not run."""
        seen = _Input(self.sites, site)
        seen.run(0, lambda: self.forward(self.model, batch))
        if seen.input is None:
            raise StateError(f"{site.name} was not called.")
        return seen.input

    def _call(self, collector: NormRecorder, index: int, batch: Any) -> Any:
        outputs: list[Any] = []
        try:
            collector.run(index, lambda: outputs.append(self.forward(self.model, batch)))
        except Exception as error:
            raise explained("diagnose", error, self.model, index, batch, self.forward) from error
        return outputs[0]


class _Input(OnBatch):
    """Takes the input of one norm, and ends the pass there."""

    def __init__(self, sites: Sites, site: Site) -> None:
        super().__init__(sites, Pooled)
        self.input: Tensor | None = None
        self._site = site

    def run(self, batch: int, call: Callable[[], Any]) -> None:
        try:
            super().run(batch, call)
        except Exception:
            # a scripted module turns the end of the pass into an error of its own
            if self.input is None:
                raise

    def _measure(self, site: Site, call: NormCall) -> Any:
        if site is self._site:
            self.input = call.input.detach()
            raise StateError("seen")
        return super()._measure(site, call)
