"""Plots as SVG that takes its colours from the page around it.

Nothing global is touched, neither matplotlib's backend nor its settings, and the settings are not relied on: size,
colour and place of everything are given here. Reports made in several threads, or beside plots in a style of the
user's own, come out the same.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

from batchnorm.report.cells import end_of_name
from batchnorm.report.document import Plot, Series

__all__ = ["to_svg"]

# Okabe & Ito's colours, which every kind of eye tells apart, the light ones darkened to be seen on white; the page may
# set others for a dark ground.
_PALETTE = ("#0072b2", "#d55e00", "#008a64", "#b65a8e", "#a87500", "#4a5260")
_INK, _LINE = "#010203", "#040506"  # stand-ins
_OF_THE_PAGE = {
    _INK: "currentColor",
    _LINE: "var(--line, #dddddd)",
    **{colour: f"var(--series-{i}, {colour})" for i, colour in enumerate(_PALETTE, 1)},
}
_WIDTH, _HEIGHT = 4.6, 3.1  # inches; small, so that letters are legible when a phone shows it 350 pixels wide
_ROW, _LETTER = 0.17, 0.07  # inches of a line of text, and of a letter
_FONT = 9.5
_FAMILY = "DejaVu Sans"  # comes with matplotlib; letters are drawn as outlines, so the reader needs no font
_ENDS: dict[str, Any] = {
    "solid_capstyle": "butt",
    "dash_capstyle": "butt",
    "solid_joinstyle": "round",
    "dash_joinstyle": "round",
}
_SMALLEST = 1e-100  # beyond it, and its inverse, matplotlib overflows
_MOST_BARS = 40  # with a name each, one below the other
_MOST_LETTERS = 24  # of a name beside an axis: its end, which tells layers apart, and leaves room for the bars
_MOST_POINTS = 500  # of a line; more cannot be told apart at this size


def to_svg(plot: Plot, *, prefix: str = "") -> str:
    """Return the plot as an ``<svg>`` element.

    Lines of one group have one colour and one entry in the legend. Bars with many or long names lie. Values that are
    not finite, or not positive where the axis is logarithmic, leave a gap.

    Args:
        plot: what to draw.
        prefix: begins every id in the SVG, so that several can stand in one page.
    """
    plot = _drawable(plot)
    names = _names(plot.series)
    shown = [end_of_name(name, _MOST_LETTERS) for name in names]
    lying = bool(names) and len(names) <= _MOST_BARS and (len(names) > 6 or sum(map(len, names)) > 40)
    colours = _colours(plot.series)
    height = max(_HEIGHT, 0.9 + _ROW * len(names)) if lying else _HEIGHT
    height += _ROW * max(0, math.ceil(len(colours) / _legend_columns(colours)) - 1)
    height += 0 if lying else _LETTER * max(0, max(map(len, shown), default=0) - 8)  # upright names
    figure = Figure(figsize=(_WIDTH, height), dpi=72, facecolor="none", edgecolor="none", linewidth=0)
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.03, hspace=0, wspace=0))
    axes = figure.add_subplot(facecolor="none", prop_cycle=None)
    _dress(axes, plot, lying)
    bars = [series for series in plot.series if series.style == "bar"]
    for series in plot.series:
        if series.style == "bar":
            index = next(i for i, bar in enumerate(bars) if bar is series)
            _draw_bars(axes, series, names, colours[_key(series)], (index, len(bars)), lying)
        else:
            _draw_line(axes, series, names, colours[_key(series)], lying)
    if plot.y_range is not None:
        (axes.set_xlim if lying else axes.set_ylim)(plot.y_range)
    _set_ticks(axes, plot, shown, lying)
    _add_legend(figure, axes)
    for text in figure.findobj(Text):
        text.set(
            usetex=False, parse_math=False, family=_FAMILY, size=_FONT, weight="normal", style="normal", color=_INK
        )
    out = io.StringIO()
    canvas = FigureCanvasSVG(figure)
    canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})  # type: ignore[no-untyped-call]
    return _for_the_page(out.getvalue(), plot.title, prefix)


def _drawable(plot: Plot) -> Plot:
    """Return the plot with NaN for what cannot be drawn, and a plain axis if nothing is left for a logarithmic one."""

    def clean(value: float) -> float:
        return float(value) if _SMALLEST <= abs(value) <= 1 / _SMALLEST or value == 0 else math.nan

    series = [replace(one, y=[clean(value) for value in one.y]) for one in plot.series]
    return replace(plot, series=series, log_y=plot.log_y and any(value > 0 for one in series for value in one.y))


def _key(series: Series) -> str:
    return series.group or series.name


def _colours(series: Sequence[Series]) -> dict[str, str]:
    keys = dict.fromkeys(map(_key, series))
    return {key: _PALETTE[i % len(_PALETTE)] for i, key in enumerate(keys)}


def _names(series: Sequence[Series]) -> list[str]:
    """Return the names along the x axis, in the order of their first appearance; none if it holds numbers."""
    return list(dict.fromkeys(x for one in series for x in one.x if isinstance(x, str)))


def _positions(series: Series, names: Sequence[str]) -> list[float]:
    place = {name: float(i) for i, name in enumerate(names)}
    return [place[x] if isinstance(x, str) else float(x) for x in series.x]


def _draw_line(axes: Axes, series: Series, names: Sequence[str], colour: str, lying: bool) -> None:
    x, y = _positions(series, names), list(series.y)
    step = max(1, math.ceil(len(x) / _MOST_POINTS))
    x, y = (values[::step] + values[-1:] * (step > 1) for values in (x, y))
    if names:  # a level that holds for every bar: across the whole of them
        x, y = [x[0] - 0.5, *x, x[-1] + 0.5] if x else x, [y[0], *y, y[-1]] if y else y
    known = _key(series) in axes.get_legend_handles_labels()[1]
    axes.plot(
        *((y, x) if lying else (x, y)),
        color=colour,
        label=None if known else _key(series),
        linestyle=(0, (4, 2)) if series.style == "dashed" else "solid",
        linewidth=1.5,
        **_ENDS,
        marker="o" if len(series.x) == 1 else "none",
        markersize=3.5,
    )


def _draw_bars(
    axes: Axes, series: Series, names: Sequence[str], colour: str, place: tuple[int, int], lying: bool
) -> None:
    index, count = place
    width = 0.8 / count
    positions = [x - 0.4 + width * (index + 0.5) for x in _positions(series, names)]
    draw = axes.barh if lying else axes.bar
    sizes = [0.0 if math.isnan(v) else v for v in series.y]
    draw(positions, sizes, width * 0.9, color=colour, edgecolor="none", linewidth=0, label=_key(series))


def _dress(axes: Axes, plot: Plot, lying: bool) -> None:
    axes.set_xlabel(plot.y_label if lying else plot.x_label, labelpad=3)
    axes.set_ylabel("" if lying else plot.y_label, labelpad=3)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x" if lying else "y", color=_LINE, linewidth=0.7, linestyle="solid", alpha=1,
              **_ENDS)  # fmt: skip
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(edgecolor=_INK, linewidth=0.6)
    if plot.log_x and any(x > 0 for one in plot.series for x in one.x if not isinstance(x, str)):
        axes.set_xscale("log", nonpositive="mask")
    if plot.log_y:
        (axes.set_xscale if lying else axes.set_yscale)("log", nonpositive="mask")
    axes.margins(x=0.05 if lying else 0.02, y=0.02 if lying else 0.05)
    if lying:
        axes.invert_yaxis()  # the first name on top


def _set_ticks(axes: Axes, plot: Plot, names: Sequence[str], lying: bool) -> None:
    along, across = (axes.yaxis, axes.xaxis) if lying else (axes.xaxis, axes.yaxis)
    low, high = sorted(across.get_view_interval())
    locator = LogLocator(10, numticks=6) if plot.log_y else MaxNLocator(5 if lying else 6, steps=[1, 2, 5, 10])
    values = [v for v in locator.tick_values(low, high) if low <= v <= high]
    across.set_major_locator(FixedLocator(values))
    across.set_major_formatter(FixedFormatter([_number(v) for v in values]))
    if names:
        # more names than there is room for would lie upon each other
        shown = range(0, len(names), 1 if lying else 1 + (len(names) - 1) // 20)
        along.set_major_locator(FixedLocator(list(shown)))
        along.set_major_formatter(FixedFormatter([names[i] for i in shown]))
    else:
        low, high = sorted(along.get_view_interval())
        locator = LogLocator(10, numticks=6) if plot.log_x and low > 0 else MaxNLocator(6, steps=[1, 2, 5, 10])
        values = [v for v in locator.tick_values(low, high) if low <= v <= high]
        along.set_major_locator(FixedLocator(values))
        along.set_major_formatter(FixedFormatter([_number(v) for v in values]))
    for axis in (along, across):
        axis.set_minor_locator(NullLocator())
    upright = bool(names) and not lying and sum(map(len, names)) > 40
    dressed: dict[str, Any] = {"which": "both", "color": _INK, "length": 3, "width": 0.6, "direction": "out", "pad": 3}
    axes.tick_params(axis="x", bottom=True, top=False, labelbottom=True, labeltop=False,
                     labelrotation=90 if upright else 0, **dressed)  # fmt: skip
    axes.tick_params(axis="y", left=True, right=False, labelleft=True, labelright=False, labelrotation=0, **dressed)
    for label in axes.get_xticklabels():
        label.set(ha="center", va="top")
    for label in axes.get_yticklabels():
        label.set(ha="right", va="center_baseline")


def _number(value: float) -> str:
    """Return a tick's number: short, with a real minus sign.

    >>> _number(1500.0), _number(-0.2), _number(1e-07), _number(2000000.0)
    ('1500', '−0.2', '1e−07', '2e+06')
    """
    text = f"{round(value, 12):.6g}" if abs(value) >= 1e-6 else f"{value + 0.0:.3g}"  # + 0.0: no negative zero
    return text.replace("-", "−")


def _legend_columns(labels: Collection[str]) -> int:
    return 1 if max(map(len, labels), default=0) > 24 else 2


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not labels or len(set(labels)) == 1:  # one line needs no legend: the axis names it
        return
    legend: Legend = figure.legend(
        handles, labels, loc="outside lower left", ncols=_legend_columns(labels), frameon=False,
        fontsize=_FONT, handlelength=1.8, columnspacing=1.4, labelspacing=0.4, borderpad=0, handletextpad=0.6,
        numpoints=1, markerscale=1, borderaxespad=0.2, shadow=False,
    )  # fmt: skip
    legend.set_in_layout(True)


def _for_the_page(svg: str, title: str, prefix: str) -> str:
    """Return the element alone, with ids of its own, the page's colours, and a name for those who cannot see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)  # the text that outlines stand for, not escaped by all
    numbers: dict[str, int] = {}

    def own(match: re.Match[str]) -> str:
        """Number the ids: matplotlib's hold a random part, and glyphs are called the same in every plot."""
        return f"{match[1]}{prefix}{numbers.setdefault(match[2], len(numbers))}{match[3]}"

    svg = re.sub(r'(\bid=")([^"]+)(")', own, svg)
    svg = re.sub(r"(url\(#)([^)]+)(\))", own, svg)
    svg = re.sub(r'(xlink:href="#)([^"]+)(")', own, svg)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    for stand_in, colour in _OF_THE_PAGE.items():
        svg = svg.replace(stand_in, colour)
    return svg.strip()
