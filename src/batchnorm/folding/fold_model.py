"""A model folded: read, planned, proved on copies, compared end to end, and only then changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.dataflow.graph import Graph, Value
from batchnorm.dataflow.norms import norm_uses
from batchnorm.dataflow.run import run
from batchnorm.dataflow.sizes import Accepts, Runs, find_runs
from batchnorm.dataflow.trace import trace
from batchnorm.errors import InputError, StateError, VerificationError
from batchnorm.folding.planning.own_weights import ComputedWeights, untie
from batchnorm.folding.planning.plan import FoldPlan, Options
from batchnorm.folding.planning.replacement import Replacement
from batchnorm.folding.proving.lost_range import LostRange, lost_ranges
from batchnorm.folding.proving.proved_plan import ProvedPlan, prove_plan, trial_copy
from batchnorm.folding.report.cost import Cost
from batchnorm.folding.report.diagrams import draw_folded, draw_left
from batchnorm.folding.report.int8_ranges import FoldedWeight, folded_weights
from batchnorm.folding.report.outcome import Costs, FoldedNorm, FoldOutcome, LeftNorm, Pictures
from batchnorm.folding.report.sentences import describe_folded
from batchnorm.folding.writing.record import FoldRecord
from batchnorm.folding.writing.rewrite import replace_modules, rewrite
from batchnorm.models.parameters import find_tensor, qualified
from batchnorm.models.several import EXAMPLE, Several
from batchnorm.models.snapshot import Structure, restored_if_raised
from batchnorm.nn.input_normalization import WithNormalizedInput
from batchnorm.verification.end_to_end import Agreement, ReferenceOutputs, spacing, verify, verify_float64

__all__ = ["Folded", "fold_model"]


class Folded(NamedTuple):
    """A folded model, what it had before (None if it did not change), and what became of every norm."""

    model: Any
    pairs: FoldRecord | None
    outcome: FoldOutcome


def fold_model(
    model: Module,
    example_inputs: Any,
    inplace: bool,
    options: Options,
    examples: Sequence[Any] = (),
    accepts: Accepts | None = None,
) -> Folded:
    """Fold a module; see :func:`batchnorm.fold`.

    Args:
        model: the module.
        example_inputs: what it is run on.
        inplace: whether it is changed itself.
        options: what may be done.
        examples: what else it is run on.
        accepts: whether inputs of other sizes are such as it is meant for; None takes all on which it runs.

    Raises:
        InputError, StateError, VerificationError: as that says.
    """
    with torch.inference_mode(False):
        labels = (EXAMPLE, *(f"examples[{number}]" for number in range(len(examples))))
        runs = find_runs(lambda: trial_copy(model), Several((example_inputs, *examples), labels), accepts)
        work = runs.model
        if work is None:
            work = trial_copy(model)
            run(work, runs.warming)  # what a model keeps from its first call is there in all that follow
        graph, stored = _with_own_weights(work, runs)
        proved = prove_plan(work, graph, runs, options)
        plan = proved.plan
        if isinstance(model, WithNormalizedInput):
            _require_normalization(plan, model)
        stored = {name: layer for name, layer in stored.items() if name in plan.parameters.absorbers}
        described = _described(work, proved)
        error_float64 = None
        if plan.changes:
            try:
                agreement, error_float64 = _compared(model, work, proved, runs.of_user, bool(stored))
            except VerificationError:
                without = _without_what_loses_digits(plan)
                if without is None:
                    raise
                return fold_model(model, example_inputs, inplace, without, examples, accepts)
            after = Cost.of(work, trace(work, example_inputs))  # it has been folded for the comparison
        else:
            agreement, after = Agreement(0.0, 0.0), described.cost
        del work
        target = model if inplace else trial_copy(model)
        pairs, weights = _change(target, proved, stored) if plan.changes else (None, [])
    outcome = FoldOutcome(
        described.folded,
        described.left,
        agreement.error,
        agreement.bound,
        error_float64,
        proved.on_random_inputs,
        runs.described,
        runs.warnings,
        described.lost,
        weights,
        Costs(described.cost, after),
        described.pictures,
    )
    return Folded(target, pairs, outcome)


def _without_what_loses_digits(plan: FoldPlan) -> Options | None:
    """Return what may be done once rounding does not explain the difference; None where nothing can be left out.

    What recovers a value from what a norm made of it loses digits, and so does x + (s − 1) x where s is small.
    """
    if any(step.inverse for step in plan.steps):
        return replace(plan.options, sharing=False)
    return replace(plan.options, beside=False) if any(step.beside is not None for step in plan.steps) else None


def _with_own_weights(work: Module, runs: Runs) -> tuple[Graph, dict[str, Module]]:
    """Give the layers weights of their own; return the dataflow, and the layers whose computed weights are stored."""
    untie(work)
    weights = ComputedWeights()
    graph = trace(work, runs.all, observer=weights.observe)
    stored = _bearable(work, runs.all, weights.layers(graph))
    if not stored:
        return graph, {}
    replace_modules(work, stored)
    return trace(work, runs.all), {name: copy.deepcopy(layer) for name, layer in stored.items()}


def _bearable(work: Module, example_inputs: Any, stored: dict[str, Module]) -> dict[str, Module]:
    """Return the plain layers that the model runs with: its code may read what these lack, a parametrization, say."""
    if not stored or _runs_with(work, example_inputs, stored):
        return stored
    return {name: layer for name, layer in stored.items() if _runs_with(work, example_inputs, {name: layer})}


def _runs_with(work: Module, example_inputs: Any, stored: dict[str, Module]) -> bool:
    before = Structure(work.modules())
    replace_modules(work, stored)
    try:
        run(work, example_inputs)
    except InputError:
        return False
    finally:
        before.restore()
    return True


# -- the description -------------------------------------------------------------------------------------------------


class _Described(NamedTuple):
    """What a model that is not folded yet says of its plan."""

    folded: list[FoldedNorm]
    left: list[LeftNorm]
    cost: Cost
    pictures: Pictures
    lost: list[LostRange]


def _described(work: Module, proved: ProvedPlan) -> _Described:
    """Describe a plan, as the example's run shows it."""
    plan = proved.plan.of_run(0)
    becomes = {item.name: item.description for item in plan.multiply_adds}
    folded = describe_folded(plan)
    staying = sorted(plan.staying, key=lambda norm: plan.order[norm.name])
    left = [LeftNorm(norm.name, norm.source, norm.reason, becomes.get(norm.name)) for norm in staying]
    running = {use.name: use.calls[0] for use in norm_uses(work, plan.graph)}
    reached = [item for item in folded if item.norm in running]
    pictures = Pictures(draw_folded(plan, reached), draw_left(plan, left, running))
    lost = lost_ranges(work, plan.parameters, proved.parameters)
    return _Described(folded, left, Cost.of(work, plan.graph), pictures, lost)


