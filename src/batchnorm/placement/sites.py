"""Where a norm belongs: the layers whose output goes to an activation, and what stands in the way there.

Ioffe & Szegedy 2015, section 3.2, put the norm immediately before the nonlinearity, z = g(BN(W u)), for fully connected
and for convolutional layers alike: W u is closer to a symmetric, dense distribution than the output of another
nonlinearity is, and the bias goes, because the subtraction of the mean would cancel it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.operator_kinds import (
    BATCH_NORMS,
    BETWEEN,
    NORMS,
    PRODUCTS,
    READS_FEATURES,
    RESHAPING,
    Kind,
    activation_kind,
    family,
)

__all__ = ["Flow", "Placement", "find_placements", "norm_calls", "obstacle"]

Role = Literal["hidden", "gate", "gate branch", "output"]


@dataclass(frozen=True, eq=False)
class Placement:
    """A layer and the activation that its output goes to, with no norm in between.

    Attributes:
        layer: the convolution or linear operator.
        activation: the operator that reads its output, perhaps across dropout or pooling.
        kind: whether the activation rectifies or saturates.
        role: what the activation is for. The value of a ``"gate"`` is multiplied with another tensor; a
            ``"gate branch"`` does nothing but compute one; after an ``"output"`` activation no further layer comes.
        others: who else reads what goes from the layer to the activation, as phrases.
        summed: the layer's output is added to something else before the activation.
        normed_after: a batch norm reads the activation's output.
        norms_in_stack: there is a batch norm upstream or downstream of the site.
    """

    layer: Call
    activation: Call
    kind: Kind
    role: Role
    others: tuple[str, ...]
    summed: bool
    normed_after: bool
    norms_in_stack: bool


def norm_calls(graph: Graph) -> list[Call]:
    """Return the batch norm calls on data, in order; those that standardize a weight are none."""
    weights = _from_state(graph)
    norms = [call for call in graph.calls if family(call) in BATCH_NORMS]
    return [call for call in norms if call.args["input"].kind != "state" and call.args["input"] not in weights]


def _from_state(graph: Graph) -> set[Value]:
    """Return the values that are computed from parameters and buffers alone."""
    found: set[Value] = set()
    for call in graph.calls:
        read = list(call.tensor_args())
        if read and all(value.kind == "state" or value in found for value in read):
            found.update(call.outputs)
    return found


def find_placements(graph: Graph) -> Iterator[Placement]:
    """Yield every place where a layer's output goes to an activation without a norm on the way, in order."""
    flow = Flow(graph)
    for call in graph.calls:
        if linear_operator_of(call) is not None:
            yield from _sites_after(graph, flow, call)


def _sites_after(graph: Graph, flow: Flow, layer: Call) -> Iterator[Placement]:
    value, others, summed = layer.output, list[str](), False
    while True:
        readers = graph.readers(value)
        if any(family(reader) in NORMS for reader in readers):
            return
        activations = [reader for reader in readers if activation_kind(reader) is not None]
        passing = [reader for reader in readers if family(reader) in BETWEEN and len(reader.outputs) == 1]
        sums = [] if summed else [reader for reader in readers if family(reader) == "add"]
        chosen = activations or passing or sums
        if not chosen:
            return
        others += graph.other_readers(value, chosen[:1])
        if activations:
            break
        summed = summed or chosen is sums
        value = chosen[0].output
    activation = activations[0]
    kind = activation_kind(activation)
    assert kind is not None
    yield Placement(
        layer=layer,
        activation=activation,
        kind=kind,
        role=flow.role(activation),
        others=tuple(dict.fromkeys(others)),
        summed=summed,
        normed_after=any(family(reader) in BATCH_NORMS for reader in graph.readers(activation.output)),
        norms_in_stack=flow.follows_norm(layer) or flow.reaches_norm(activation),
    )


def obstacle(site: Placement) -> str | None:
    """Return why no norm belongs between the site's layer and its activation, as a sentence; None if one does."""
    name = family(site.activation)
    if site.role == "gate":
        return f"The {name} is a gate: its value is multiplied with another tensor, and has to be free to close."
    if site.role == "gate branch":
        return "The layer does nothing but compute a gate, from values that it has to see as they are."
    if site.role == "output":
        return f"The {name} is an output activation: no further layer reads it, and its scale is the model's answer."
    if site.normed_after:
        return f"A norm follows the {name}. Rather move that one in front of it than add a second."
    if site.summed:
        return (
            f"Its output is added to another value before the {name}; which of the two to normalize is a choice "
            "of architecture."
        )
    if site.others:
        return f"Its output has other readers, which would get normalized values too: {', '.join(site.others)}."
    return _axis_obstacle(site.layer)


