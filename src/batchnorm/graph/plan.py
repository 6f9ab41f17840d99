"""Where each norm of a model can go: which way its map travels, and who absorbs it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.graph.affine import Affine
from batchnorm.graph.dataflow import Call, Graph, Value
from batchnorm.graph.fold_result import LeftNorm
from batchnorm.graph.hosts import Host
from batchnorm.graph.norms import NormState, NormUse, check_norm, norm_uses, require_no_alternative, unreached_norms
from batchnorm.graph.parameters import Parameters
from batchnorm.graph.refusal import Refusal
from batchnorm.graph.stand_in import StandIn
from batchnorm.graph.travel.maps import Map
from batchnorm.graph.travel.route import Route, carry_backward, carry_forward
from batchnorm.graph.travel.rules import place

if TYPE_CHECKING:
    from batchnorm.graph.leftover import Leftover

__all__ = ["Plan", "Step", "make_plan"]


@dataclass(frozen=True, eq=False)
class Step:
    """A norm that goes.

    Attributes:
        use: the norm.
        module: the qualified name of its module.
        stays: what stays of that.
        into: the modules that absorb it, those before it first.
        before: the part of its map that those before it absorb; None if they absorb nothing.
        after: the part that those after it absorb.
        crossed: the values between it and them, which change.
    """

    use: NormUse
    module: str
    stays: StandIn
    into: tuple[Host, ...]
    before: Map | None
    after: Map | None
    crossed: frozenset[Value]

    @property
    def name(self) -> str:
        """What a report calls the norm."""
        return self.use.name


@dataclass(eq=False)
class Plan:
    """What is to be done with a model.

    Attributes:
        graph: its dataflow.
        steps: the norms that go, in the order in which that was found.
        left: those that stay, each with the reason.
        parameters: what the parameters become.
        order: the place of each norm in the order of execution.
        with_borders: whether convolutions may pad with other values than zeros.
        obstacles: the operators that stand in the way of norms that stay, by the norm's name.
        leftovers: those of the norms left that become multiply-adds.
    """

    graph: Graph
    steps: list[Step]
    left: list[LeftNorm]
    parameters: Parameters
    order: dict[str, int]
    with_borders: bool = False
    obstacles: dict[str, tuple[Call, ...]] = field(default_factory=dict)
    leftovers: list[Leftover] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        """Whether there is anything to be done."""
        return bool(self.steps or self.leftovers)

    @property
    def replaced(self) -> list[str]:
        """The names of the norms' modules in whose place something else comes."""
        return [*(step.module for step in self.steps), *(item.module for item in self.leftovers)]

    @property
    def gone(self) -> set[Call]:
        """The calls of the norms that go."""
        return {call for step in self.steps for call in step.use.calls}


def make_plan(model: Module, graph: Graph, banned: Collection[str] = (), *, with_borders: bool = False) -> Plan:
    """Find out which norms can go, and where.

    Each is tried in the order of execution, in the ways of :func:`_ways`; norms that go make room for others, so that
    those that are left are tried again as long as one more goes.

    Args:
        model: the model; it is not changed.
        graph: its dataflow.
        banned: names of norms that are to stay.
        with_borders: whether convolutions may be made to pad with other values than zeros.
    """
    uses = norm_uses(model, graph)
    unreached = unreached_norms(model, uses)
    order = {name: i for i, name in reversed(list(enumerate([*(use.name for use in uses), *unreached])))}
    plan = Plan(graph, [], [], Parameters.of(model, graph), order, with_borders)
    waiting = [use for use in uses if use.name not in banned]
    while waiting:
        reasons: dict[str, LeftNorm] = {}
        before = len(plan.steps)
        for use in waiting:
            try:
                require_no_alternative(model, use.owner, unreached)
                plan.steps.append(_step(model, graph, use, plan))
            except Refusal as refusal:
                reasons[use.name] = LeftNorm(use.name, describe_source(graph, use), str(refusal))
                plan.obstacles[use.name] = refusal.calls
        waiting = [use for use in waiting if use.name in reasons]
        if len(plan.steps) == before or not waiting:
            plan.left += reasons.values()
            break
    plan.left += [LeftNorm(name, None, "The example inputs do not reach it.") for name in unreached]
    return plan


