"""The way of one map from where it is taken off to where it is absorbed, along all branches."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
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
        map: leads back from what it is now to what it was.
        readers: who reads it so; all others read it as it is now.
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
        shared: those of them that somebody else reads too, who has to be led back to what they were.
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

    Values are met in the order from the last operator to the first, so that all who read one have said what they want
    of it before it is asked for.

    Args:
        graph: the dataflow.
        start: values, who reads each, and what is wanted of it.
        known: the parameters.
        is_gone: whether a norm has been taken away: it hands on what it gets.
        sharing: whether other operators may read a value on the way: they need it led back, to (v − t)/s.

    Raises:
        Refusal: some branch ends where nothing can absorb it, or somebody else reads a value on the way.
    """
    route = Route()
    wanted: dict[Value, list[tuple[Call, Map]]] = defaultdict(list)
    queue: list[int] = []
    producers: dict[int, Call] = {}

    def want(value: Value, reader: Call, map_: Map) -> None:
        producer = _producer(value)
        wanted[value].append((reader, map_))
        if producer.index not in producers:
            producers[producer.index] = producer
            heapq.heappush(queue, -producer.index)

    own = {reader: map_ for _, reader, map_ in start}
    for value, reader, map_ in start:
        want(value, reader, map_)
    while queue:
        call = producers[-heapq.heappop(queue)]
        shared = route.shared if sharing else None
        maps = [_agreed(graph, output, wanted.get(output, []), known, own, shared) for output in call.outputs]
        route.crossed |= {output for output in call.outputs if output in wanted}
        if call in own:  # it follows itself: what it wants, and then what is wanted of it
            value = call.args["input"]
            wanted[value] = [(r, own[call].then(maps[0]) if r is call else m) for r, m in wanted[value]]
            continue
        if is_gone(call):
            want(call.args["input"], call, maps[0])
            continue
        result = go_backward(call, maps, known)
        if isinstance(result, Absorbed):
            route.absorbed.append((call, result))
            continue
        for value, map_ in result:
            if not map_.is_identity:
                want(value, call, map_)
    return route


def _agreed(
    graph: Graph,
    value: Value,
    wanted: Sequence[tuple[Call, Map]],
    known: Knowledge,
    own: Collection[Call],
    shared: list[Start] | None,
) -> Map:
    """Return what all readers want of a value; the identity if none of them wants anything.

    Operators that want nothing are noted in ``shared``, if that is given.

    Raises:
        Refusal: one wants something else, or nothing.
    """
    if not wanted:
        return Map.identity(len(value.shape))
    first = wanted[0][1]
    calm = {id(call) for call, _ in wanted}
    calm |= {id(call) for call in graph.readers(value) if id(call) not in calm and _unmoved(call, value, first, known)}
    others = graph.others_than(value, calm)
    operators = tuple(call for call in graph.readers(value) if id(call) not in calm)
    if others and shared is not None and len(others) == len(operators) and bool((first.scale != 0).all()):
        shared.append(Start(value, first.inverse(), operators))
    elif others:
        reader = wanted[0][0]
        through = "" if reader in own else f", which it gets through {location(reader)},"
        raise Refusal(
            f"The output of {location(_producer(value))}{through} is also read by {listed(others, _MOST_NAMED)}.",
            calls=operators,
        )
    if not all(first.same_as(map_) for _, map_ in wanted[1:]):
        raise Refusal(
            f"Those who read the output of {location(_producer(value))} need it changed in different ways.",
            calls=[call for call, map_ in wanted if not first.same_as(map_)],
        )
    return first


def _unmoved(call: Call, value: Value, map_: Map, known: Knowledge) -> bool:
    """Whether an operator takes from a value only what the map leaves as it is: other channels, say."""
    try:
        results = go_forward(call, {value: map_}, known)
    except Refusal:
        return False
    return not isinstance(results, Absorbed) and all(result.is_identity for result in results)


def _producer(value: Value) -> Call:
    call = value.producer
    if call is None:
        what = {"input": "an input of the model", "state": "a parameter or buffer"}.get(value.kind, "a constant")
        raise Refusal(f"It reads {what}, which no linear operator precedes.")
    if not any(output is value for output in call.outputs):
        raise Refusal(f"It reads the output of {call.name}, which wrote into it through another tensor.")
    return call


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
        start: the calls, and the map that leads back from what the output of each is now.
        known: the parameters.
        is_gone: whether a norm has been taken away: it hands on what it gets.
        shared: values that some operators only are to be led back from; they do not count as crossed.

    Raises:
        Refusal: some branch ends where nothing can absorb it: at an output of the model, say.
    """
    route = Route()
    given: dict[Value, Map] = {}
    queue: list[int] = []
    readers: dict[int, Call] = {}
    partly = {item.value: item for item in shared}

    def here(call: Call) -> dict[Value, Map]:
        led_back = {value: item.map for value, item in partly.items() if call in item.readers}
        return {value: map_ for value in call.tensor_args() if (map_ := (given | led_back).get(value)) is not None}

    def push(reader: Call) -> None:
        if reader.index not in readers:
            readers[reader.index] = reader
            heapq.heappush(queue, reader.index)

    own = dict(start)

    def give(value: Value, map_: Map) -> None:
        others = graph.others_than(value, {id(call) for call in graph.readers(value)})
        if others:
            crossed = value.producer is not None and value.producer not in own
            what = f"The output of {location(_producer(value))}" if crossed else "Its output"
            raise Refusal(f"{what} is read by {listed(others, _MOST_NAMED)}.")
        if not graph.readers(value):
            raise Refusal("Nobody reads it.")
        given[value] = map_
        for reader in graph.readers(value):
            push(reader)

    for call, map_ in start:
        give(call.output, map_)
    for item in shared:
        for reader in item.readers:
            push(reader)
    while queue:
        call = readers[heapq.heappop(queue)]
        maps = here(call)
        if call in own:  # it follows itself: what was done before, and then what it did
            given[call.output] = maps[call.args["input"]].then(own[call])
            continue
        if is_gone(call):
            results: Sequence[Map] | Absorbed = [maps[call.args["input"]]]
        else:
            results = go_forward(call, maps, known)
        if isinstance(results, Absorbed):
            route.absorbed.append((call, results))
            continue
        for output, map_ in zip(call.outputs, results, strict=True):
            if not map_.is_identity:
                give(output, map_)
    route.crossed |= set(given)
    return route