def _axis_obstacle(layer: Call) -> str | None:
    """Return why the layer's channels are not on axis 1, where a batch norm expects them; None if they are."""
    rank, operator = len(layer.output.shape), linear_operator_of(layer)
    assert operator is not None
    if operator.channel_axis(rank) == 1:
        return None
    if operator.trailing:
        return f"The {operator.noun} runs on a single sample, {rank} axes, without a batch axis."
    return (
        f"The {operator.noun}'s output has shape {layer.output.shape}: its channels are the last axis, and a batch "
        "norm takes axis 1 for them."
    )


def _reads_features(call: Call) -> bool:
    return linear_operator_of(call) is not None or family(call) in READS_FEATURES


class Flow:
    """What comes before and after each value: norms, layers, gates."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._norms = set(norm_calls(graph))
        self._weights = _from_state(graph)
        self._follows_norm: set[Value] = set()
        self._gates: set[Value] = set()
        self._reaches_norm: set[Value] = set()
        self._reaches_layer: set[Value] = set()
        self._ends_in_gates: set[Value] = set()
        for call in graph.calls:  # in order of execution: what comes before is known already
            self._look_back(call)
        for call in reversed(graph.calls):
            self._look_ahead(call)

    def follows_norm(self, call: Call) -> bool:
        """Whether a batch norm lies upstream of the call."""
        return any(value in self._follows_norm for value in call.tensor_args())

    def reaches_norm(self, call: Call) -> bool:
        """Whether a batch norm lies downstream of the call."""
        return any(value in self._reaches_norm for value in call.outputs)

    def role(self, activation: Call) -> Role:
        """Return what an activation is for; see :class:`Placement`."""
        (value,) = activation.outputs
        if activation_kind(activation) == "saturating" and self._is_gate(value):
            return "gate"
        if value not in self._reaches_layer:
            return "output"
        return "gate branch" if value in self._ends_in_gates else "hidden"

    def _look_back(self, call: Call) -> None:
        read = list(call.tensor_args())
        if call in self._norms or any(value in self._follows_norm for value in read):
            self._follows_norm.update(call.outputs)
        handed_on = (
            family(call) in RESHAPING and any(v in self._gates for v in read) and not self._others(call, self._gates)
        )
        if activation_kind(call) == "saturating" or handed_on:
            self._gates.update(call.outputs)

    def _look_ahead(self, call: Call) -> None:
        for value in call.outputs:
            readers = self._graph.readers(value)
            after = [output for reader in readers for output in reader.outputs]
            if not self._norms.isdisjoint(readers) or not self._reaches_norm.isdisjoint(after):
                self._reaches_norm.add(value)
            if any(map(_reads_features, readers)) or not self._reaches_layer.isdisjoint(after):
                self._reaches_layer.add(value)
            if readers and not self._graph.is_output(value) and all(self._ends(value, reader) for reader in readers):
                self._ends_in_gates.add(value)

    def _ends(self, value: Value, reader: Call) -> bool:
        """Whether ``value`` ends in ``reader`` as a gate, or goes on from there to nothing but gates."""
        if value in self._gates and family(reader) in PRODUCTS and self._others(reader, self._gates):
            return True
        return bool(reader.outputs) and self._ends_in_gates.issuperset(reader.outputs)

    def _is_gate(self, value: Value) -> bool:
        """Whether ``value``, reshaped or scaled perhaps, is multiplied with another tensor."""
        waiting = [value]
        while waiting:
            gate = waiting.pop()
            for reader in self._graph.readers(gate):
                others = self._others(reader, {gate})
                if others and family(reader) in PRODUCTS:
                    return True
                if not others and family(reader) in RESHAPING:
                    waiting.extend(reader.outputs)
        return False

    def _others(self, call: Call, gates: set[Value]) -> list[Value]:
        """Return the data that ``call`` computes with besides the gates; parameters and constants do not count."""
        if family(call) in ("expand_as", "view_as"):  # the second tensor lends its shape only
            return []
        read = [v for v in call.tensor_args() if v not in gates and v.kind in ("input", "computed")]
        return [value for value in read if value not in self._weights]
