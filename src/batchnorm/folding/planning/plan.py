"""A plan: which norms of a model go, and which layers absorb them; which stay, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.norms import NormUse
from batchnorm.folding.planning.absorbing_layer import AbsorbingLayer
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.multiply_add import MultiplyAdd
from batchnorm.folding.planning.replacement import Replacement
from batchnorm.travel.maps import Map

__all__ = ["FoldPlan", "Options", "Part", "StayingNorm", "Step"]


@dataclass(frozen=True)
class Options:
    """What a fold may do; see :func:`batchnorm.fold` for the first three.

    Attributes:
        borders: whether convolutions may be made to pad with other values than zeros.
        keep_range: whether norms stay that would make weights too small for their type.
        fuse: whether norms that stay become multiply-adds.
        sharing: whether a map may cross values that other operators read, which take in its inverse.
        beside: whether operators may take in what norms do beside them.
    """

    borders: bool = False
    keep_range: bool = False
    fuse: bool = False
    sharing: bool = True
    beside: bool = True


@dataclass(frozen=True, eq=False)
class Part:
    """A part of what a norm computes, and the layers that absorb that part."""

    map: Map
    layers: tuple[AbsorbingLayer, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """A norm that goes.

    Attributes:
        use: the norm.
        module: the qualified name of its module.
        replacement: what takes the place of that.
        crossed: the values between the norm and the layers that absorb it, which change.
        back: the part of its map that layers before it absorb; None if there is none.
        on: the part that layers after it absorb.
        beside: what a layer adds that reads what the norm reads, where an identity stays in a sum with that layer.
        inverse: the layers that take in the inverse of the map, because they read a value that changes.
        sums: the sums of an identity and the layer beside it, whose values do not change.
    """

    use: NormUse
    module: str
    replacement: Replacement
    crossed: frozenset[Value]
    back: Part | None = None
    on: Part | None = None
    beside: Part | None = None
    inverse: tuple[AbsorbingLayer, ...] = ()
    sums: tuple[Call, ...] = ()

    @property
    def name(self) -> str:
        """What a report calls the norm."""
        return self.use.name

    @property
    def parts(self) -> list[Part]:
        """The parts that are absorbed."""
        return [part for part in (self.back, self.on, self.beside) if part is not None]

    @cached_property
    def into(self) -> tuple[AbsorbingLayer, ...]:
        """The layers that absorb something, each once, in the order of execution."""
        # a layer that absorbs something on both sides is there twice, the second time with its bias
        layers = {layer.name: layer for part in self.parts for layer in part.layers}
        layers |= {layer.name: layer for layer in self.inverse}
        return tuple(sorted(layers.values(), key=lambda layer: layer.calls[0].index))

    def of_run(self, run: int) -> Step:
        """Return the same with the calls of one of several runs; if it reaches the norm."""
        calls = _of_run(self.use.calls, run)
        if not calls:
            return self

        def of_part(part: Part | None) -> Part | None:
            return None if part is None else replace(part, layers=_layers_of_run(part.layers, run))

        return Step(
            replace(self.use, calls=calls),
            self.module,
            self.replacement,
            frozenset(v for v in self.crossed if v.producer is not None and v.producer.run == run),
            of_part(self.back),
            of_part(self.on),
            of_part(self.beside),
            _layers_of_run(self.inverse, run),
            _of_run(self.sums, run),
        )


def _of_run(calls: Iterable[Call], run: int) -> tuple[Call, ...]:
    return tuple(call for call in calls if call.run == run)


def _layers_of_run(layers: Iterable[AbsorbingLayer], run: int) -> tuple[AbsorbingLayer, ...]:
    of_run = (replace(layer, calls=_of_run(layer.calls, run)) for layer in layers)
    return tuple(layer for layer in of_run if layer.calls)


@dataclass(frozen=True)
class StayingNorm:
    """A norm that stays.

    Attributes:
        name: what a report calls it.
        source: the module whose linear operator comes before it; None if there is none.
        reason: why it stays, as a sentence.
        obstacles: the operators that stand in its way.
    """

    name: str
    source: str | None
    reason: str
    obstacles: tuple[Call, ...] = ()


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """What is to be done with a model.

    Attributes:
        graph: its dataflow.
        options: what was allowed.
        uses: the norms that run, in the order of execution.
        unreached: names of the norms that do not run.
        parameters: what the parameters become.
        steps: the norms that go, in the order in which that was found.
        staying: those that stay, each with the reason.
        multiply_adds: those of them that become multiply-adds.
    """

    graph: Graph
    options: Options
    uses: tuple[NormUse, ...]
    unreached: tuple[str, ...]
    parameters: Parameters
    steps: tuple[Step, ...]
    staying: tuple[StayingNorm, ...]
    multiply_adds: tuple[MultiplyAdd, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether there is anything to be done."""
        return bool(self.steps or self.multiply_adds)

    @cached_property
    def order(self) -> dict[str, int]:
        """The place of each norm in the order of execution, by its name; those that do not run come last."""
        names = dict.fromkeys([*(use.name for use in self.uses), *self.unreached])
        return {name: place for place, name in enumerate(names)}

    @cached_property
    def gone(self) -> set[Call]:
        """The calls of the norms that go."""
        return {call for step in self.steps for call in step.use.calls}

    def of_run(self, run: int) -> FoldPlan:
        """Return the same with what one of several runs shows; of a norm that it does not reach, what all show."""
        return replace(
            self,
            graph=self.graph.of_run(run),
            steps=tuple(step.of_run(run) for step in self.steps),
            staying=tuple(replace(norm, obstacles=_of_run(norm.obstacles, run)) for norm in self.staying),
        )
