"""What became of each norm of a plan: which layer absorbed which part, across what, and what that saves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from torch.nn import Identity, Module

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.dataflow.graph import Call
from batchnorm.dataflow.operator_kinds import family
from batchnorm.dataflow.refusal import listed
from batchnorm.folding.planning.absorbing_layer import AbsorbingLayer
from batchnorm.folding.planning.plan import FoldPlan, Part, Step
from batchnorm.folding.report.cost import Saving
from batchnorm.folding.report.outcome import FoldedNorm
from batchnorm.models.parameters import find_tensor
from batchnorm.travel.maps import Map

__all__ = ["crossed_calls", "describe_folded"]

_MOST_NAMED = 4


def describe_folded(plan: FoldPlan) -> list[FoldedNorm]:
    """Return what becomes of the norms that go, in the order of execution. The plan's model is not folded yet."""
    described: dict[str, FoldedNorm] = {}
    seen: set[str] = set()
    for step in plan.steps:  # in the order in which they were absorbed: the first to need a bias, or a border, made it
        new = {key for layer in step.into for key in _made_for(layer, step, plan)} - seen
        seen |= new
        described[step.name] = _described(step, plan, new)
    return [described[name] for name in sorted(described, key=plan.order.__getitem__)]


def _made_for(layer: AbsorbingLayer, step: Step, plan: FoldPlan) -> list[str]:
    """Return what a layer did not have before: a bias, and a border, by its name."""
    name = layer.bias_name
    bias = name is not None and name in plan.parameters.changed and find_tensor(plan.parameters.model, name) is None
    shifted = [] if step.on is None or step.on.map.only_scales else [other.name for other in step.on.layers]
    border = layer.name in plan.parameters.borders and layer.name in shifted
    return [f"bias of {layer.name}"] * bias + [f"border of {layer.name}"] * border


def _described(step: Step, plan: FoldPlan, new: Collection[str]) -> FoldedNorm:
    """Return what becomes of one norm.

    Args:
        step: what is done with it.
        plan: all that is done.
        new: biases and borders that layers have because of it.
    """
    bordered = [layer for layer in step.into if f"border of {layer.name}" in new]
    biased = [call for layer in step.into if f"bias of {layer.name}" in new for call in layer.calls]
    kinds = dict.fromkeys(layer.operator.kind for layer in step.into)
    return FoldedNorm(
        step.name,
        ", ".join(layer.name for layer in step.into),
        ", ".join(kinds),
        _way(step),
        _sentence(step, plan, bordered),
        tuple(dict.fromkeys(family(call) for call in crossed_calls(step, plan))),
        Saving.of(
            step.use.calls,
            [call for call in biased if linear_operator_of(call) is not None],
            [call for layer in bordered for call in layer.calls],
        ),
    )


def _way(step: Step) -> Literal["back", "on", "both", "beside"]:
    if step.beside is not None:
        return "beside"
    return "back" if step.on is None else "on" if step.back is None else "both"


def crossed_calls(step: Step, plan: FoldPlan) -> list[Call]:
    """Return the operators between a norm and the layers that absorb it, in order: those that stay."""
    ends = {*step.use.calls, *(call for absorber in step.into for call in absorber.calls)} | plan.gone
    calls = {value.producer for value in step.crossed if value.producer is not None} - ends
    return sorted(calls, key=lambda call: call.index)


def _sentence(step: Step, plan: FoldPlan, bordered: Sequence[AbsorbingLayer]) -> str:
    crossed = crossed_calls(step, plan)
    if step.beside is not None:
        return (
            f"It is added{_across(crossed, ' ')} to {_named(step.into)}, which reads the same and takes its shift into "
            "the bias, and its scale, less the 1 of the identity that stays, into the middle of the kernel."
        )
    sentence = _parts(step, crossed)
    if step.inverse:
        named = _named(step.inverse)
        says = "takes the inverse in: it reads" if len(step.inverse) == 1 else "take the inverse in: they read"
        sentence += f" {named[0].upper()}{named[1:]} {says} what that changes."
    if bordered:
        names = listed([layer.name or "It" for layer in bordered], _MOST_NAMED)  # the model itself has no name
        sentence += f" {names} {'pads' if len(bordered) == 1 else 'pad'} with −t/s now, of which the norm made zero."
    staying = _staying(plan.parameters.model, step)
    if staying:
        sentence += f" Its {listed(staying)} {'stays' if len(staying) == 1 else 'stay'} in place."
    return sentence


def _parts(step: Step, crossed: Sequence[Call]) -> str:
    """Return which part of a map goes where."""
    start = step.use.calls[0].index
    back = None if step.back is None else _into(step.back, [call for call in crossed if call.index < start])
    on = None if step.on is None else _into(step.on, [call for call in crossed if call.index > start])
    if step.back is not None and step.on is not None:
        first, second = _halves(step.back.map)
        return f"It is cut in two: {first} goes back {back}; {second} goes on {on}."
    (part,) = step.parts
    map_ = part.map
    subject = "scale goes" if map_.only_scales else "shift goes" if map_.only_shifts else "scale and shift go"
    return f"Its {subject} {f'on {on}' if back is None else f'back {back}'}."


def _halves(before: Map) -> tuple[str, str]:
    """Return the parts of a map that is cut in two: see :func:`batchnorm.folding.planning.splits.splits`."""
    if before.only_shifts:
        return "x + t/s", "the scale s"
    if before.only_scales:
        return "the scale s", "the shift t"
    return "sign(s)·x + t/|s|", "the scale |s|"


def _into(part: Part, crossed: Sequence[Call]) -> str:
    return f"into {_named(part.layers)}{_across(crossed, ', ')}"


def _across(crossed: Sequence[Call], separator: str) -> str:
    operators = list(dict.fromkeys(family(call) for call in crossed))
    return f"{separator}across {listed(operators, _MOST_NAMED)}" if operators else ""


def _named(absorbers: Sequence[AbsorbingLayer]) -> str:
    by_kind: dict[str, list[str]] = {}
    for absorber in absorbers:
        by_kind.setdefault(absorber.operator.noun, []).append(absorber.name or "of the model itself")
    groups = [f"the {kind}{'s' * (len(names) > 1)} {listed(names, _MOST_NAMED)}" for kind, names in by_kind.items()]
    return ", and ".join(groups)


def _staying(model: Module, step: Step) -> list[str]:
    """Return what stays of a norm's module, by the names of the classes."""
    norm = model.get_submodule(step.module)
    parts = [norm.get_submodule(part) if isinstance(part, str) else part for part in step.replacement.parts]
    return [type(part).__name__ for part in parts if not isinstance(part, Identity)]
