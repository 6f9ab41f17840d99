"""Which operators an affine map can cross: the register that the rules write themselves into.

Which operators absorb one is not known here: a dataflow brings its own table of them (:class:`Knowledge`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

from torch import Tensor

from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.operator_kinds import family
from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.maps import Map

__all__ = [
    "Absorbed",
    "Absorbing",
    "Demands",
    "Knowledge",
    "Side",
    "backward",
    "forward",
    "go_backward",
    "go_forward",
    "location",
    "number",
]

Side: TypeAlias = Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class Absorbed:
    """An operator computes the map itself, with other parameters.

    Attributes:
        side: whether it is a map of what the operator reads or of what it returns.
        map: the map.
        bordered: whether it has to pad with other values than zeros for that.
    """

    side: Side
    map: Map
    bordered: bool = False


class Absorbing(Protocol):
    """An operator that absorbs maps: it is affine in what it reads, with parameters of its own."""

    def backward(self, call: Call, wanted: Sequence[Map], known: Knowledge) -> Absorbed:
        """Return what a call absorbs so that its outputs become s·y + t.

        Raises:
            Refusal: it cannot.
        """

    def forward(self, call: Call, given: Mapping[Value, Map], known: Knowledge) -> Absorbed:
        """Return what a call absorbs so that its outputs stay what they were, though inputs were s·x + t and are x.

        Raises:
            Refusal: it cannot.
        """


class Knowledge(Protocol):
    """What is known of the model at this point of folding.

    Attributes:
        with_borders: whether convolutions may be made to pad with other values than zeros.
    """

    with_borders: bool

    def absorbing(self, call: Call) -> Absorbing | None:
        """Return how the operator of a call absorbs maps; None where it does not."""

    def tensor(self, value: Value) -> Tensor:
        """Return a parameter or buffer as it is now, in float64.

        Raises:
            Refusal: it is none.
        """


Demands: TypeAlias = "list[tuple[Value, Map]]"
"""What an operator's inputs have to be mapped by; an input that is not there stays as it is."""

Backward: TypeAlias = "Callable[[Call, Sequence[Map], Knowledge], Demands | Absorbed]"
Forward: TypeAlias = "Callable[[Call, Mapping[Value, Map], Knowledge], Sequence[Map] | Absorbed]"

Rule = TypeVar("Rule")
Maps = TypeVar("Maps")
Result = TypeVar("Result")

_BACKWARD: dict[str, Backward] = {}
_FORWARD: dict[str, Forward] = {}


def backward(*names: str) -> Callable[[Backward], Backward]:
    """Register how a map crosses operators from their outputs to their inputs.

    The rule is given the call and the map wanted of each output: its outputs are to become s·y + t. It returns what
    each input has to become for that, or that the operator absorbs the map.
    """

    def register(rule: Backward) -> Backward:
        _BACKWARD.update(dict.fromkeys(names, rule))
        return rule

    return register


def forward(*names: str) -> Callable[[Forward], Forward]:
    """Register how a map crosses operators from their inputs to their outputs.

    The rule is given the call and, for inputs that have changed, the map from what each is now, x, to what it was,
    s·x + t. It returns the same for each output, or that the operator absorbs the map.
    """

    def register(rule: Forward) -> Forward:
        _FORWARD.update(dict.fromkeys(names, rule))
        return rule

    return register


def go_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands | Absorbed:
    """Apply the rule of an operator to the maps that are wanted of its outputs.

    Raises:
        Refusal: there is none, or the map cannot cross.
    """
    operator = known.absorbing(call)
    rule = _rule_of(call, _BACKWARD) if operator is None else operator.backward
    if rule is None:
        raise Refusal(f"It reads the output of {location(call)}, which is no linear operator.", calls=[call])
    return _applied(rule, call, wanted, known)


def go_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map] | Absorbed:
    """Apply the rule of an operator to the maps that are given of its inputs.

    Raises:
        Refusal: there is none, or the map cannot cross.
    """
    operator = known.absorbing(call)
    rule = _rule_of(call, _FORWARD) if operator is None else operator.forward
    if rule is None:
        raise Refusal(f"{location(call)} reads it, which is no linear operator.", calls=[call])
    return _applied(rule, call, given, known)


def _rule_of(call: Call, rules: Mapping[str, Rule]) -> Rule | None:
    return rules.get(family(call)) if call.op.namespace == "aten" else None


def _applied(rule: Callable[[Call, Maps, Knowledge], Result], call: Call, maps: Maps, known: Knowledge) -> Result:
    with Refusal.at(call):
        _require_no_empty_part(call)
        return rule(call, maps, known)


def _require_no_empty_part(call: Call) -> None:
    """Refuse an operator that takes nothing of a tensor, or puts nothing beside it: at other sizes it may be something.

    Raises:
        Refusal: it does.
    """
    read = list(call.tensor_args())
    own = any(value.kind == "state" and 0 in value.shape for value in read)  # no channels: so it is at all sizes
    if not own and len({0 in value.shape for value in (*read, *call.outputs)}) > 1:
        raise Refusal(f"{location(call)} meets a part that is empty here, and need not be at other sizes.")


def location(call: Call) -> str:
    """Return an operator and where it runs, for a sentence."""
    return f"{call.name} in {call.module}" if call.module else call.name


def number(value: object) -> float | None:
    """Return an argument that is a plain number; None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