# -- the comparison --------------------------------------------------------------------------------------------------


def _compared(
    model: Module, work: Module, proved: ProvedPlan, example_inputs: Any, is_stored: bool
) -> tuple[Agreement, float | None]:
    """Fold ``work``, and compare it with what it was; and that with the model, where weights have been stored in it.

    Returns:
        the agreement in the model's own types, and the error in float64, None where it does not run in that.
    """
    touched = _touched(work, proved.plan)
    reference = ReferenceOutputs.of(work, example_inputs, touched)
    if is_stored:
        verify(reference, run(trial_copy(model), example_inputs))
    exact = None
    if proved.in_float64 is not None:
        roundoff = max(spacing(tensor) / 2 for tensor in touched)
        exact = verify_float64(*proved.in_float64, reference, roundoff)
    rewrite(work, proved.plan, proved.parameters)
    return verify(reference, run(work, example_inputs)), None if exact is None else exact.error


def _touched(model: Module, plan: FoldPlan) -> list[Tensor]:
    """Return every tensor that goes into a new parameter, each once."""
    names = list(plan.parameters.changed)
    for use in (*(step.use for step in plan.steps), *(item.use for item in plan.multiply_adds)):
        values = (use.calls[0].args[key] for key in ("running_mean", "running_var", "weight", "bias"))
        names += [value.names[0] for value in values if isinstance(value, Value)]
    tensors = (find_tensor(model, name) for name in dict.fromkeys(names))
    return [tensor for tensor in tensors if tensor is not None]


# -- the change ------------------------------------------------------------------------------------------------------


def _change(target: Module, proved: ProvedPlan, stored: dict[str, Module]) -> tuple[FoldRecord, list[FoldedWeight]]:
    """Fold a model for good; return what it had before, and the weights before and after."""
    plan, parameters = proved.plan, proved.parameters
    own = target.normalization_name if isinstance(target, WithNormalizedInput) else None  # not of the model itself
    steps = [step for step in plan.steps if step.name != own]
    going = [(target.get_submodule(step.module), step.replacement) for step in steps]
    going += [(target.get_submodule(name), Replacement((layer,))) for name, layer in stored.items()]
    going += [(target.get_submodule(item.module), item.replacement(target)) for item in plan.multiply_adds]
    pairs = FoldRecord.of(target, parameters, going, plan.parameters.borders, plan.multiply_adds)
    old = dict(pairs.parameters)
    old |= {qualified(name, "weight"): layer._parameters["weight"] for name, layer in stored.items()}
    weights = folded_weights(plan.parameters.absorbers.values(), old, parameters)
    with restored_if_raised(Structure(target.modules())):
        replace_modules(target, stored)
        rewrite(target, plan, parameters)
    return pairs, weights


# -- the normalization of the input ----------------------------------------------------------------------------------


def _require_normalization(plan: FoldPlan, outer: WithNormalizedInput) -> None:
    """Refuse, before anything is changed, a model that cannot take in the normalization of its input.

    Raises:
        StateError: it cannot.
    """
    reason = next((norm.reason for norm in plan.staying if norm.name == outer.normalization_name), None)
    if reason is not None:
        raise StateError(f"fold: the normalization of the input cannot be folded. {reason}")
