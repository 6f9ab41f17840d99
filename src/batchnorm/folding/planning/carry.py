"""A norm's map, or its two parts, carried to the layers that absorb it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.norms import NormUse
from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.planning.absorbing_layer import AbsorbingLayer
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.plan import Part
from batchnorm.folding.planning.shared_memory import norm_input, require_not_written_into
from batchnorm.folding.planning.splits import Split
from batchnorm.travel.maps import Map
from batchnorm.travel.route import Route, carry_backward, carry_forward

__all__ = ["Carried", "carry"]


class Carried(NamedTuple):
    """Where a norm's map has gone: as in :class:`batchnorm.folding.planning.plan.Step`."""

    back: Part | None
    on: Part | None
    inverse: tuple[AbsorbingLayer, ...]
    crossed: frozenset[Value]


def carry(
    graph: Graph, use: NormUse, split: Split, parameters: Parameters, gone: Collection[Call], *, sharing: bool
) -> Carried:
    """Carry the parts of a norm's map back and on, and let layers absorb them.

    Args:
        graph: the dataflow.
        use: the norm.
        split: the parts.
        parameters: the parameters, which change.
        gone: calls of norms that have been taken away.
        sharing: whether other operators may read a value on the way back; they absorb the inverse then.

    Raises:
        Refusal: no layers can absorb a part.
    """
    is_gone, is_cut = gone.__contains__, split.before is not None and split.after is not None
    back, on = Route(), Route()
    if split.before is not None:
        read = [(norm_input(call), call, _shaped(split.before, call)) for call in use.calls]
        back = carry_backward(graph, read, parameters, is_gone, sharing=sharing)
    if is_cut:
        _require_not_crossed(back, (call.output for call in use.calls))
    before = parameters.absorb(back)
    if split.after is not None or back.shared:
        returned = [] if split.after is None else [(call, _shaped(split.after, call)) for call in use.calls]
        on = carry_forward(graph, returned, parameters, is_gone, back.shared)
    if back.shared:
        _require_not_crossed(on, back.crossed)
    if is_cut:
        _require_not_crossed(on, map(norm_input, use.calls))
    after = tuple(parameters.absorb(on))
    require_not_written_into(graph, use, gone)
    return Carried(
        None if split.before is None else Part(split.before, tuple(before)),
        None if split.after is None else Part(split.after, after),
        after if split.after is None else (),
        frozenset(back.crossed | on.crossed),
    )


def _require_not_crossed(route: Route, values: Iterable[Value]) -> None:
    """Refuse a route that comes back to where the other one is: one part would have to be crossed by the other."""
    if not route.crossed.isdisjoint(values):
        raise Refusal("Its output feeds back into its own input.")


def _shaped(map_: Map, call: Call) -> Map:
    """Return the map with the dimensions of what a call reads: calls of one norm may differ in them."""
    return Map.per_channel(map_.scale.reshape(-1), map_.shift.reshape(-1), len(call.output.shape))
