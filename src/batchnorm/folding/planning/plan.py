"""Where each norm of a model can go: which way its map travels, and who absorbs it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from torch.nn import Module

from batchnorm.absorbers.table import absorber_of
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.norms import NormUse, is_norm, norm_uses, require_no_alternative, unreached_norms
from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.planning.absorbing_layer import AbsorbingLayer
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.outcome import LeftNorm
from batchnorm.folding.planning.parallel import find_beside
from batchnorm.folding.planning.removable_norm import NormState, check_norm
from batchnorm.folding.planning.replacement import Replacement
from batchnorm.folding.planning.shared_memory import norm_input, require_not_written_into
from batchnorm.folding.planning.splits import attempts, norm_map
from batchnorm.travel.maps import Map
from batchnorm.travel.route import Route, carry_backward, carry_forward

if TYPE_CHECKING:
    from batchnorm.folding.planning.multiply_add import MultiplyAdd

__all__ = ["FoldPlan", "Step", "make_plan"]


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
        inverse_absorbers: names of those who take in the inverse, because they read a value that changes.
        beside: what one of them adds that reads what the norm reads, where an identity stays in a sum with it.
        sums: those sums, whose values do not change.
    """

    use: NormUse
    module: str
    stays: Replacement
    into: tuple[AbsorbingLayer, ...]
    before: Map | None
    after: Map | None
    crossed: frozenset[Value]
    inverse_absorbers: frozenset[str] = frozenset()
    beside: Map | None = None
    sums: tuple[Call, ...] = ()

    @property
    def name(self) -> str:
        """What a report calls the norm."""
        return self.use.name

    def of_run(self, run: int) -> Step:
        """Return the same with the calls of one of several runs; if it reaches the norm."""
        calls = tuple(call for call in self.use.calls if call.run == run)
        if not calls:
            return self
        into = (replace(absorber, calls=tuple(c for c in absorber.calls if c.run == run)) for absorber in self.into)
        crossed = frozenset(v for v in self.crossed if v.producer is not None and v.producer.run == run)
        return replace(
            self,
            use=replace(self.use, calls=calls),
            into=tuple(h for h in into if h.calls),
            crossed=crossed,
            sums=tuple(call for call in self.sums if call.run == run),
        )


@dataclass(eq=False)
class FoldPlan:
    """What is to be done with a model.

    Attributes:
        graph: its dataflow.
        steps: the norms that go, in the order in which that was found.
        left: those that stay, each with the reason.
        parameters: what the parameters become.
        order: the place of each norm in the order of execution.
        with_borders: whether convolutions may pad with other values than zeros.
        obstacles: the operators that stand in the way of norms that stay, by the norm's name.
        sharing: whether a map may cross values that others read, who take in its inverse.
        beside: whether operators may take in what norms do beside them.
        multiply_adds: those of the norms left that become multiply-adds.
    """

    graph: Graph
    steps: list[Step]
    left: list[LeftNorm]
    parameters: Parameters
    order: dict[str, int]
    with_borders: bool = False
    obstacles: dict[str, tuple[Call, ...]] = field(default_factory=dict)
    sharing: bool = True
    beside: bool = True
    multiply_adds: list[MultiplyAdd] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        """Whether there is anything to be done."""
        return bool(self.steps or self.multiply_adds)

    def of_run(self, run: int) -> FoldPlan:
        """Return the same with what one of several runs shows; of a norm that it does not reach, what all show."""
        return replace(
            self,
            graph=self.graph.of_run(run),
            steps=[step.of_run(run) for step in self.steps],
            obstacles={
                name: tuple(call for call in calls if call.run == run) for name, calls in self.obstacles.items()
            },
        )

    @property
    def gone(self) -> set[Call]:
        """The calls of the norms that go."""
        return {call for step in self.steps for call in step.use.calls}