def _step(model: Module, graph: Graph, use: NormUse, plan: Plan) -> Step:
    state, stays = check_norm(graph, use)
    map_ = norm_map(plan.parameters, state)
    refusals: dict[str, Refusal] = {}  # by the way that was tried; of the ways of cutting it, all
    for with_borders, (before, after) in _attempts(map_, plan.with_borders):
        parameters = plan.parameters.copy()
        parameters.with_borders = with_borders
        try:
            hosts, crossed = _go(graph, use, before, after, parameters, plan)
        except Refusal as refusal:
            if after is None or before is None:
                refusals["back" if after is None else "on"] = refusal
            else:
                refusals.setdefault(str(refusal), refusal)
            continue
        plan.parameters = parameters
        return Step(use, use.calls[0].module, stays, tuple(hosts), before, after, frozenset(crossed))
    raise _refused(refusals.pop("back"), refusals.pop("on"), list(refusals.values()))


def _refused(back: Refusal, on: Refusal, cut: Sequence[Refusal]) -> Refusal:
    """Return in one why a norm cannot go either way, and why not in two parts, where that is another reason."""
    reason = f"{back} Nor can it go on: {_lower(str(on))}"
    new = next((refusal for refusal in cut if str(refusal) not in (str(back), str(on))), None)
    told = [back, on]
    if new is not None:
        reason += f" Nor can it be cut in two: {_lower(str(new))}"
        told.append(new)
    return Refusal(reason, calls=list(dict.fromkeys(call for refusal in told for call in refusal.calls)))


def _attempts(map_: Map, with_borders: bool) -> Iterator[tuple[bool, tuple[Map | None, Map | None]]]:
    """Yield all ways without borders, and after that, as they cost something, those with them."""
    yield from ((False, way) for way in _ways(map_))
    if with_borders:
        yield from ((True, way) for way in _ways(map_))


def _ways(map_: Map) -> Iterator[tuple[Map | None, Map | None]]:
    r"""Yield how a map can be cut into a part for the operators before the norm and one for those after it.

    All of it before; all of it after. Then, with s ≠ 0, the parts

    .. math::

        s x + t = s \left(x + \tfrac ts\right) = |s| \left(\operatorname{sign}(s)\, x + \tfrac t{|s|}\right)
        = (s x) + t

    of which a positive scale crosses a ReLU, and a shift crosses an addition. Both parts have to be absorbed: one that
    stays is a pass over memory as the whole is, and is none only if it is the identity, which is one of the first two.
    """
    scale, shift = map_.scale, map_.shift
    one, zero = torch.ones_like(scale), torch.zeros_like(shift)
    yield map_, None
    yield None, map_
    if map_.only_scales or map_.only_shifts:
        return
    if bool((scale != 0).all()):
        yield Map(one, shift / scale), Map(scale, zero)
        if bool((scale < 0).any()):
            yield Map(scale.sign(), shift / scale.abs()), Map(scale.abs(), zero)
    yield Map(scale, zero), Map(one, shift)


def _go(
    graph: Graph, use: NormUse, before: Map | None, after: Map | None, parameters: Parameters, plan: Plan
) -> tuple[list[Host], set[Value]]:
    gone = plan.gone
    hosts: list[Host] = []
    crossed: set[Value] = set()

    def take(route: Route, ends: Iterable[Value]) -> None:
        # cut in two, it would have to be crossed by the one part and by the other
        if before is not None and after is not None and any(value in route.crossed for value in ends):
            raise Refusal("It follows itself.")
        hosts.extend(parameters.absorb(route))
        crossed.update(route.crossed)

    if before is not None:
        start = [(_read(call), call, _shaped(before, call)) for call in use.calls]
        take(carry_backward(graph, start, parameters, gone.__contains__), (call.output for call in use.calls))
    if after is not None:
        results = [(call, _shaped(after, call)) for call in use.calls]
        take(carry_forward(graph, results, parameters, gone.__contains__), map(_read, use.calls))
    if before is None:
        _require_not_written_into(graph, use, gone)
    return sorted(dict.fromkeys(hosts), key=lambda host: host.calls[0].index), crossed


