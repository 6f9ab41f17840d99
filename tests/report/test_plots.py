"""A plot is drawn the same whatever the settings, in the colours of the page, with ids of its own."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from batchnorm.report import Plot, Series

matplotlib = pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")

from batchnorm.report.plots import to_svg  # noqa: E402

LINES = Plot(
    "Loss & <more>",
    "step",
    "loss",
    [
        Series("first, 15 %", [0, 1, 2], [1.0, 0.5, 0.2], group="first"),
        Series("first, 85 %", [0, 1, 2], [2.0, 1.5, 1.2], group="first"),
        Series("second", [0, 1, 2], [2.0, 2.5, 2.2]),
    ],
)
BARS = Plot("Bars", "norm", "size", [Series("a", ["x", "y"], [1, 2], "bar"), Series("b", ["x", "y"], [2, 3], "bar")])
NAMES = [f"layer{i}.bn" for i in range(24)]
LYING = Plot(
    "Many",
    "norm",
    "size",
    [Series("size", NAMES, list(range(24)), "bar"), Series("limit", NAMES, [5] * 24, "dashed")],
)


def colours(svg: str) -> set[str]:
    return set(re.findall(r"var\(--series-(\d)", svg))


def size(svg: str) -> tuple[float, float]:
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("plot", [LINES, BARS, LYING], ids=["lines", "bars", "lying bars"])
def test_is_one_element_that_refers_to_nothing_outside(plot: Plot) -> None:
    svg = to_svg(plot, prefix="p1-")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == plot.title
    assert "width" not in root.attrib
    assert "<metadata" not in svg
    assert not [u for u in re.findall(r"https?://[^\s\"]+", svg) if not u.startswith("http://www.w3.org/")]
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert all(i.startswith("p1-") for i in ids)
    targets = re.findall(r"url\(#([^)]+)\)", svg) + re.findall(r'href="#([^"]+)"', svg)
    assert targets
    assert set(targets) <= set(ids)


def test_colours_are_the_pages() -> None:
    svg = to_svg(LINES)
    assert "currentColor" in svg
    hex_colours = set(re.findall(r"(?<!, )#[0-9a-f]{6}\b", svg))
    assert hex_colours <= {"#ffffff"}  # clip paths; all else comes from the page


def test_a_group_has_one_colour_and_one_entry_in_the_legend() -> None:
    assert colours(to_svg(LINES)) == {"1", "2"}
    alone = Plot("", "", "", [Series(f"p{i}", [0, 1], [0, i], group="g") for i in range(3)])
    assert colours(to_svg(alone)) == {"1"}


@pytest.mark.every(3)
@pytest.mark.parametrize("plot", [LINES, BARS, LYING], ids=["lines", "bars", "lying bars"])
def test_neither_settings_nor_threads_matter(plot: Plot) -> None:
    expected = to_svg(plot, prefix="p")
    assert to_svg(plot, prefix="p") == expected  # no date, no random id
    with matplotlib.rc_context(
        {
            "text.usetex": True,
            "font.size": 30,
            "font.family": "serif",
            "font.weight": "bold",
            "text.color": "green",
            "figure.facecolor": "black",
            "axes.facecolor": "red",
            "axes.grid": True,
            "axes.linewidth": 5,
            "axes.xmargin": 0.4,
            "axes.labelweight": "bold",
            "axes.unicode_minus": False,
            "grid.linestyle": ":",
            "lines.linewidth": 9,
            "lines.marker": "x",
            "lines.solid_capstyle": "round",
            "legend.fontsize": 30,
            "legend.markerscale": 4,
            "patch.force_edgecolor": True,
            "xtick.direction": "in",
            "xtick.top": True,
            "xtick.alignment": "left",
            "xtick.minor.visible": True,
            "xtick.major.width": 7,
            "svg.hashsalt": "salt",
        }
    ):
        before = dict(matplotlib.rcParams)
        assert to_svg(plot, prefix="p") == expected
        assert dict(matplotlib.rcParams) == before
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: to_svg(plot, prefix="p"), range(8))) == {expected}


def test_many_names_lie_and_get_room() -> None:
    assert size(to_svg(BARS))[1] < size(to_svg(LYING))[1]
    width, _ = size(to_svg(LYING))
    assert width == size(to_svg(LINES))[0]
    crowd = [f"block{i}.norm" for i in range(300)]  # too many to have a name each
    assert size(to_svg(Plot("", "", "", [Series("s", crowd, range(300), "bar")])))[1] < 300


@pytest.mark.every(7)
@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "values",
    [[], [1.0], [math.nan, 1.0, math.inf], [math.nan] * 3, [0.0, 0.0], [-1.0, 0.0, 3.0], [1e-300, 1e300]],
)
@pytest.mark.parametrize("style", ["line", "dashed", "bar"])
def test_odd_values_are_drawn_as_far_as_they_go(style, values: list[float], log_y: bool) -> None:
    svg = to_svg(Plot("odd", "x", "y", [Series("s", list(range(len(values))), values, style)], log_y=log_y))
    assert "nan" not in svg.lower().replace("dominant", "")
    assert "inf" not in svg


def test_no_series_at_all() -> None:
    assert to_svg(Plot("empty", "x", "y", [])).startswith("<svg")


def test_long_lines_are_thinned_and_keep_their_end() -> None:
    n = 100_000
    svg = to_svg(Plot("long", "x", "y", [Series("s", range(n), [float(i % 977) for i in range(n)])]))
    assert len(svg) < 100_000


def test_range_is_shared_when_given() -> None:
    def marks(top: float, y_range: tuple[float, float] | None) -> list[str]:
        svg = to_svg(Plot("t", "x", "y", [Series("s", [0, 1], [0, top])], y_range=y_range))
        return re.findall(r'<use xlink:href="#\w+" x="[\d.]+" y="([\d.]+)"', svg)

    assert marks(0.1, (0, 1)) == marks(1.0, (0, 1)) == marks(9.0, (0, 1))
    assert marks(0.1, (0, 1)) != marks(0.1, (0, 3))


def test_a_logarithmic_x_axis_leaves_out_what_is_not_positive() -> None:
    steps = [0.0, 1.0, 10.0, 100.0, 1000.0]
    plot = Plot("log", "step", "y", [Series("s", steps, [1.0, 2.0, 3.0, 4.0, 5.0])])
    linear, logarithmic = to_svg(plot), to_svg(replace(plot, log_x=True))
    assert linear != logarithmic
    assert to_svg(replace(plot, series=[Series("s", [0.0, -1.0], [1.0, 2.0])], log_x=True))
