"""Where each norm of a model can go: which way its map travels, and which layers absorb it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from torch.nn import Module

from batchnorm.absorbers.table import absorber_of
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.norms import NormUse, is_norm, norm_uses, require_no_alternative, unreached_norms
from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.planning.carry import carry
from batchnorm.folding.planning.find_multiply_adds import find_multiply_adds
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.parallel import find_beside
from batchnorm.folding.planning.plan import FoldPlan, Options, Part, StayingNorm, Step
from batchnorm.folding.planning.removable_norm import NormState, check_norm
from batchnorm.folding.planning.shared_memory import norm_input, require_not_written_into
from batchnorm.folding.planning.splits import norm_map, splits

__all__ = ["make_plan"]


def make_plan(
    model: Module, graph: Graph, options: Options, excluded: Mapping[str, str] | None = None, kept: Collection[str] = ()
) -> FoldPlan:
    """Find out which norms can go, and where.

    Each is tried in the order of execution, in the ways of :mod:`batchnorm.folding.planning.splits`; norms that go make
    room for others, so that those that are left are tried again as long as one more goes. What is left then is tried
    with what stands beside it (:mod:`batchnorm.folding.planning.parallel`), and after that with values that other
    operators read too: they take in the inverse of what the norm was.

    Args:
        model: the model; it is not changed.
        graph: its dataflow.
        options: what may be done.
        excluded: names of norms that are to stay, and why.
        kept: names of norms that are not to become multiply-adds either.
    """
    excluded = {} if excluded is None else excluded
    uses = norm_uses(model, graph)
    unreached = unreached_norms(model, uses)
    planner = _Planner(model, graph, options, unreached)
    planner.plan([use for use in uses if use.name not in excluded])
    waiting = [use for use in uses if use.name in planner.staying.keys() - set(kept)] if options.fuse else []
    sources = {use.name: _source(graph, use) for use in uses if use.name in excluded}
    return FoldPlan(
        graph,
        options,
        tuple(uses),
        tuple(unreached),
        planner.parameters,
        tuple(planner.steps),
        (
            *planner.staying.values(),
            *(StayingNorm(name, None, "The example inputs do not reach it.") for name in unreached),
            *(StayingNorm(name, sources[name], reason) for name, reason in excluded.items() if name in sources),
        ),
        tuple(find_multiply_adds(model, graph, planner.parameters, waiting, unreached)),
    )


class _Planner:
    """The norms of a model tried one after the other: what has been found so far."""

    def __init__(self, model: Module, graph: Graph, options: Options, unreached: Sequence[str]) -> None:
        self.model, self.graph, self.options, self.unreached = model, graph, options, unreached
        self.parameters = Parameters.of(model, graph)
        self.steps: list[Step] = []
        self.staying: dict[str, StayingNorm] = {}

    @property
    def gone(self) -> set[Call]:
        return {call for step in self.steps for call in step.use.calls}

    def plan(self, waiting: Sequence[NormUse]) -> None:
        """Try norms, stage after stage."""
        stages = [self._carried, *[self._beside] * self.options.beside, *[self._sharing] * self.options.sharing]
        stage = 0
        while waiting and stage < len(stages):
            before = len(self.steps)
            waiting = [use for use in waiting if not self._goes(use, stages[stage], is_first=stage == 0)]
            # what has gone beside something else may have made room for others to go their own way
            stage = stage + 1 if len(self.steps) == before else 0 if stages[stage] == self._beside else stage

    def _goes(self, use: NormUse, attempt: Callable[[NormUse], Step], *, is_first: bool) -> bool:
        try:
            require_no_alternative(self.model, use.owner, self.unreached)
            self.steps.append(attempt(use))
        except Refusal as refusal:
            self._stays(use, refusal, is_first=is_first)
            return False
        self.staying.pop(use.name, None)
        return True

    def _stays(self, use: NormUse, refusal: Refusal, *, is_first: bool) -> None:
        """Keep the reason of the first stage, and what a layer beside the norm is refused for."""
        known = self.staying.get(use.name)
        if is_first or known is None:
            self.staying[use.name] = StayingNorm(use.name, _source(self.graph, use), str(refusal), refusal.calls)
        elif isinstance(refusal, _BesideRefusal) and _ALSO not in known.reason:
            reason = f"{known.reason}{_ALSO}{_lower(str(refusal))}"
            self.staying[use.name] = replace(known, reason=reason, obstacles=(*known.obstacles, *refusal.calls))

    # -- the attempts, in the order of the stages --------------------------------------------------------------------

    def _carried(self, use: NormUse, *, sharing: bool = False) -> Step:
        """Let layers before and after the norm absorb it."""
        state, replacement = check_norm(self.graph, use)
        map_ = norm_map(self.parameters, state)
        if sharing:
            self._require_recoverable(use, state)
        refusals: dict[str, Refusal] = {}  # by the way that was tried; of maps cut in two, by the reason
        for split in splits(map_, self.options.borders):
            parameters = self.parameters.copy(with_borders=split.with_borders)
            try:
                carried = carry(self.graph, use, split, parameters, self.gone, sharing=sharing)
            except Refusal as refusal:
                if split.after is None or split.before is None:
                    refusals["back" if split.after is None else "on"] = refusal
                else:
                    refusals.setdefault(str(refusal), refusal)
                continue
            self.parameters = parameters
            crossed, module = carried.crossed, use.calls[0].module
            return Step(use, module, replacement, crossed, carried.back, carried.on, inverse=carried.inverse)
        raise _in_one(refusals.pop("back"), refusals.pop("on"), list(refusals.values()))

    def _sharing(self, use: NormUse) -> Step:
        """Do the same across values that other operators read, which absorb the inverse."""
        return self._carried(use, sharing=True)

    def _beside(self, use: NormUse) -> Step:
        """Let a layer that reads the same, and whose output is added to the norm's, absorb the norm."""
        state, replacement = check_norm(self.graph, use)
        gone, map_ = self.gone, norm_map(self.parameters, state)
        first = Refusal("")
        for found in find_beside(self.graph, use, map_, self.parameters, gone.__contains__):
            try:
                if isinstance(found, Refusal):
                    raise found
                parameters = self.parameters.copy()
                part = Part(found.map, (parameters.absorb_beside(found.calls, found.map),))
                require_not_written_into(self.graph, use, gone)
            except Refusal as refusal:
                first = first if str(first) else _BesideRefusal(str(refusal), calls=refusal.calls)
                continue
            self.parameters = parameters
            return Step(use, use.calls[0].module, replacement, found.crossed, beside=part, sums=found.sums)
        raise first

    def _require_recoverable(self, use: NormUse, state: NormState) -> None:
        """Refuse a norm whose input cannot be recovered from its output to all but a few digits: γ is small beside β.

        That holds if its input has the statistics that the norm has. So it must not be what another norm read that has
        gone, nor have been changed.
        """
        weight, bias = (None if name is None else self.parameters.named(name) for name in (state.weight, state.bias))
        changed = any(name in self.parameters.changed for name in (state.weight, state.bias))
        if changed or any(norm_input(call).producer in self.gone for call in use.calls):
            raise Refusal("Its statistics are no longer those of what it reads.")
        if bias is not None and bool((bias.abs() > _RECOVERABLE * (1.0 if weight is None else weight.abs())).any()):
            raise Refusal("What it reads cannot be recovered from what it returns.")


