"""What can be done with a model: planned, tried out, and planned again without what did not hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch.nn import Module, Parameter

from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.norms import norm_uses
from batchnorm.dataflow.refusal import Refusal, listed
from batchnorm.dataflow.run import as_float64, of_runs, run
from batchnorm.dataflow.sizes import Runs
from batchnorm.dataflow.threads import threads_for_float64
from batchnorm.dataflow.trace import trace
from batchnorm.errors import InputError, VerificationError
from batchnorm.folding.planning.find_multiply_adds import failing, find_multiply_adds
from batchnorm.folding.planning.multiply_add import MultiplyAdd
from batchnorm.folding.planning.outcome import LeftNorm
from batchnorm.folding.planning.plan import FoldPlan, describe_source, make_plan
from batchnorm.folding.proving.lost_range import lost_ranges, norms_that_shrink
from batchnorm.folding.proving.value_proof import Proof
from batchnorm.folding.writing.rewrite import rewrite, round_parameters
from batchnorm.models.copying import copy_model
from batchnorm.models.outputs import NamedTensor, named_tensors

__all__ = ["Options", "ProvedPlan", "prove_plan", "trial_copy"]


@dataclass(frozen=True)
class Options:
    """What a fold may do; see :func:`batchnorm.fold`, and for the last two :mod:`batchnorm.folding.planning.plan`."""

    borders: bool = False
    keep_range: bool = False
    fuse: bool = False
    sharing: bool = True
    beside: bool = True


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
    banned: dict[str, str] = {}
    kept: dict[str, str] = {}  # norms that do not become multiply-adds either
    while True:
        plan = make_plan(
            model, graph, banned, with_borders=options.borders, sharing=options.sharing, beside=options.beside
        )
        if options.fuse:
            plan.multiply_adds = find_multiply_adds(model, plan, kept)
        parameters, problems = _rounded(model, plan, options.keep_range)
        outputs = None
        if plan.changes and not problems:
            with threads_for_float64(graph):
                problems, outputs = _problems(model, plan, runs, banned, warm=runs.model is None)
                if problems and runs.model is not None:  # what a run leaves behind where nobody looks may be why
                    problems, outputs = _problems(model, plan, runs, banned, warm=True)
        if not problems:
            _tell_what_others_show(model, plan, runs, banned)
            sources = {use.name: describe_source(graph, use) for use in norm_uses(model, graph)}
            plan.left += [LeftNorm(name, sources.get(name), reason) for name, reason in banned.items()]
            return ProvedPlan(plan, parameters, runs.on_random_inputs if plan.changes else None, outputs)
        multiply_adds = {item.name for item in plan.multiply_adds}
        kept |= {name: reason for name, reason in problems.items() if name in multiply_adds}
        banned |= {name: reason for name, reason in problems.items() if name not in multiply_adds}


def _tell_what_others_show(model: Module, plan: FoldPlan, runs: Runs, banned: Collection[str]) -> None:
    """Let norms that stay have the reason that the example alone shows; if it shows none, say which runs do."""
    if not plan.left or len(runs.all.inputs) == 1:
        return
    alone = make_plan(
        model, plan.graph.of_run(0), banned, with_borders=plan.with_borders, sharing=plan.sharing, beside=plan.beside
    )
    reasons = {item.norm: item for item in alone.left}
    told = []
    for item in plan.left:
        known = reasons.get(item.norm)
        if known is not None:
            plan.obstacles[item.norm] = alone.obstacles.get(item.norm, ())
            told.append(known)
            continue
        seen = {call.run for call in plan.obstacles.get(item.norm, ())} - {0}
        where = listed([runs.all.labels[number] for number in sorted(seen)], 1) if seen else "others"
        told.append(replace(item, reason=f"With the example inputs it could go, but not with {where}. {item.reason}"))
    plan.left[:] = told


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
    model: Module, plan: FoldPlan, runs: Runs, banned: Collection[str], *, warm: bool
) -> tuple[dict[str, str], Outputs | None]:
    """Return the norms that must stay, after a look at every value of all runs in float64; and what was returned.

    Args:
        model: the model.
        plan: what is to be done with it.
        runs: what it runs on.
        banned: the norms that stay anyway.
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
        trace(wide, inputs, observer=proof.after, returned=returned)
    except InputError as error:
        reason = f"Without it the model stops: {error.__cause__}."
        return dict.fromkeys(_culprits(model, plan, runs.all, banned), reason), None
    return proof.problems(), Outputs(before, returned.tensors()) if is_wide else None


def _first_run(wide: Module, plan: FoldPlan, inputs: Any, runs: Runs) -> tuple[Proof, list[NamedTensor]]:
    proof, returned = Proof(plan), _Returned(runs)
    trace(wide, inputs, observer=proof.before, returned=returned)
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


def _culprits(model: Module, plan: FoldPlan, example_inputs: Any, banned: Collection[str]) -> list[str]:
    """Return what makes the model stop."""
    if not plan.multiply_adds:
        return _guilty_steps(model, plan, example_inputs, banned)

    def stops(items: Sequence[MultiplyAdd]) -> bool:
        return _stops(model, replace(plan, multiply_adds=list(items)), example_inputs)

    return [item.name for item in failing(plan.multiply_adds, stops)]


def _guilty_steps(model: Module, plan: FoldPlan, example_inputs: Any, banned: Collection[str]) -> list[str]:
    """Return the norms without which the model raises, found by halves."""
    names = [step.name for step in plan.steps]
    if len(names) == 1:
        return names
    found: list[str] = []
    for half in (names[: len(names) // 2], names[len(names) // 2 :]):
        stay = {*banned, *names} - set(half)
        part = make_plan(
            model, plan.graph, stay, with_borders=plan.with_borders, sharing=plan.sharing, beside=plan.beside
        )
        if _stops(model, part, example_inputs):
            found += _guilty_steps(model, part, example_inputs, stay)
    if not found:
        raise VerificationError(
            "The folded model fails on the example inputs, though neither half of its norms alone makes it fail. It is "
            "not returned; the original is unchanged."
        )
    return found


def _stops(model: Module, plan: FoldPlan, example_inputs: Any) -> bool:
    """Whether the model fails once it is folded by a plan."""
    copied = trial_copy(model)
    rewrite(copied, plan, round_parameters(copied, plan.parameters))
    try:
        run(copied, example_inputs)
    except InputError:
        return True
    return False
