"""What can be done with a model: planned, tried out, and planned again without what did not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch.nn import Module, Parameter

from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.refusal import Refusal, listed
from batchnorm.dataflow.run import as_float64, of_runs, run
from batchnorm.dataflow.sizes import Runs
from batchnorm.dataflow.threads import threads_for_float64
from batchnorm.dataflow.trace import trace
from batchnorm.errors import InputError
from batchnorm.folding.planning.find_multiply_adds import failing
from batchnorm.folding.planning.make_plan import make_plan
from batchnorm.folding.planning.multiply_add import MultiplyAdd
from batchnorm.folding.planning.plan import FoldPlan, Options, StayingNorm
from batchnorm.folding.proving.lost_range import lost_ranges, norms_that_shrink
from batchnorm.folding.proving.value_proof import ValueProof
from batchnorm.folding.writing.rewrite import rewrite, round_parameters
from batchnorm.models.copying import copy_model
from batchnorm.models.outputs import NamedTensor, named_tensors

__all__ = ["ProvedPlan", "prove_plan", "trial_copy"]


@dataclass(frozen=True, eq=False)
class ProvedPlan:
    """A plan that holds.

    Attributes:
        plan: the plan.
        parameters: the new parameters, by name.
        on_random_inputs: whether every value was compared on random inputs of the example's shape too; None where there
            was nothing to compare.
        in_float64: what a float64 copy returned for the inputs that were given, and what it returns once it is folded;
            None where it does not run in float64, or there was nothing to compare.
    """

    plan: FoldPlan
    parameters: dict[str, Parameter]
    on_random_inputs: bool | None
    in_float64: Outputs | None = None


class Outputs(NamedTuple):
    """What a model returned before and after."""

    before: list[NamedTensor]
    after: list[NamedTensor]


def trial_copy(model: Module) -> Module:
    """Return a copy of a model.

    Raises:
        StateError: it cannot be copied.
    """
    remedy = "Folding is tried out on copies, with inplace=True too: take off the model what cannot be copied."
    return copy_model("fold", model, remedy)


def prove_plan(model: Module, graph: Graph, runs: Runs, options: Options) -> ProvedPlan:
    """Return what can be done with ``model``, all of it proved, and its new parameters; it is not changed.

    Args:
        model: the model.
        graph: its dataflow in all runs.
        runs: what it runs on.
        options: what may be done.
    """
    excluded: dict[str, str] = {}
    kept: dict[str, str] = {}  # norms that do not become multiply-adds either
    while True:
        plan = make_plan(model, graph, options, excluded, kept)
        parameters, problems = _rounded(model, plan, options.keep_range)
        outputs = None
        if plan.changes and not problems:
            with threads_for_float64(graph):
                problems, outputs = _problems(model, plan, runs, excluded, warm=runs.model is None)
                if problems and runs.model is not None:  # what a run leaves behind unseen may be why
                    problems, outputs = _problems(model, plan, runs, excluded, warm=True)
        if not problems:
            plan = replace(plan, staying=_as_the_example_shows(model, plan, runs, excluded))
            return ProvedPlan(plan, parameters, runs.on_random_inputs if plan.changes else None, outputs)
        multiply_adds = {item.name for item in plan.multiply_adds}
        kept |= {name: reason for name, reason in problems.items() if name in multiply_adds}
        excluded |= {name: reason for name, reason in problems.items() if name not in multiply_adds}


def _as_the_example_shows(
    model: Module, plan: FoldPlan, runs: Runs, excluded: Mapping[str, str]
) -> tuple[StayingNorm, ...]:
    """Return the norms that stay with the reason that the example alone shows; if it shows none, with which runs do."""
    if len(runs.all.inputs) == 1 or not {norm.name for norm in plan.staying} - excluded.keys():
        return plan.staying
    alone = make_plan(model, plan.graph.of_run(0), replace(plan.options, fuse=False), excluded)
    known = {norm.name: norm for norm in alone.staying}

    def shown(norm: StayingNorm) -> StayingNorm:
        if norm.name in excluded or norm.name in known:
            return norm if norm.name in excluded else known[norm.name]
        seen = {call.run for call in norm.obstacles} - {0}
        where = listed([runs.all.labels[number] for number in sorted(seen)], 1) if seen else "others"
        return replace(norm, reason=f"With the example inputs it could go, but not with {where}. {norm.reason}")

    return tuple(shown(norm) for norm in plan.staying)


def _rounded(model: Module, plan: FoldPlan, keep_range: bool) -> tuple[dict[str, Parameter], dict[str, str]]:
    """Return the new parameters, and the norms that must stay because one does not fit into its type."""
    replaced = {item.module for item in plan.multiply_adds}
    try:
        rounded = round_parameters(model, plan.parameters)
        lost = lost_ranges(model, plan.parameters, rounded) if keep_range else []
    except Refusal as refusal:
        guilty = [step.name for step in plan.steps if any(absorber.name == refusal.module for absorber in step.into)]
        return {}, dict.fromkeys(guilty or [step.name for step in plan.steps], str(refusal))
    parameters = {name: new for name, new in rounded.items() if name.rpartition(".")[0] not in replaced}
    return parameters, norms_that_shrink(plan.steps, lost)


def _problems(
    model: Module, plan: FoldPlan, runs: Runs, excluded: Mapping[str, str], *, warm: bool
) -> tuple[dict[str, str], Outputs | None]:
    """Return the norms that must stay, after a look at every value of all runs in float64; and what was returned.

    Args:
        model: the model.
        plan: what is to be done with it.
        runs: what it runs on.
        excluded: the norms that stay anyway.
        warm: whether to run it first, so that it has what it keeps from its first call.
    """
    wide, inputs, is_wide = trial_copy(model).double(), as_float64(runs.all), True
    try:
        if warm:
            run(wide, as_float64(runs.warming))
        proof, before = _first_run(wide, plan, inputs, runs)
    except InputError:  # a model that does not run in float64 is looked at in its own types
        wide, inputs, is_wide = trial_copy(model), runs.all, False
        if warm:
            run(wide, runs.warming)
        proof, before = _first_run(wide, plan, inputs, runs)
    rewrite(wide, plan, round_parameters(wide, plan.parameters))
    returned = _Returned(runs)
    try:
        trace(wide, inputs, observer=proof.compare, returned=returned)
    except InputError as error:
        reason = f"Without it the model stops: {error.__cause__}."
        return dict.fromkeys(_culprits(model, plan, runs.all, excluded), reason), None
    return proof.problems(), Outputs(before, returned.tensors()) if is_wide else None


def _first_run(wide: Module, plan: FoldPlan, inputs: Any, runs: Runs) -> tuple[ValueProof, list[NamedTensor]]:
    proof, returned = ValueProof(plan), _Returned(runs)
    trace(wide, inputs, observer=proof.record, returned=returned)
    return proof, returned.tensors()


class _Returned:
    """What a model returns for the inputs that were given, of all on which it is run."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._outputs: list[list[NamedTensor]] = []
        self._seen = 0

    def __call__(self, outputs: Any) -> None:
        """Keep copies, if the inputs were given."""
        self._seen += 1
        if self._seen <= self._runs.given:
            self._outputs.append(named_tensors(outputs))

    def tensors(self) -> list[NamedTensor]:
        """Return them as one list."""
        return of_runs(self._outputs, self._runs.of_user)


def _culprits(model: Module, plan: FoldPlan, example_inputs: Any, excluded: Mapping[str, str]) -> list[str]:
    """Return the norms without which the model stops, multiply-adds first."""
    names = [step.name for step in plan.steps]

    def stops_without(going: Sequence[str]) -> bool:
        stay = {**excluded, **{name: "" for name in names if name not in going}}
        part = make_plan(model, plan.graph, replace(plan.options, fuse=False), stay)
        return _stops(model, part, example_inputs)

    def stops_with(items: Sequence[MultiplyAdd]) -> bool:
        return _stops(model, replace(plan, multiply_adds=tuple(items)), example_inputs)

    if plan.multiply_adds:
        return [item.name for item in failing(plan.multiply_adds, stops_with)]
    return failing(names, stops_without)


def _stops(model: Module, plan: FoldPlan, example_inputs: Any) -> bool:
    """Whether the model fails once it is folded by a plan."""
    copied = trial_copy(model)
    rewrite(copied, plan, round_parameters(copied, plan.parameters))
    try:
        run(copied, example_inputs)
    except InputError:
        return True
    return False