_RECOVERABLE = 8.0  # |β| ≤ 8 |γ|: three bits are lost


# -- reasons -----------------------------------------------------------------------------------------------------------


class _BesideRefusal(Refusal):
    """Why what stands beside a norm cannot take it in."""


_ALSO = " Nor can what it is added to: "


def _in_one(back: Refusal, on: Refusal, cut: Sequence[Refusal]) -> Refusal:
    """Return in one why a norm cannot go either way, and why not in two parts, where that is another reason."""
    reason = f"{back} Nor can it go on: {_lower(str(on))}"
    new = [refusal for refusal in cut if str(refusal) not in (str(back), str(on))][:1]
    reason += "".join(f" Nor can it be cut in two: {_lower(str(refusal))}" for refusal in new)
    return Refusal(reason, calls=list(dict.fromkeys(call for refusal in (back, on, *new) for call in refusal.calls)))


def _lower(sentence: str) -> str:
    """Return a sentence as the end of another: names keep their letters."""
    first, _, rest = sentence.partition(" ")
    return f"{first.lower() if first in _BEGINNINGS else first} {rest}"


_BEGINNINGS = {"It", "No", "Nothing", "Operators", "The", "A", "An", "Its", "What"}


def _source(graph: Graph, use: NormUse) -> str | None:
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
