"""What can be done with a model: planned, tried out, and planned again without what did not hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.nn import Module, Parameter

from batchnorm.errors import InputError, VerificationError
from batchnorm.graph.dataflow import Graph
from batchnorm.graph.fold_result import LeftNorm
from batchnorm.graph.leftover import Leftover, failing, find_leftovers
from batchnorm.graph.norms import norm_uses
from batchnorm.graph.plan import Plan, describe_source, make_plan
from batchnorm.graph.proof import Proof
from batchnorm.graph.random_inputs import random_like
from batchnorm.graph.ranges import lost_ranges, norms_that_shrink
from batchnorm.graph.refusal import Refusal
from batchnorm.graph.rewrite import Rewrite, round_parameters
from batchnorm.graph.threads import threads_for_float64
from batchnorm.graph.trace import trace
from batchnorm.graph.verify import as_float64, run
from batchnorm.nn.copying import copy_model

__all__ = ["Options", "Settled", "copy_to_try", "settle"]


@dataclass(frozen=True)
class Options:
    """What a fold may do; see :func:`batchnorm.fold`, and for the last two :class:`batchnorm.graph.plan.Plan`."""

    borders: bool = False
    keep_range: bool = False
    fuse: bool = False
    sharing: bool = True
    beside: bool = True


@dataclass(frozen=True, eq=False)
class Settled:
    """A plan that holds.

    Attributes:
        plan: the plan.
        parameters: the new parameters, by name.
        on_random_inputs: whether every value was compared on random inputs too; None where there was nothing to
            compare.
    """

    plan: Plan
    parameters: dict[str, Parameter]
    on_random_inputs: bool | None


def copy_to_try(model: Module) -> Module:
    """Return a copy of a model.

    Raises:
        StateError: it cannot be copied.
    """
    remedy = "Folding is tried out on copies, with inplace=True too: take off the model what cannot be copied."
    return copy_model("fold", model, remedy)


def settle(model: Module, graph: Graph, example_inputs: Any, options: Options) -> Settled:
    """Return what can be done with ``model``, all of it proved, and its new parameters; it is not changed."""
    banned: dict[str, str] = {}
    kept: dict[str, str] = {}  # norms that do not become multiply-adds either
    while True:
        plan = make_plan(
            model, graph, banned, with_borders=options.borders, sharing=options.sharing, beside=options.beside
        )
        if options.fuse:
            plan.leftovers = find_leftovers(model, plan, kept)
        parameters, problems = _rounded(model, plan, options.keep_range)
        random = None
        if plan.changes and not problems:
            with threads_for_float64(graph):
                problems, random = _problems(model, plan, example_inputs, banned)
        if not problems:
            sources = {use.name: describe_source(graph, use) for use in norm_uses(model, graph)}
            plan.left += [LeftNorm(name, sources.get(name), reason) for name, reason in banned.items()]
            return Settled(plan, parameters, random)
        leftovers = {item.name for item in plan.leftovers}
        kept |= {name: reason for name, reason in problems.items() if name in leftovers}
        banned |= {name: reason for name, reason in problems.items() if name not in leftovers}


def _rounded(model: Module, plan: Plan, keep_range: bool) -> tuple[dict[str, Parameter], dict[str, str]]:
    """Return the new parameters, and the norms that must stay because one does not fit into its type."""
    replaced = {item.module for item in plan.leftovers}
    try:
        rounded = round_parameters(model, plan.parameters)
        lost = lost_ranges(model, plan.parameters, rounded) if keep_range else []
    except Refusal as refusal:
        guilty = [step.name for step in plan.steps if any(host.name == refusal.module for host in step.into)]
        return {}, dict.fromkeys(guilty or [step.name for step in plan.steps], str(refusal))
    parameters = {name: new for name, new in rounded.items() if name.rpartition(".")[0] not in replaced}
    return parameters, norms_that_shrink(plan.steps, lost)


def _problems(
    model: Module, plan: Plan, example_inputs: Any, banned: Collection[str]
) -> tuple[dict[str, str], bool | None]:
    """Return the norms that must stay, after a look at every value of runs in float64; and if on random inputs too."""
    wide, inputs = copy_to_try(model).double(), as_float64(example_inputs)
    try:
        run(wide, inputs)  # what a model keeps from its first call, a copy may have to compute once more
    except InputError:  # a model that does not run in float64 is looked at in its own types
        wide, inputs = copy_to_try(model), example_inputs
        run(wide, inputs)
    proofs = [(inputs, _first_run(wide, plan, inputs)), *_on_random_inputs(wide, plan, inputs)]
    Rewrite().apply(wide, plan, round_parameters(wide, plan.parameters))
    for these, proof in proofs:
        try:
            trace(wide, these, observer=proof.after)
        except InputError as error:
            reason = f"Without it the model stops: {error.__cause__}."
            return dict.fromkeys(_culprits(model, plan, example_inputs, banned), reason), None
        problems = proof.problems()
        if problems:
            return problems, None
    return {}, len(proofs) > 1


def _first_run(wide: Module, plan: Plan, inputs: Any) -> Proof:
    proof = Proof(plan)
    trace(wide, inputs, observer=proof.before)
    return proof


def _on_random_inputs(wide: Module, plan: Plan, inputs: Any) -> list[tuple[Any, Proof]]:
    """Return other inputs and the proof begun on them; none if they take another way through the model, or fail."""
    others, proof = random_like(inputs), Proof(plan)
    try:
        graph = trace(wide, others, observer=proof.before)
    except InputError:
        return []
    same = [call.op for call in graph.calls] == [call.op for call in plan.graph.calls]
    return [(others, proof)] if same else []


def _culprits(model: Module, plan: Plan, example_inputs: Any, banned: Collection[str]) -> list[str]:
    """Return what makes the model stop."""
    if not plan.leftovers:
        return _guilty_steps(model, plan, example_inputs, banned)

    def stops(items: Sequence[Leftover]) -> bool:
        return _stops(model, replace(plan, leftovers=list(items)), example_inputs)

    return [item.name for item in failing(plan.leftovers, stops)]


def _guilty_steps(model: Module, plan: Plan, example_inputs: Any, banned: Collection[str]) -> list[str]:
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


def _stops(model: Module, plan: Plan, example_inputs: Any) -> bool:
    """Whether the model fails once it is folded by a plan."""
    copied = copy_to_try(model)
    Rewrite().apply(copied, plan, round_parameters(copied, plan.parameters))
    try:
        run(copied, example_inputs)
    except InputError:
        return True
    return False
