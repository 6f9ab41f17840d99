"""A few operators of a graph with what is right before and after them, to be drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.report import Node, Panel
from batchnorm.report.document import Role

__all__ = ["Neighbourhood", "around", "nearest", "sources", "ways_to"]

_MOST_BESIDE = 2  # neighbours of one operator, on one side, that are drawn by themselves
_MOST_VISITED = 400  # operators, in the search for one


@dataclass(frozen=True)
class _Place:
    """Something to draw: an operator, or words in its place. ``alias`` stands there when the operator is gone."""

    call: Call | None
    words: str = ""
    detail: str = ""
    alias: _Place | None = None


@dataclass(frozen=True)
class Neighbourhood:
    """Places in the order of execution, and which leads to which."""

    places: Sequence[_Place]
    edges: Sequence[tuple[int, int]]

    def panel(self, title: str, roles: Mapping[Call, Role], names: Mapping[Call, str] | None = None) -> Panel:
        """Return the drawing.

        Args:
            title: of the drawing.
            roles: of the operators that are marked; all others are faint.
            names: of operators that have another one than their own.
        """
        nodes = []
        for place in self.places:
            if place.call is None:
                nodes.append(Node(place.words, place.detail, "faint"))
            else:
                name = (names or {}).get(place.call, place.call.name)
                nodes.append(Node(name, place.call.module, roles.get(place.call, "faint")))
        return Panel(title, nodes, self.edges)

    def without(self, gone: Collection[Call]) -> Neighbourhood:
        """Return the same without some operators: what led to one leads to what it led to."""
        edges = set(self.edges)
        places = list(self.places)
        dropped: set[int] = set()
        for number, place in enumerate(places):
            if place.call not in gone:
                continue
            if place.alias is not None:
                places[number] = place.alias
                continue
            before = [start for start, end in edges if end == number]
            after = [end for start, end in edges if start == number]
            edges = {edge for edge in edges if number not in edge} | {(a, b) for a in before for b in after}
            dropped.add(number)
        numbers = {old: new for new, old in enumerate(i for i in range(len(places)) if i not in dropped)}
        return Neighbourhood([places[old] for old in numbers], sorted((numbers[a], numbers[b]) for a, b in edges))


def around(graph: Graph, core: Collection[Call], gone: Collection[Call], ends: Collection[Call] = ()) -> Neighbourhood:
    """Return operators with what they read and what reads them; many neighbours of one are drawn as one.

    Args:
        graph: the dataflow.
        core: the operators.
        gone: norms that go; beside the core they stand for the operators behind them.
        ends: those of the core whose other neighbours do not matter: dots are drawn in their place.
    """
    drawing = _Drawing(graph, gone, {call: _Place(call) for call in sorted(core, key=lambda call: call.index)})
    for call in list(drawing.calls):
        producers = list(dict.fromkeys(sources(call)))
        for producer in producers:
            if producer in core:
                drawing.link(drawing.calls[producer], drawing.calls[call])
        outside: list[Call | str] = [producer for producer in producers if producer not in core]
        outside += ["input"] if any(value.kind == "input" for value in call.tensor_args()) else []
        readers: list[Call | str] = [r for out in call.outputs for r in graph.readers(out) if r not in core]
        readers += ["output"] if any(graph.is_output(value) for value in call.outputs) else []
        for source in _few(outside, call in ends):
            drawing.above(source, call)
        for reader in _few(list(dict.fromkeys(readers)), call in ends):
            drawing.below(call, reader)
    return drawing.done()


def _few(neighbours: Sequence[Call | str], is_end: bool) -> Sequence[Call | str]:
    """Return neighbours to draw: all, or the first, and that there are others; of an end, that there are some."""
    if is_end:
        return ["…"] if neighbours else []
    if len(neighbours) <= _MOST_BESIDE:
        return neighbours
    return [neighbours[0], "others"]


@dataclass
class _Drawing:
    """A neighbourhood in the making."""

    graph: Graph
    gone: Collection[Call]
    calls: dict[Call, _Place]
    first: list[_Place] = field(default_factory=list)
    last: list[_Place] = field(default_factory=list)
    links: list[tuple[_Place, _Place]] = field(default_factory=list)

    def link(self, start: _Place, end: _Place) -> None:
        self.links.append((start, end))

    def above(self, source: Call | str, call: Call) -> None:
        """Draw what an operator reads."""
        if isinstance(source, str):
            self.first.append(_Place(None, source))
        place = self._place(source, "up") if isinstance(source, Call) else self.first[-1]
        self.link(place, self.calls[call])

    def below(self, call: Call, reader: Call | str) -> None:
        """Draw what reads an operator's output."""
        if isinstance(reader, str):
            self.last.append(_Place(None, reader))
        place = self._place(reader, "down") if isinstance(reader, Call) else self.last[-1]
        self.link(self.calls[call], place)

    def _place(self, call: Call, towards: str) -> _Place:
        if call not in self.calls:
            alias = _alias(self.graph, call, self.gone, towards) if call in self.gone else None
            self.calls[call] = _Place(call, alias=alias)
        return self.calls[call]

    def done(self) -> Neighbourhood:
        """Return it, its places in the order of execution."""
        places = [*self.first, *sorted(self.calls.values(), key=_index), *self.last]
        number = {id(place): i for i, place in enumerate(places)}
        edges = {(number[id(a)], number[id(b)]) for a, b in self.links}
        return Neighbourhood(places, sorted(edge for edge in edges if edge[0] < edge[1]))


