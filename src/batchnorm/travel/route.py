"""The route of one map from where it is taken off to where it is absorbed, along all branches.

Backward, every operator that reads a value says what the value has to become (``s·v + t``) before the operator that
computed the value is asked; forward, every operator is asked once it is known what each of its inputs was. Hence
operators are visited in the order of execution, or from the last to the first, and each of them once.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.refusal import Refusal, listed
from batchnorm.travel import arrange, join, pointwise, pooling  # noqa: F401 - they register their rules
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Absorbed, Knowledge, go_backward, go_forward, location

__all__ = ["Route", "Start", "carry_backward", "carry_forward"]

_MOST_NAMED = 3


@dataclass(frozen=True, eq=False)
class Start:
    """A value from which a map is carried forward.

    Attributes:
        value: the value.
        map: maps what the value is now to what it was.
        readers: the operators that need what it was; all others read it as it is now.
    """

    value: Value
    map: Map
    readers: tuple[Call, ...]


@dataclass
class Route:
    """Where a map ends.

    Attributes:
        absorbed: what each operator at an end has to compute in addition.
        crossed: the values in between, which change.
        shared: those of them that other operators read too, which need what the values were.
    """

    absorbed: list[tuple[Call, Absorbed]] = field(default_factory=list)
    crossed: set[Value] = field(default_factory=set)
    shared: list[Start] = field(default_factory=list)


def carry_backward(
    graph: Graph,
    start: Sequence[tuple[Value, Call, Map]],
    known: Knowledge,
    is_gone: Callable[[Call], bool],
    *,
    sharing: bool = False,
) -> Route:
    """Find where values can be made s·v + t of before they are read.

    Args:
        graph: the dataflow.
        start: values, the norm's call that reads each, and what is wanted of it.
        known: the parameters.
        is_gone: whether a norm has been taken away: it passes its input on.
        sharing: whether other operators may read a value on the way: they need what it was, (v − t)/s.

    Raises:
        Refusal: some branch ends where nothing can absorb it, or something else reads a value on the way.
    """
    carrier = _Backward(graph, known, is_gone, {norm: map_ for _, norm, map_ in start}, sharing)
    for value, norm, map_ in start:
        carrier.want(value, norm, map_)
    for call in carrier.waiting:
        carrier.cross(call)
    return carrier.route


def carry_forward(
    graph: Graph,
    start: Sequence[tuple[Call, Map]],
    known: Knowledge,
    is_gone: Callable[[Call], bool],
    shared: Sequence[Start] = (),
) -> Route:
    """Find where it can be made up for that the outputs of calls are v, which were s·v + t.

    Args:
        graph: the dataflow.
        start: the norm's calls, and the map from what the output of each is now to what it was.
        known: the parameters.
        is_gone: whether a norm has been taken away: it passes its input on.
        shared: values of which only some operators need what they were; they do not count as crossed.

    Raises:
        Refusal: some branch ends where nothing can absorb it: at an output of the model, say.
    """
    carrier = _Forward(graph, known, is_gone, dict(start), {item.value: item for item in shared})
    for norm, map_ in start:
        carrier.change(norm.output, map_)
    for item in shared:
        carrier.waiting.add(*item.readers)
    for call in carrier.waiting:
        carrier.cross(call)
    carrier.route.crossed |= set(carrier.changed)
    return carrier.route


class _Waiting:
    """Operators to be visited, each once: in the order of execution, or from the last to the first."""

    def __init__(self, *, backward: bool) -> None:
        self._sign = -1 if backward else 1
        self._queue: list[tuple[int, Call]] = []
        self._known: set[Call] = set()

    def add(self, *calls: Call) -> None:
        for call in calls:
            if call not in self._known:
                self._known.add(call)
                heapq.heappush(self._queue, (self._sign * call.index, call))

    def __iter__(self) -> Iterator[Call]:
        while self._queue:
            yield heapq.heappop(self._queue)[1]


@dataclass(eq=False)
class _Carrier:
    """What both directions know: the dataflow, the parameters, and the norms' own maps by their calls."""

    graph: Graph
    known: Knowledge
    is_gone: Callable[[Call], bool]
    norms: Mapping[Call, Map]
    route: Route = field(default_factory=Route, init=False)


