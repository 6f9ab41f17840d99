"""Everything that a cause may look at: the model, what was measured, and what is explained already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch.nn import Module

from batchnorm.diagnosis.gaps import Gaps, LayerGap, measure
from batchnorm.diagnosis.goal import Goal
from batchnorm.diagnosis.norm_record import Basis
from batchnorm.diagnosis.passes import Passes
from batchnorm.statistics.sites import Sites

__all__ = ["SMALL", "Case", "Remedy", "Severity", "Suspicion"]

Severity: TypeAlias = Literal["fatal", "wrong", "doubtful", "note"]
"""``"fatal"``: outputs are not finite or mean nothing. ``"wrong"``: they are other than they should be.
``"doubtful"``: they may be right, and something is lost. ``"note"``: worth knowing, and no fault."""


@dataclass(frozen=True, eq=False)
class Remedy:
    """One way to cure a fault.

    Attributes:
        code: a line of code, with ``batchnorm``, ``torch``, ``model`` and ``batches`` in scope.
        trial: what the norms would normalize by once it is done; None where only training or code can cure it.
        change: what it does to a batch before the model is given it; None if nothing.
    """

    code: str
    trial: Basis | None = None
    change: Callable[[Any], Any] | None = None


@dataclass(frozen=True, eq=False)
class Suspicion:
    """What a cause found, before anybody has tried its cure.

    Attributes:
        layers: names of the layers that have the fault, in order of execution.
        evidence: the numbers it rests on, as a sentence.
        cure: a line of code, with ``model`` and ``batches`` in scope.
        trial: what the norms would normalize by once it is cured; None where only training or code can cure it.
        severity: if it is another than the cause usually has.
        change: what the cure does to a batch before the model is given it; None if nothing.
        others: other cures, for where a trial condemns the first.
        certain: it is told of a model that no cure makes better than chance, too.
    """

    layers: Sequence[str]
    evidence: str
    cure: str
    trial: Basis | None = None
    severity: Severity | None = None
    change: Callable[[Any], Any] | None = None
    others: Sequence[Remedy] = ()
    certain: bool = False

    @property
    def remedies(self) -> list[Remedy]:
        """All cures, the one to be preferred first."""
        return [Remedy(self.cure, self.trial, self.change), *self.others]


@dataclass(eq=False)
class Case:
    """One model under diagnosis; causes take layers off the list of what is not explained.

    Attributes:
        model: the model, in eval mode by now.
        was_training: whether its user had it in train mode.
        modes: the mode in which each module came, by its name.
        sites: its norms.
        passes: runs it again on another basis.
        gaps: what was measured.
        home: training batches, if any were given.
        frozen: how the user froze norms, by their names.
        goal: compares runs by the metric.
        explained: names of the layers whose gap has a cause.
        aside: names of the layers at which the evidence excludes the cause that is looked for just now.
        harmless: names of the layers with a gap that is no fault by the metric.
        hopeful: the model is at chance by the metric, and there is a cure for that.
    """

    model: Module
    was_training: bool
    modes: Mapping[str, bool]
    sites: Sites
    passes: Passes
    gaps: Gaps
    home: Sequence[Any] | None
    frozen: Mapping[str, str]
    goal: Goal
    explained: set[str] = field(default_factory=set)
    aside: frozenset[str] = frozenset()
    harmless: set[str] = field(default_factory=set)
    hopeful: bool = False

    @property
    def layers(self) -> tuple[LayerGap, ...]:
        """The norms in order of execution."""
        return self.gaps.layers

    @property
    def off(self) -> list[LayerGap]:
        """The norms whose statistics are wrong by a fault of their own that no cause has explained yet."""
        return [layer for layer in self.left if layer.off]

    @property
    def left(self) -> list[LayerGap]:
        """The norms that no cause has explained yet, without those at which the evidence excludes this one."""
        return [layer for layer in self.layers if layer.name not in self.explained | self.aside]

    @cached_property
    def fitting_home(self) -> frozenset[str]:
        """Names of the norms whose statistics fit the training batches: the data changed there, not the model."""
        if self.home is None or not any(layer.off for layer in self.layers):
            return frozenset()
        return frozenset(layer.name for layer in self.layers if self.fits_home(layer))

    @cached_property
    def lived_with(self) -> frozenset[str]:
        """Names of the frozen norms that are off: the weights were trained with what they store, for all one sees."""
        if self.goal.known and not self.goal.eval_is_as_good:
            return frozenset()
        frozen = {layer.name for layer in self.layers if layer.off and self.why_frozen(layer)}
        return frozenset(frozen) - self.fitting_home

    @cached_property
    def n_averaged(self) -> int | None:
        """How many models the weights are an average of, where a buffer counts them; None where none does."""
        counters = [b for name, b in self.model.named_buffers() if name.rpartition(".")[2] == "n_averaged"]
        return int(counters[0]) if counters else None

    @cached_property
    def at_home(self) -> Gaps | None:
        """What the norms meet on the training batches; measured when first asked for, None if there are none."""
        return None if self.home is None else measure(self.passes.over(self.home))

    def fits_home(self, layer: LayerGap) -> bool:
        """Return whether the statistics fit the training batches: then the data changed, not the model."""
        home = () if self.at_home is None else self.at_home.layers
        return any(one.name == layer.name and not one.off and 2 * one.excess() < layer.excess() for one in home)

    def everywhere(self, found: Sequence[LayerGap]) -> list[LayerGap]:
        """Return the layers that have a fault of the whole model: if most have a gap, those whose gap is small too."""
        if 2 * len(found) <= len(self.layers):
            return list(found)
        return [layer for layer in self.layers if layer in found or (layer in self.left and layer.excess() > SMALL)]

    def why_frozen(self, layer: LayerGap) -> str:
        """Return how the user froze a norm, as the end of a sentence; ``""`` if not at all."""
        return self.frozen.get(layer.name, "")

    def corrected(self, layers: Sequence[LayerGap]) -> Basis:
        """Return the basis on which these layers have their population statistics, and the others what they stored."""
        return Basis("stored", {layer.site: self.gaps.population[layer.site] for layer in layers})

    def recalibrate(self, layers: Sequence[LayerGap], batches: str = "batches") -> str:
        """Return the line of code that gives these layers their population statistics."""
        if len(layers) == len(self.layers) and not any(map(self.why_frozen, layers)):
            return f"batchnorm.recalibrate(model, {batches})"
        if len(layers) == len(self.layers) or len(layers) > _MOST_NAMES:
            return f'batchnorm.recalibrate(model, {batches}, names="*")'
        return f"batchnorm.recalibrate(model, {batches}, names={[layer.name for layer in layers]!r})"


SMALL = 0.05
"""A gap that counts where the fault is known to be the whole model's, in standard deviations."""

_MOST_NAMES = 12