def make_plan(
    model: Module,
    graph: Graph,
    banned: Collection[str] = (),
    *,
    with_borders: bool = False,
    sharing: bool = True,
    beside: bool = True,
) -> FoldPlan:
    """Find out which norms can go, and where.

    Each is tried in the order of execution, in the ways of :mod:`batchnorm.folding.planning.splits`; norms that go make
    room for others, so that those that are left are tried again as long as one more goes. What is left then is tried
    with what stands beside it (:mod:`batchnorm.folding.planning.parallel`), and after that with values that others read
    too: they take in the inverse of what the norm was.

    Args:
        model: the model; it is not changed.
        graph: its dataflow.
        banned: names of norms that are to stay.
        with_borders: whether convolutions may be made to pad with other values than zeros.
        sharing: whether a map may cross values that others read.
        beside: whether operators may take in what norms do beside them.
    """
    uses = norm_uses(model, graph)
    unreached = unreached_norms(model, uses)
    order = {name: i for i, name in reversed(list(enumerate([*(use.name for use in uses), *unreached])))}
    plan = FoldPlan(graph, [], [], Parameters.of(model, graph), order, with_borders, sharing=sharing, beside=beside)
    waiting = [use for use in uses if use.name not in banned]
    reasons: dict[str, LeftNorm] = {}
    stages = [_step, *[_step_beside] * beside, *[_step_sharing] * sharing]
    stage = 0
    while waiting and stage < len(stages):
        before = len(plan.steps)
        for use in waiting:
            try:
                require_no_alternative(model, use.owner, unreached)
                plan.steps.append(stages[stage](model, graph, use, plan))
                reasons.pop(use.name, None)
            except Refusal as refusal:
                if stage and use.name in reasons:  # told already
                    _add_to(reasons, use.name, plan, refusal)
                    continue
                reasons[use.name] = LeftNorm(use.name, describe_source(graph, use), str(refusal))
                plan.obstacles[use.name] = refusal.calls
        waiting = [use for use in waiting if use.name in reasons]
        # what has gone beside something else may have made room for others to go their own way
        stage = stage + 1 if len(plan.steps) == before else 0 if stages[stage] is _step_beside else stage
    plan.left += [LeftNorm(name, None, "The example inputs do not reach it.") for name in unreached]
    plan.left[:0] = reasons.values()
    return plan


def _step_sharing(model: Module, graph: Graph, use: NormUse, plan: FoldPlan) -> Step:
    return _step(model, graph, use, plan, sharing=True)


def _step(model: Module, graph: Graph, use: NormUse, plan: FoldPlan, sharing: bool = False) -> Step:
    state, stays = check_norm(graph, use)
    map_ = norm_map(plan.parameters, state)
    if sharing:
        _require_recoverable(plan, use, state)
    refusals: dict[str, Refusal] = {}  # by the way that was tried; of the ways of cutting it, all
    for with_borders, (before, after) in attempts(map_, plan.with_borders):
        parameters = plan.parameters.copy()
        parameters.with_borders = with_borders
        try:
            ends = _go(graph, use, before, after, parameters, plan, sharing)
        except Refusal as refusal:
            if after is None or before is None:
                refusals["back" if after is None else "on"] = refusal
            else:
                refusals.setdefault(str(refusal), refusal)
            continue
        plan.parameters = parameters
        return Step(
            use, use.calls[0].module, stays, ends.absorbers, before, after, ends.crossed, ends.inverse_absorbers
        )
    raise _refused(refusals.pop("back"), refusals.pop("on"), list(refusals.values()))


def _step_beside(model: Module, graph: Graph, use: NormUse, plan: FoldPlan) -> Step:
    state, stays = check_norm(graph, use)
    gone = plan.gone
    refusal = Refusal("")
    for found in find_beside(graph, use, norm_map(plan.parameters, state), plan.parameters, gone.__contains__):
        try:
            if isinstance(found, Refusal):
                raise found
            parameters = plan.parameters.copy()
            absorber = parameters.absorb_beside(found.calls, found.map)
            require_not_written_into(graph, use, gone)
        except Refusal as why:
            refusal = refusal if str(refusal) else _Beside(str(why), calls=why.calls)
            continue
        plan.parameters = parameters
        module = use.calls[0].module
        return Step(use, module, stays, (absorber,), None, None, found.crossed, beside=found.map, sums=found.sums)
    raise refusal


class _Beside(Refusal):
    """Why what stands beside a norm cannot take it in."""


def _add_to(reasons: dict[str, LeftNorm], name: str, plan: FoldPlan, refusal: Refusal) -> None:
    """Tell of a norm that stays also why what stands beside it cannot take it in."""
    known = reasons[name]
    if isinstance(refusal, _Beside) and _ALSO not in known.reason:
        reasons[name] = replace(known, reason=f"{known.reason}{_ALSO}{_lower(str(refusal))}")
        plan.obstacles[name] = (*plan.obstacles[name], *refusal.calls)


