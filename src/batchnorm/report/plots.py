"""Plots as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from html import escape

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from batchnorm.report.document import Plot, Series

__all__ = ["to_svg"]

# Okabe & Ito's colours, told apart by every kind of eye.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Stand-ins for colours that only the page knows; they are exchanged in the text of the SVG.
_INK, _LINE = "#010203", "#040506"
_OF_THE_PAGE = {_INK: "currentColor", _LINE: "var(--line, #dddddd)"}
_SIZE = (5.4, 3.3)  # inches; small, so that the letters are legible when a phone shows it 350 pixels wide
_FONT = 9


def to_svg(plot: Plot, *, prefix: str = "") -> str:
    """Return the plot as an ``<svg>`` element.

    Nothing global is touched: neither matplotlib's backend nor its settings.

    Args:
        plot: what to draw.
        prefix: begins every id in the SVG, so that several can stand in one page.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    _draw(axes, plot)
    _dress(axes, plot)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 1 if max(map(len, labels)) > 32 else 2
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=_FONT
        )
        for text in legend.get_texts():
            text.set_color(_INK)
    out = io.StringIO()
    canvas = FigureCanvasSVG(figure)
    canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})  # type: ignore[no-untyped-call]
    return _for_the_page(out.getvalue(), plot.title, prefix)


def _draw(axes: Axes, plot: Plot) -> None:
    colours: dict[str, str] = {}
    bars = [series for series in plot.series if series.style == "bar"]
    for series in plot.series:
        group = series.group or series.name
        label = group if group not in colours else None
        colour = colours.setdefault(group, _PALETTE[len(colours) % len(_PALETTE)])
        if series.style == "bar":
            _draw_bars(axes, series, colour, bars.index(series), len(bars))
        else:
            positions = _positions(series)
            style = "--" if series.style == "dashed" else "-"
            marker = "o" if len(positions) == 1 else None
            axes.plot(
                positions, list(series.y), style, color=colour, label=label, linewidth=1.4, marker=marker, markersize=3
            )


def _draw_bars(axes: Axes, series: Series, colour: str, index: int, count: int) -> None:
    width = 0.8 / count
    positions = [x - 0.4 + width * (index + 0.5) for x in _positions(series)]
    axes.bar(positions, list(series.y), width * 0.92, color=colour, label=series.name)
    if any(isinstance(x, str) for x in series.x):
        names = [str(x) for x in series.x]
        shown = range(0, len(names), 1 + (len(names) - 1) // 16)  # names of more layers would lie upon each other
        steep = max(map(len, names), default=0) > 8
        axes.set_xticks(list(shown), [names[i] for i in shown], rotation=45 if steep else 0,
                        ha="right" if steep else "center")  # fmt: skip


def _positions(series: Series) -> list[float]:
    return [float(i) if isinstance(x, str) else float(x) for i, x in enumerate(series.x)]


def _dress(axes: Axes, plot: Plot) -> None:
    axes.set_facecolor("none")
    axes.set_xlabel(plot.x_label, color=_INK, fontsize=_FONT)
    axes.set_ylabel(plot.y_label, color=_INK, fontsize=_FONT)
    axes.tick_params(colors=_INK, labelsize=_FONT - 1, length=3, width=0.6)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
        spine.set_linewidth(0.6)
    if plot.log_y:
        axes.set_yscale("log")


def _for_the_page(svg: str, title: str, prefix: str) -> str:
    """Return the element alone, with its own ids, the page's colours, and a name for those who cannot see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}\1"', svg)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    for stand_in, colour in _OF_THE_PAGE.items():
        svg = svg.replace(stand_in, colour)
    return svg.strip()
