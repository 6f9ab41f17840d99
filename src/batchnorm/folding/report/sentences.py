"""What became of each norm of a plan: who absorbed which part, across what, and what that saves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from torch.nn import Identity, Module

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.dataflow.graph import Call
from batchnorm.dataflow.operator_kinds import family
from batchnorm.dataflow.refusal import listed
from batchnorm.folding.planning.absorbing_layer import AbsorbingLayer
from batchnorm.folding.planning.plan import FoldPlan, Step
from batchnorm.folding.report.cost import Saving
from batchnorm.folding.report.outcome import FoldedNorm
from batchnorm.models.parameters import find_tensor

__all__ = ["crossed_calls", "tell"]

_MOST_NAMED = 4


def tell(plan: FoldPlan) -> list[FoldedNorm]:
    """Return what becomes of the norms that go, in the order of execution. The plan's model is not folded yet."""
    told: dict[str, FoldedNorm] = {}
    seen: set[str] = set()
    for step in plan.steps:  # in the order in which they were absorbed: the first to need a bias, or a border, made it
        new = {key for absorber in step.into for key in _made_for(absorber, step, plan)} - seen
        seen |= new
        told[step.name] = _told_of(step, plan, new)
    return [told[name] for name in sorted(told, key=plan.order.__getitem__)]


def _made_for(absorber: AbsorbingLayer, step: Step, plan: FoldPlan) -> list[str]:
    """Return what a host did not have before: a bias, and a border, by its name."""
    name = absorber.bias_name
    bias = name is not None and name in plan.parameters.changed and find_tensor(plan.parameters.model, name) is None
    border = absorber.name in plan.parameters.borders and absorber in _after(step) and not _only_scales(step)
    return [f"bias of {absorber.name}"] * bias + [f"border of {absorber.name}"] * border


def _told_of(step: Step, plan: FoldPlan, new: Collection[str]) -> FoldedNorm:
    """Return what becomes of one norm.

    Args:
        step: what is done with it.
        plan: all that is done.
        new: biases and borders that layers have because of it.
    """
    bordered = [absorber for absorber in step.into if f"border of {absorber.name}" in new]
    biased = [call for absorber in step.into if f"bias of {absorber.name}" in new for call in absorber.calls]
    kinds = dict.fromkeys(absorber.operator.kind for absorber in step.into)
    return FoldedNorm(
        step.name,
        ", ".join(absorber.name for absorber in step.into),
        ", ".join(kinds),
        _way(step),
        _sentence(step, plan, bordered),
        tuple(dict.fromkeys(family(call) for call in crossed_calls(step, plan))),
        Saving.of(
            step.use.calls,
            [call for call in biased if linear_operator_of(call) is not None],
            [call for absorber in bordered for call in absorber.calls],
        ),
    )


def _way(step: Step) -> Literal["back", "on", "both", "beside"]:
    if step.beside is not None:
        return "beside"
    return "back" if step.after is None else "on" if step.before is None else "both"


def crossed_calls(step: Step, plan: FoldPlan) -> list[Call]:
    """Return the operators between a norm and those who absorb it, in order: those that stay."""
    ends = {*step.use.calls, *(call for absorber in step.into for call in absorber.calls)} | plan.gone
    calls = {value.producer for value in step.crossed if value.producer is not None} - ends
    return sorted(calls, key=lambda call: call.index)


def _sentence(step: Step, plan: FoldPlan, bordered: Sequence[AbsorbingLayer]) -> str:
    crossed = crossed_calls(step, plan)
    if step.beside is not None:
        across = list(dict.fromkeys(family(call) for call in crossed))
        way = f" across {listed(across, _MOST_NAMED)}" if across else ""
        return (
            f"It is added{way} to {_named(step.into)}, which reads the same and takes its shift into the bias, and its "
            "scale, less the 1 of the identity that stays, into the middle of the kernel."
        )
    start = step.use.calls[0].index
    back = _into(_before(step), [c for c in crossed if c.index < start])
    on = _into(_after(step), [c for c in crossed if c.index > start])
    if step.before is None or step.after is None:
        way, verb = (back, "back") if step.after is None else (on, "on")
        parts = "scale goes" if _only_scales(step) else "shift goes" if _only_shifts(step) else "scale and shift go"
        sentence = f"Its {parts} {verb} {way}."
    else:
        first, second = _halves(step)
        sentence = f"It is cut in two: {first} goes back {back}; {second} goes on {on}."
    inverse = [absorber for absorber in step.into if absorber.name in step.inverse_absorbers]
    if inverse:
        named = _named(inverse)
        says = "takes the inverse in: it reads" if len(inverse) == 1 else "take the inverse in: they read"
        sentence += f" {named[0].upper()}{named[1:]} {says} what that changes."
    if bordered:
        names = listed([absorber.name for absorber in bordered], _MOST_NAMED)
        sentence += f" {names} {'pads' if len(bordered) == 1 else 'pad'} with −t/s now, of which the norm made zero."
    staying = _staying(plan.parameters.model, step)
    if staying:
        sentence += f" Its {listed(staying)} {'stays' if len(staying) == 1 else 'stay'} in place."
    return sentence


def _halves(step: Step) -> tuple[str, str]:
    """Return the parts of a map that is cut in two: see :func:`batchnorm.folding.planning.splits.attempts`."""
    assert step.before is not None
    assert step.after is not None
    if step.before.only_shifts:
        return "x + t/s", "the scale s"
    if step.before.only_scales:
        return "the scale s", "the shift t"
    return "sign(s)·x + t/|s|", "the scale |s|"


def _into(absorbers: Sequence[AbsorbingLayer], crossed: Sequence[Call]) -> str:
    across = list(dict.fromkeys(family(call) for call in crossed))
    return f"into {_named(absorbers)}" + (f", across {listed(across, _MOST_NAMED)}" if across else "")


def _named(absorbers: Sequence[AbsorbingLayer]) -> str:
    by_kind: dict[str, list[str]] = {}
    for absorber in absorbers:
        by_kind.setdefault(absorber.operator.noun, []).append(absorber.name or "of the model itself")
    groups = [f"the {kind}{'s' * (len(names) > 1)} {listed(names, _MOST_NAMED)}" for kind, names in by_kind.items()]
    return ", and ".join(groups)


def _before(step: Step) -> list[AbsorbingLayer]:
    start = step.use.calls[0].index
    whole = step.after is None
    own = [absorber for absorber in step.into if absorber.name not in step.inverse_absorbers]
    return [absorber for absorber in own if whole or (step.before is not None and absorber.calls[0].index < start)]


def _after(step: Step) -> list[AbsorbingLayer]:
    before = _before(step)
    return [
        absorber for absorber in step.into if absorber not in before and absorber.name not in step.inverse_absorbers
    ]


def _only_scales(step: Step) -> bool:
    part = step.after if step.after is not None else step.before
    return part is not None and part.only_scales


def _only_shifts(step: Step) -> bool:
    part = step.after if step.after is not None else step.before
    return part is not None and part.only_shifts


def _staying(model: Module, step: Step) -> list[str]:
    """Return what stays of a norm's module, by the names of the classes."""
    norm = model.get_submodule(step.module)
    parts = [norm.get_submodule(part) if isinstance(part, str) else part for part in step.stays.parts]
    return [type(part).__name__ for part in parts if not isinstance(part, Identity)]
