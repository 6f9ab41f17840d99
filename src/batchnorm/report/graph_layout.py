"""Places for the boxes of a small graph: in layers from top to bottom, so that arrows point down and rarely cross.

The steps are those of Sugiyama, Tagawa & Toda (1981): a layer for each node, the longest way from a beginning; points
on the layers that a long arrow passes; in each layer an order by the mean place of the neighbours; and places near
that mean, as close as the widths allow. Enough for chains with few branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["GraphLayout", "lay_out"]

_SWEEPS = 12


@dataclass(frozen=True)
class GraphLayout:
    """Where everything is.

    Attributes:
        x: the middle of each node, from the left edge.
        layer: the number of each node's layer.
        ways: for each edge, the points that it goes through: x, and the number of the layer.
        width: of the whole.
    """

    x: Sequence[float]
    layer: Sequence[int]
    ways: Sequence[Sequence[tuple[float, int]]]
    width: float


def lay_out(widths: Sequence[float], edges: Sequence[tuple[int, int]], gap: float) -> GraphLayout:
    """Place nodes of the given widths; every edge leads from an earlier node to a later one.

    Example:
        >>> lay_out([10, 10, 10], [(0, 1), (0, 2)], gap=4).layer
        [0, 1, 1]
    """
    layer = _layers(len(widths), edges)
    sizes = list(widths)
    levels = list(layer)
    chains: list[list[int]] = []
    for start, end in edges:
        chain = [start]
        for level in range(layer[start] + 1, layer[end]):
            chain.append(len(sizes))
            sizes.append(gap)
            levels.append(level)
        chains.append([*chain, end])
    links = [pair for chain in chains for pair in pairwise(chain)]
    rows = _rows(levels, links)
    x = _places(rows, links, sizes, gap)
    left = min((place - size / 2 for place, size in zip(x, sizes, strict=True)), default=0.0)
    x = [place - left for place in x]
    right = max((place + size / 2 for place, size in zip(x, sizes, strict=True)), default=0.0)
    ways = [[(x[node], levels[node]) for node in chain] for chain in chains]
    return GraphLayout(x[: len(widths)], layer, ways, right)


def _layers(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Return the longest way to each node; a node to which none leads stands right above the first that it leads to."""
    layer = [0] * count
    for start, end in sorted(edges):
        layer[end] = max(layer[end], layer[start] + 1)
    led_to = {end for _, end in edges}
    for node in range(count):
        following = [layer[end] for start, end in edges if start == node]
        if node not in led_to and following:
            layer[node] = min(following) - 1
    return layer


def _rows(levels: Sequence[int], links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the nodes of each layer in an order in which few links cross."""
    rows = [[n for n, level in enumerate(levels) if level == wanted] for wanted in range(max(levels, default=-1) + 1)]
    up, down = _neighbours(len(levels), links)
    for sweep in range(_SWEEPS):
        order = {node: place for row in rows for place, node in enumerate(row)}
        beside, walk = (up, rows) if sweep % 2 == 0 else (down, rows[::-1])
        for row in walk:
            row.sort(key=lambda node: _mean([order[other] for other in beside[node]], order[node]))
            order.update({node: place for place, node in enumerate(row)})
    return rows


def _places(
    rows: Sequence[Sequence[int]], links: Sequence[tuple[int, int]], sizes: Sequence[float], gap: float
) -> list[float]:
    x = [0.0] * len(sizes)
    up, down = _neighbours(len(sizes), links)
    for sweep in range(2 * _SWEEPS):
        beside, walk = (up, rows) if sweep % 2 == 0 else (down, rows[::-1])
        for row in walk:
            wanted = [_mean([x[other] for other in beside[node]], x[node]) for node in row]
            for node, place in zip(row, _apart(wanted, [sizes[node] for node in row], gap), strict=True):
                x[node] = place
    return x


def _apart(wanted: Sequence[float], sizes: Sequence[float], gap: float) -> list[float]:
    """Return places near those wanted, in the same order, so that nothing overlaps: halfway between two such rows."""
    steps = [(a + b) / 2 + gap for a, b in pairwise(sizes)]
    pushed_right, pushed_left = list(wanted), list(wanted)
    for i, step in enumerate(steps):
        pushed_right[i + 1] = max(pushed_right[i + 1], pushed_right[i] + step)
    for i in reversed(range(len(steps))):
        pushed_left[i] = min(pushed_left[i], pushed_left[i + 1] - steps[i])
    return [(a + b) / 2 for a, b in zip(pushed_right, pushed_left, strict=True)]


def _neighbours(count: int, links: Sequence[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    up: list[list[int]] = [[] for _ in range(count)]
    down: list[list[int]] = [[] for _ in range(count)]
    for start, end in links:
        down[start].append(end)
        up[end].append(start)
    return up, down


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