_ALSO = " Nor can what it is added to: "


def _refused(back: Refusal, on: Refusal, cut: Sequence[Refusal]) -> Refusal:
    """Return in one why a norm cannot go either way, and why not in two parts, where that is another reason."""
    reason = f"{back} Nor can it go on: {_lower(str(on))}"
    new = next((refusal for refusal in cut if str(refusal) not in (str(back), str(on))), None)
    told = [back, on]
    if new is not None:
        reason += f" Nor can it be cut in two: {_lower(str(new))}"
        told.append(new)
    return Refusal(reason, calls=list(dict.fromkeys(call for refusal in told for call in refusal.calls)))


def _require_recoverable(plan: FoldPlan, use: NormUse, state: NormState) -> None:
    """Refuse a norm whose input others cannot tell from its output to all but a few digits: γ is small beside β.

    That holds if its input has the statistics that the norm has. So it must not be what another norm read that has
    gone, nor have been changed.
    """
    weight, bias = (None if name is None else plan.parameters.named(name) for name in (state.weight, state.bias))
    changed = any(name in plan.parameters.changed for name in (state.weight, state.bias))
    if changed or any(norm_input(call).producer in plan.gone for call in use.calls):
        raise Refusal("Its statistics are no longer those of what it reads.")
    if bias is not None and bool((bias.abs() > _RECOVERABLE * (1.0 if weight is None else weight.abs())).any()):
        raise Refusal("Others cannot recover what it reads from what it returns.")


_RECOVERABLE = 8.0  # |β| ≤ 8 |γ|: three bits are lost


class _Ends(NamedTuple):
    """Who absorbs a map, what it crosses, and the names of those who take in its inverse."""

    absorbers: tuple[AbsorbingLayer, ...]
    crossed: frozenset[Value]
    inverse_absorbers: frozenset[str]


def _go(
    graph: Graph,
    use: NormUse,
    before: Map | None,
    after: Map | None,
    parameters: Parameters,
    plan: FoldPlan,
    sharing: bool,
) -> _Ends:
    gone, back = plan.gone, Route()
    absorbers: dict[str, AbsorbingLayer] = {}
    crossed: set[Value] = set()
    inverse_absorbers: set[str] = set()

    def take(route: Route, ends: Iterable[Value]) -> list[AbsorbingLayer]:
        # cut in two, it would have to be crossed by the one part and by the other
        if before is not None and after is not None and any(value in route.crossed for value in ends):
            raise Refusal("It follows itself.")
        found = parameters.absorb(route)
        # one that absorbs something on both sides is there twice, the second time with its bias
        absorbers.update((absorber.name, absorber) for absorber in found)
        crossed.update(route.crossed)
        return found

    if before is not None:
        start = [(norm_input(call), call, _shaped(before, call)) for call in use.calls]
        back = carry_backward(graph, start, parameters, gone.__contains__, sharing=sharing)
        take(back, (call.output for call in use.calls))
    if after is not None or back.shared:
        results = [] if after is None else [(call, _shaped(after, call)) for call in use.calls]
        forth = carry_forward(graph, results, parameters, gone.__contains__, back.shared)
        if back.shared and forth.crossed & back.crossed:
            raise Refusal("It follows itself.")
        found = take(forth, map(norm_input, use.calls))
        inverse_absorbers |= {absorber.name for absorber in found if after is None}
    require_not_written_into(graph, use, gone)
    in_order = sorted(absorbers.values(), key=lambda absorber: absorber.calls[0].index)
    return _Ends(tuple(in_order), frozenset(crossed), frozenset(inverse_absorbers))


def _shaped(map_: Map, call: Call) -> Map:
    """Return the map with the dimensions of what a call reads: calls of one norm may differ in them."""
    return Map.per_channel(map_.scale.reshape(-1), map_.shift.reshape(-1), len(call.output.shape))


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
        if call is not None and isinstance(weight, Value) and absorber_of(call) is not None and not is_norm(call):
            return weight.names[0].rpartition(".")[0] or None if weight.names else call.module or None
        if call is not None and len(list(call.tensor_args())) != 1:
            return None
    return None
