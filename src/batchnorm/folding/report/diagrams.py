"""Pictures of the parts of a graph that folding changed, and of what stood in its way: as data, alike ones once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from batchnorm.dataflow.graph import Call
from batchnorm.folding.planning.plan import FoldPlan, Step
from batchnorm.folding.report.neighbourhood import around, nearest, sources, ways_to
from batchnorm.folding.report.outcome import FoldedNorm, LeftNorm
from batchnorm.folding.report.sentences import crossed_calls
from batchnorm.models.parameters import find_tensor
from batchnorm.report import Diagram, Diagrams, Panel
from batchnorm.report.document import Role

__all__ = ["draw_folded", "draw_left"]

_MOST_PICTURES, _MOST_CALLS, _MOST_OBSTACLES, _MOST_IN_TITLE = 12, 14, 3, 6
_ROLES_OF_FOLDED: Sequence[tuple[Role, str]] = (
    ("gone", "the norm, gone"),
    ("crossed", "crossed by it"),
    ("changed", "absorbed it"),
)
_ROLES_OF_LEFT: Sequence[tuple[Role, str]] = (("kept", "the norm, left"), ("blocking", "stands in its way"))


@dataclass(frozen=True)
class _Drawn:
    """A picture, whose it is, and what makes others the same."""

    norm: str
    diagram: Diagram
    pattern: object


def draw_folded(plan: FoldPlan, folded: Sequence[FoldedNorm]) -> Diagrams:
    """Return what is around each norm that goes, before and after. The plan's model is not folded yet."""
    steps = {step.name: step for step in plan.steps}
    return _grouped([_folded(plan, steps[item.norm], item) for item in folded], _ROLES_OF_FOLDED)


def draw_left(plan: FoldPlan, left: Sequence[LeftNorm], calls: Mapping[str, Call]) -> Diagrams:
    """Return what is around each norm that stays, up to the operators that stand in its way.

    Args:
        plan: what is done with the model.
        left: the norms.
        calls: the first call of each norm that runs, by the norm's name.
    """
    obstacles = {norm.name: norm.obstacles for norm in plan.staying}
    drawn = [_left(plan, calls[item.norm], item, obstacles[item.norm]) for item in left if item.norm in calls]
    return _grouped(drawn, _ROLES_OF_LEFT)


def _folded(plan: FoldPlan, step: Step, norm: FoldedNorm) -> _Drawn:
    absorbers = {call: absorber for absorber in step.into for call in absorber.calls}
    crossed = crossed_calls(step, plan)
    roles: dict[Call, Role] = {**dict.fromkeys(crossed, "crossed"), **dict.fromkeys(absorbers, "changed")}
    between = [call for call in plan.gone if not step.crossed.isdisjoint(call.outputs)]
    roles |= dict.fromkeys([*between, *step.use.calls], "gone")
    core = nearest(plan.graph, step.use.calls[0], set(roles), _MOST_CALLS)
    view = around(plan.graph, core, plan.gone, absorbers)
    changed = {
        call: _changed_name(call, absorber.name, absorber.bias_name, plan) for call, absorber in absorbers.items()
    }
    before = view.panel("before", roles)
    after = view.without(plan.gone).panel("after", roles, changed)
    return _drawn(norm.norm, _chain(before), [before, after], norm.sentence)


def _changed_name(call: Call, absorber: str, bias: str | None, plan: FoldPlan) -> str:
    name = call.name
    if absorber in plan.parameters.borders:
        name += ", padded with −t/s"
    new = bias in plan.parameters.changed and find_tensor(plan.parameters.model, bias) is None
    return f"{name} + bias" if new else name


def _left(plan: FoldPlan, norm: Call, left: LeftNorm, obstacles: Collection[Call]) -> _Drawn:
    core = ways_to(plan.graph, norm, obstacles, _MOST_OBSTACLES)
    roles: dict[Call, Role] = dict.fromkeys(core, "plain")
    roles |= dict.fromkeys(core.intersection(obstacles), "blocking")
    roles[norm] = "kept"
    panel = around(plan.graph, core, (), core - {norm}).panel("", roles)
    before = [source.name for source in sources(norm)][:1]
    after = [reader.name for reader in plan.graph.readers(norm.outputs[0])][:1]
    return _drawn(left.norm, " → ".join([*before, norm.name, *after]), [panel], left.reason)


def _drawn(norm: str, title: str, panels: Sequence[Panel], caption: str) -> _Drawn:
    pattern = tuple((tuple((node.name, node.role) for node in p.nodes), tuple(p.edges)) for p in panels)
    return _Drawn(norm, Diagram(title, panels, [norm], caption), pattern)


def _chain(panel: Panel) -> str:
    """Return the operators of a drawing in a row, the middle left out where they are many."""
    names = [node.name for node in panel.nodes if node.detail]
    if len(names) > _MOST_IN_TITLE:
        half = _MOST_IN_TITLE // 2
        names = [*names[:half], "…", *names[-half:]]
    return " → ".join(names)


def _grouped(drawn: Iterable[_Drawn], roles: Sequence[tuple[Role, str]]) -> Diagrams:
    """Return each picture once, the most frequent ones first, and a last one without a drawing for those too many."""
    groups: dict[object, list[_Drawn]] = {}
    for one in drawn:
        groups.setdefault(one.pattern, []).append(one)
    ordered = sorted(groups.values(), key=len, reverse=True)
    shown = [replace(group[0].diagram, names=[one.norm for one in group]) for group in ordered[:_MOST_PICTURES]]
    if len(ordered) > _MOST_PICTURES:
        rest = [one.norm for group in ordered[_MOST_PICTURES:] for one in group]
        shown.append(Diagram(f"{len(ordered) - _MOST_PICTURES} other neighbourhoods, not drawn", [], rest))
    seen = {node.role for diagram in shown for panel in diagram.panels for node in panel.nodes}
    return Diagrams(shown, [(role, words) for role, words in roles if role in seen])
