"""Diagrams as SVG that takes its colours from the page around it, and has its own where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile

from batchnorm.report.cells import end_of_name
from batchnorm.report.document import Diagram, Node, Panel, Role
from batchnorm.report.graph_layout import GraphLayout, lay_out

__all__ = ["inside", "mark", "to_svg"]

_LETTER, _SMALL_LETTER = 7.3, 6.1  # widths of a letter of the two sizes, in a font of equal widths
_BOX, _LOW, _BELOW = 42.0, 14.0, 26.0  # height of a box, and of dots; from one layer to the next
_GAP, _MARGIN = 18.0, 3.0
_BETWEEN = 54.0  # two panels, for the arrow
_TITLE = 24.0
_MOST_LETTERS = 26
_DOTS = "…"  # a node of this name is no box: there is more
_FONT = "font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_INK, _QUIET, _LINE = "var(--ink, #1d2430)", "var(--quiet, #5b6675)", "var(--line, #dde2e8)"
_CARD = "var(--card, #f6f7f9)"
_BLUE, _ORANGE = "var(--series-1, #0072b2)", "var(--series-2, #d55e00)"
_GREEN, _VIOLET = "var(--series-3, #008a64)", "var(--series-4, #b65a8e)"

# ground, border, width of the border, dashes, letters
_LOOK: dict[Role, tuple[str, str, float, str, str]] = {
    "plain": (_CARD, _QUIET, 1.0, "", _INK),
    "faint": ("none", _LINE, 1.0, "", _QUIET),
    "gone": (_CARD, _ORANGE, 2.0, "5 3", _INK),
    "kept": (_CARD, _ORANGE, 2.0, "", _INK),
    "crossed": (_CARD, _GREEN, 2.0, "", _INK),
    "changed": (_CARD, _BLUE, 3.0, "", _INK),
    "blocking": (_CARD, _VIOLET, 3.0, "2 2", _INK),
}


def to_svg(diagram: Diagram) -> str:
    """Return the diagram as an ``<svg>`` element of its natural size: its panels side by side, an arrow in between."""
    titled = _TITLE if any(panel.title for panel in diagram.panels) else 0.0
    outer = inside(diagram)
    drawn = [_Drawing.of(panel, titled + _MARGIN, outer) for panel in diagram.panels]
    height = max((drawing.bottom for drawing in drawn), default=0.0) + _MARGIN
    parts: list[str] = []
    x = _MARGIN
    for drawing in drawn:
        if parts:
            parts.append(_big_arrow(x + _BETWEEN / 2, (titled + height) / 2))
            x += _BETWEEN
        parts += drawing.parts(x)
        x += drawing.layout.width
    width = x + _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(diagram.title)}" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.1f} {height:.1f}">{"".join(parts)}</svg>'
    )


def inside(diagram: Diagram) -> str:
    """Return the module that everything in a diagram is in; the drawing has names without it. ``""`` is the model.

    >>> inside(Diagram("", [Panel("", [Node("conv2d", "stem.0"), Node("relu", "stem")], [])]))
    'stem'
    """
    paths = {node.detail: node.detail.split(".") for panel in diagram.panels for node in panel.nodes if node.detail}
    if not paths:
        return ""
    same = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths.values(), strict=False))]
    return ".".join(same[:-1] if len(paths) == 1 else same)  # of the only module a name is left


def mark(role: Role) -> str:
    """Return a small box that looks as those of a role do, for a legend."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="26" height="16" aria-hidden="true">'
        f"{_rectangle(2, 2, 22, 12, role, 3)}</svg>"
    )