def _index(place: _Place) -> int:
    assert place.call is not None
    return place.call.index


def sources(call: Call) -> Iterator[Call]:
    """Yield the operators that computed what a call reads."""
    yield from (value.producer for value in call.tensor_args() if value.producer is not None)


def _alias(graph: Graph, call: Call, gone: Collection[Call], towards: str) -> _Place:
    """Return what stands where a norm stood that is gone: the operator before it, or after it."""
    found: Call | None = call
    while found is not None and found in gone:
        if towards == "up":
            value = found.args["input"]
            found = value.producer if isinstance(value, Value) else None
        else:
            found = next(iter(graph.readers(found.output)), None)
    return _Place(None, "input" if towards == "up" else "output") if found is None else _Place(found)


def nearest(graph: Graph, start: Call, within: Collection[Call], most: int) -> set[Call]:
    """Return at most so many operators of a set, those nearest to one of them."""
    return {call for call, _ in islice(_walk(graph, start, within), most)}


def ways_to(graph: Graph, start: Call, wanted: Collection[Call], most: int) -> set[Call]:
    """Return at most so many of the wanted operators, those nearest, and what is on the ways to them."""
    came_from: dict[Call, Call] = {}
    way: set[Call] = {start}
    found = 0
    for call, before in islice(_walk(graph, start, None), _MOST_VISITED):
        came_from[call] = before
        if call in wanted:
            step = call
            while step not in way:
                way.add(step)
                step = came_from[step]
            found += 1
            if found == most:
                break
    return way


def _walk(graph: Graph, start: Call, within: Collection[Call] | None) -> Iterator[tuple[Call, Call]]:
    """Yield operators (of a set, if one is given) from the nearest on, each with the one that it was reached from."""
    seen, queue = {start}, deque([(start, start)])
    while queue:
        call, before = queue.popleft()
        yield call, before
        for other in _beside(graph, call):
            if other not in seen and (within is None or other in within):
                seen.add(other)
                queue.append((other, call))


def _beside(graph: Graph, call: Call) -> Iterator[Call]:
    # the last one first, as a map that goes back meets them: what it is refused by is found on the way that it took
    yield from sorted(sources(call), key=lambda source: -source.index)
    for output in call.outputs:
        yield from graph.readers(output)