@dataclass(eq=False)
class _Backward(_Carrier):
    """What is wanted of each value so far, and by which operators."""

    sharing: bool
    waiting: _Waiting = field(default_factory=lambda: _Waiting(backward=True), init=False)
    _wanted: dict[Value, list[tuple[Call, Map]]] = field(default_factory=lambda: defaultdict(list), init=False)

    def want(self, value: Value, reader: Call, map_: Map) -> None:
        self.waiting.add(_producer(value))
        self._wanted[value].append((reader, map_))

    def cross(self, call: Call) -> None:
        """Ask an operator for what is wanted of its outputs."""
        maps = [self._agreed(output) for output in call.outputs]
        self.route.crossed |= self._wanted.keys() & set(call.outputs)
        if call in self.norms:  # the norm follows itself: what it wants, and then what is wanted of it
            value, own = call.args["input"], self.norms[call].then(maps[0])
            self._wanted[value] = [(reader, own if reader is call else m) for reader, m in self._wanted[value]]
            return
        if self.is_gone(call):
            self.want(call.args["input"], call, maps[0])
            return
        result = go_backward(call, maps, self.known)
        if isinstance(result, Absorbed):
            self.route.absorbed.append((call, result))
            return
        for value, map_ in result:
            if not map_.is_identity:
                self.want(value, call, map_)

    def _agreed(self, value: Value) -> Map:
        """Return what all operators that read a value want of it; the identity if none of them wants anything.

        Raises:
            Refusal: they want different things, or one wants nothing and may not take in the inverse.
        """
        wanted = self._wanted.get(value, [])
        if not wanted:
            return Map.identity(len(value.shape))
        reader, map_ = wanted[0]
        content = {call for call, _ in wanted}
        content |= {c for c in self.graph.readers(value) if c not in content and self._is_unaffected(c, value, map_)}
        others = self.graph.other_readers(value, content)
        operators = tuple(call for call in self.graph.readers(value) if call not in content)
        if others and self.sharing and len(others) == len(operators) and bool((map_.scale != 0).all()):
            self.route.shared.append(Start(value, map_.inverse(), operators))
        elif others:
            through = "" if reader in self.norms else f", which it gets through {location(reader)},"
            raise Refusal(
                f"The output of {location(_producer(value))}{through} is also read by {listed(others, _MOST_NAMED)}.",
                calls=operators,
            )
        different = [call for call, other in wanted[1:] if not map_.same_as(other)]
        if different:
            raise Refusal(
                f"Operators that read the output of {location(_producer(value))} need it changed in different ways.",
                calls=different,
            )
        return map_

    def _is_unaffected(self, call: Call, value: Value, map_: Map) -> bool:
        """Whether an operator takes from a value only what the map leaves as it is: other channels, say."""
        try:
            results = go_forward(call, {value: map_}, self.known)
        except Refusal:
            return False
        return not isinstance(results, Absorbed) and all(result.is_identity for result in results)


@dataclass(eq=False)
class _Forward(_Carrier):
    """The values that have changed so far, each with the map from what it is now to what it was."""

    shared: Mapping[Value, Start]
    waiting: _Waiting = field(default_factory=lambda: _Waiting(backward=False), init=False)
    changed: dict[Value, Map] = field(default_factory=dict, init=False)

    def change(self, value: Value, map_: Map) -> None:
        readers = self.graph.readers(value)
        others = self.graph.other_readers(value, readers)
        if others:
            crossed = value.producer is not None and value.producer not in self.norms
            what = f"The output of {location(_producer(value))}" if crossed else "Its output"
            raise Refusal(f"{what} is read by {listed(others, _MOST_NAMED)}.")
        if not readers:
            raise Refusal("Nothing reads it.")
        self.changed[value] = map_
        self.waiting.add(*readers)

    def cross(self, call: Call) -> None:
        """Ask an operator what its outputs were, given what its inputs were."""
        maps = self._maps_read_by(call)
        if call in self.norms:  # the norm follows itself: what was done before, and then what it did
            self.changed[call.output] = maps[call.args["input"]].then(self.norms[call])
            return
        results: Sequence[Map] | Absorbed
        results = [maps[call.args["input"]]] if self.is_gone(call) else go_forward(call, maps, self.known)
        if isinstance(results, Absorbed):
            self.route.absorbed.append((call, results))
            return
        for output, map_ in zip(call.outputs, results, strict=True):
            if not map_.is_identity:
                self.change(output, map_)

    def _maps_read_by(self, call: Call) -> dict[Value, Map]:
        found = {value: self.changed[value] for value in call.tensor_args() if value in self.changed}
        starts = (self.shared.get(value) for value in call.tensor_args())
        return found | {start.value: start.map for start in starts if start is not None and call in start.readers}


def _producer(value: Value) -> Call:
    call = value.producer
    if call is None:
        what = {"input": "an input of the model", "state": "a parameter or buffer"}.get(value.kind, "a constant")
        raise Refusal(f"It reads {what}, which no linear operator precedes.")
    if not any(output is value for output in call.outputs):
        raise Refusal(f"It reads the output of {call.name}, which wrote into it through another tensor.")
    return call