@dataclass(frozen=True)
class _Drawing:
    """A panel with the place of everything: each layer's upper edge and height; what names are told inside of."""

    panel: Panel
    layout: GraphLayout
    tops: Sequence[float]
    heights: Sequence[float]
    outer: str

    @classmethod
    def of(cls, panel: Panel, top: float, outer: str) -> _Drawing:
        """Lay out a panel below a line."""
        layout = lay_out([_width(node, outer) for node in panel.nodes], panel.edges, _GAP)
        heights = [_LOW] * (max(layout.layer, default=-1) + 1)
        for node, layer in zip(panel.nodes, layout.layer, strict=True):
            if node.name != _DOTS:
                heights[layer] = _BOX
        tops = [top + sum(heights[:layer]) + layer * _BELOW for layer in range(len(heights))]
        return cls(panel, layout, tops, heights, outer)

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.tops[-1] + self.heights[-1] if self.tops else 0.0

    def parts(self, left: float) -> list[str]:
        """Return its SVG elements, to the right of a line: arrows first, so that boxes lie upon them."""
        parts = []
        if self.panel.title:
            style = f"fill: {_QUIET}; font: 600 12px system-ui, sans-serif"
            x = left + self.layout.width / 2
            parts.append(
                f'<text x="{x:.1f}" y="14" text-anchor="middle" style="{style}">{escape(self.panel.title)}</text>'
            )
        ways = self.layout.ways
        edges = [_edge([(left + x, self.tops[layer], self.heights[layer]) for x, layer in way]) for way in ways]
        leading = {start for start, _ in self.panel.edges}
        nodes = [
            _dots(left + x, self.tops[layer], self.heights[layer], number in leading)
            if node.name == _DOTS
            else _node(node, left + x, self.tops[layer], self.outer)
            for number, (node, x, layer) in enumerate(
                zip(self.panel.nodes, self.layout.x, self.layout.layer, strict=True)
            )
        ]
        return [*parts, *edges, *nodes]


def _width(node: Node, outer: str) -> float:
    if node.name == _DOTS:
        return 24.0
    letters = max(len(end_of_name(node.name, _MOST_LETTERS)) * _LETTER, len(_place(node, outer)) * _SMALL_LETTER)
    return max(letters + 20, 56)


def _place(node: Node, outer: str) -> str:
    """Return where a node runs, as it is called inside of what holds all nodes."""
    name = node.detail.removeprefix(outer).removeprefix(".") if outer else node.detail
    return end_of_name(name, _MOST_LETTERS)


def _dots(x: float, y: float, height: float, is_leading: bool) -> str:
    """Return dots, near the end of the arrow that leads from them, or to them."""
    return _text(_DOTS, x, y + (height - 4 if is_leading else 7), 14, _QUIET)


def _node(node: Node, x: float, y: float, outer: str) -> str:
    width, colour, place = _width(node, outer), _LOOK[node.role][4], _place(node, outer)
    lines = [_text(end_of_name(node.name, _MOST_LETTERS), x, y + (18 if place else 25), 12, colour)]
    if place:
        lines.append(_text(place, x, y + 33, 10, _QUIET))
    whole = f"{node.name} {node.detail}".strip()
    box = _rectangle(x - width / 2, y, width, _BOX, node.role, 7)
    return f"<g><title>{escape(whole)}</title>{box}{''.join(lines)}</g>"


def _rectangle(x: float, y: float, width: float, height: float, role: Role, round_: float) -> str:
    ground, border, thick, dashes, _ = _LOOK[role]
    style = f"fill: {ground}; stroke: {border}; stroke-width: {thick:g}" + (
        f"; stroke-dasharray: {dashes}" if dashes else ""
    )
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{round_:g}" style="{style}"/>'


def _text(text: str, x: float, y: float, size: int, colour: str) -> str:
    style = f"fill: {colour}; font-size: {size}px; {_FONT}"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" style="{style}">{escape(text)}</text>'


def _edge(points: Sequence[tuple[float, float, float]]) -> str:
    """Return a line from the lower edge of the first box, past others, to the head of an arrow at the last.

    Args:
        points: x, the upper edge of the layer, and its height.
    """
    x, top, height = points[0]
    y = top + height
    path = f"M{x:.1f} {y:.1f}"
    for number, (next_x, next_top, next_height) in enumerate(points[1:], 2):
        is_last = number == len(points)
        target = next_top - 5 if is_last else next_top
        middle = (y + target) / 2
        path += f" C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {target:.1f}"
        if not is_last:  # past a layer, straight down
            path += f" v{next_height:.1f}"
        x, y = next_x, target + (0 if is_last else next_height)
    line = f"fill: none; stroke: {_QUIET}; stroke-width: 1.2"
    return (
        f'<path d="{path}" style="{line}"/><path d="M{x - 4:.1f} {y - 2:.1f} l4 6.5 l4 -6.5 Z" style="fill: {_QUIET}"/>'
    )


def _big_arrow(x: float, y: float) -> str:
    shape = (
        f"M{x - 12:.1f} {y:.1f} H{x + 10:.1f} M{x + 3:.1f} {y - 7:.1f} L{x + 10:.1f} {y:.1f} L{x + 3:.1f} {y + 7:.1f}"
    )
    style = f"fill: none; stroke: {_QUIET}; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round"
    return f'<path d="{shape}" style="{style}"/>'
