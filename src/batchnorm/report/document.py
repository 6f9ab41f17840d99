"""What a report says, as plain data: it knows no model, no terminal and no browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = [
    "Block",
    "Cell",
    "Diagram",
    "Diagrams",
    "Document",
    "Facts",
    "HeatMap",
    "Node",
    "Panel",
    "Paragraph",
    "Plot",
    "Plots",
    "Role",
    "Section",
    "Series",
    "Table",
    "Tone",
]

Cell: TypeAlias = str | int | float | bool | None
Tone: TypeAlias = Literal["plain", "good", "bad"]


@dataclass(frozen=True)
class Paragraph:
    """A sentence or several; ``tone`` colours it."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Facts:
    """A few figures with their names, for the eye to catch first."""

    items: Sequence[tuple[str, Cell]]


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        columns: their names.
        rows: a cell for each column; the first is what the row is of.
        title: above it.
        caption: below it.
        tones: colours rows by their index.
        shown: the indices of the rows that the short form of a long table has; None for the bad ones, or the first.
        optional: names of columns that the short form does without where they find no room, those first.
        rest: says what a short form has left out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    caption: str = ""
    tones: dict[int, Tone] = field(default_factory=dict)
    shown: Sequence[int] | None = None
    optional: Sequence[str] = ()
    rest: str = ""


@dataclass(frozen=True)
class Series:
    """One line of a plot. ``style`` is ``"line"``, ``"dashed"`` or ``"bar"``; ``group`` gives lines the same colour."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float]
    style: Literal["line", "dashed", "bar"] = "line"
    group: str = ""


@dataclass(frozen=True)
class Plot:
    """Lines or bars over one pair of axes, as data; drawn when a page is made.

    A logarithmic axis leaves out what is not positive. ``y_range`` holds the y axis fixed, so that several plots can be
    compared; None fits it to the values.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    caption: str = ""
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plots:
    """Several plots to be compared: side by side where there is room, else one below the other."""

    plots: Sequence[Plot]
    caption: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Rows of many values each, as colour: negative ones blue, positive ones orange, the stronger the larger.

    Rows may be of different lengths; each is drawn over the whole width. A value that is not finite has a colour of its
    own. ``limit`` is the size that has full colour. ``tones`` colours the names of rows by their index. ``rest`` says
    what a short form has left out.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[float]]]
    limit: float
    unit: str = ""
    caption: str = ""
    tones: dict[int, Tone] = field(default_factory=dict)
    rest: str = ""


Role: TypeAlias = Literal["plain", "faint", "gone", "kept", "crossed", "changed", "blocking"]


@dataclass(frozen=True)
class Node:
    """A box of a diagram: an operator, and below it where it runs. ``role`` says how it is marked."""

    name: str
    detail: str = ""
    role: Role = "plain"


@dataclass(frozen=True)
class Panel:
    """One drawing: nodes, and arrows from one to another by their indices, each to a node further on in the row."""

    title: str
    nodes: Sequence[Node]
    edges: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Diagram:
    """A part of a graph, in one panel, or in two: before and after.

    ``names`` are all those that it is the picture of. A caption says more.
    """

    title: str
    panels: Sequence[Panel]
    names: Sequence[str] = ()
    caption: str = ""


@dataclass(frozen=True)
class Diagrams:
    """Several diagrams, side by side where there is room; ``roles`` says what their marks mean."""

    diagrams: Sequence[Diagram]
    roles: Sequence[tuple[Role, str]] = ()


Block: TypeAlias = Paragraph | Facts | Table | Plot | Plots | HeatMap | Diagrams


@dataclass(frozen=True)
class Section:
    """A heading with the blocks under it.

    ``brief`` is what the short form has instead of all these blocks, where they would drown the rest; with nothing in
    it, the whole section is left out there.
    """

    title: str
    blocks: Sequence[Block]
    brief: Sequence[Block] | None = None


@dataclass(frozen=True)
class Document:
    """A title, one line of summary, and sections.

    Attributes:
        title: what it is about.
        summary: one line.
        sections: the rest.
        tone: colours the summary.
        more: how the whole is shown, where this is the short form.
        provenance: where it comes from, as names and values; for the page.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    tone: Tone = "plain"
    more: str = ""
    provenance: Sequence[tuple[str, str]] = ()