def _require_not_written_into(graph: Graph, use: NormUse, gone: Collection[Call]) -> None:
    """Without the norm, what is written into its output is written into its input, and what that is a view of."""
    for call in use.calls:
        writers = [c for value in _aliases(graph, call.output) for c in graph.readers(value) if c.writes_into(value)]
        if not writers:
            continue
        for value, reader in _same_memory(call, gone):
            others = graph.others_than(value, {id(reader), *(id(c) for c in use.calls)})
            if others or value.producer is None:
                who = others[0] if others else "the caller of the model, whose input it is"
                raise Refusal(f"{place(writers[0])} would write into what is also read by {who}.", calls=writers[:1])


def _same_memory(call: Call, gone: Collection[Call]) -> Iterator[tuple[Value, Call]]:
    """Yield what a call reads, and what that may share its memory with, from call to call before it; who reads each."""
    value = _read(call)
    yield value, call
    while (producer := value.producer) is not None and (producer in gone or _may_alias(producer)):
        read = producer.args.get("input", producer.args.get("self"))
        if not isinstance(read, Value):
            return
        value, call = read, producer
        yield value, call


def _aliases(graph: Graph, value: Value) -> Iterator[Value]:
    """Yield a value, and those that may be the same memory: what views and operators that hand it on make of it."""
    yield value
    for call in graph.readers(value):
        if _may_alias(call):
            for output in call.outputs:
                yield from _aliases(graph, output)


def _may_alias(call: Call) -> bool:
    return call.name in _MAY_ALIAS or call.op.is_view


_MAY_ALIAS = {"reshape", "contiguous", "flatten", "dropout", "feature_dropout", "to", "alias", "detach", "view_as"}


def _shaped(map_: Map, call: Call) -> Map:
    """Return the map with the dimensions of what a call reads: calls of one norm may differ in them."""
    return Map.per_channel(map_.scale.reshape(-1), map_.shift.reshape(-1), len(call.output.shape))


def _read(norm: Call) -> Value:
    value = norm.args.get("input")
    if not isinstance(value, Value):
        raise Refusal("Its input is not a tensor that the pass saw.")
    return value


def norm_map(parameters: Parameters, state: NormState) -> Map:
    """Return what a norm computes with its parameters as they are now.

    Raises:
        Refusal: its statistics are unusable.
    """
    mean, var, weight, bias = (
        None if name is None else parameters.named(name)
        for name in (state.running_mean, state.running_var, state.weight, state.bias)
    )
    for name, tensor in (("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.is_meta:
            raise Refusal(f"Its {name} is on the meta device, where tensors have no values.")
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise Refusal(f"Its {name} is not finite.")
    assert mean is not None
    assert var is not None
    lowest = float(var.min()) if var.numel() else 1.0
    if lowest < 0:
        raise Refusal(f"Its running_var is negative ({lowest:.3g}).")
    if lowest + state.eps <= 0:
        raise Refusal("Its running_var and eps are both 0, so it divides by zero.")
    affine = Affine.of_norm(mean, var, weight, bias, state.eps)
    return Map(_on_cpu(affine.scale), _on_cpu(affine.shift))


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _lower(sentence: str) -> str:
    """Return a sentence as the end of another: names keep their letters."""
    first, _, rest = sentence.partition(" ")
    return f"{first.lower() if first in _BEGINNINGS else first} {rest}"


_BEGINNINGS = {"It", "No", "Nobody", "The", "A", "An", "Those", "Its"}


def describe_source(graph: Graph, use: NormUse) -> str | None:
    """Return the module whose linear operator comes before the norm's first call, for the eye of a reader."""
    call: Call | None = use.calls[0]
    while call is not None:
        value = next((v for key in ("input", "self") if isinstance(v := call.args.get(key), Value)), None)
        call = None if value is None else value.producer
        weight = None if call is None else call.args.get("weight")
        if call is not None and isinstance(weight, Value) and call.name not in ("batch_norm", "prelu"):
            return weight.names[0].rpartition(".")[0] or None if weight.names else call.module or None
        if call is not None and len(list(call.tensor_args())) != 1:
            return None
    return None
