"""A diagram is one well-formed element with every box in it, in the colours of the page."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args
from xml.etree import ElementTree

import pytest

from batchnorm.report import Diagram, Diagrams, Document, Node, Panel, Section
from batchnorm.report.diagrams import inside, mark, to_svg
from batchnorm.report.document import Role
from batchnorm.report.html import to_html
from batchnorm.report.text import to_text

BEFORE = Panel(
    "before",
    [Node("…"), Node("conv2d", "conv<1>", "changed"), Node("batch_norm", "bn & co", "gone"), Node("relu", "", "faint")],
    [(0, 1), (1, 2), (2, 3)],
)
AFTER = Panel("after", [Node("…"), Node("conv2d + bias", "conv<1>", "changed"), Node("relu")], [(0, 1), (1, 2)])
DIAGRAM = Diagram("conv2d → <batch_norm>", [BEFORE, AFTER], ["bn", "bn2"], "It went & came.")


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_every_box_of_both_panels_is_there_and_escaped() -> None:
    svg = to_svg(DIAGRAM)
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == DIAGRAM.title
    shown = texts(svg)
    for panel in DIAGRAM.panels:
        assert panel.title in shown
        for node in panel.nodes:
            assert node.name in shown
            assert not node.detail or node.detail in shown
    assert svg.count("<rect") == 5  # dots have no box
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "batch_norm bn & co" in titles
    assert not re.findall(r'\bid="', svg)  # several stand in one page


def test_everything_is_within_the_picture() -> None:
    svg = to_svg(DIAGRAM)
    width, height = (float(ElementTree.fromstring(svg).attrib[key]) for key in ("width", "height"))
    for x, y, w, h in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg):
        assert 0 <= float(x) <= float(x) + float(w) <= width
        assert 0 <= float(y) <= float(y) + float(h) <= height


def test_long_names_keep_their_end_and_the_whole_as_a_title() -> None:
    name = "features.denseblock1.denselayer1.conv1"
    svg = to_svg(Diagram("t", [Panel("", [Node("conv2d", name), Node("relu", "head")], [])]))
    (shown,) = [text for text in texts(svg) if text.endswith("denselayer1.conv1")]
    assert shown.startswith("…")
    assert len(shown) < len(name)
    assert f"conv2d {name}</title>" in svg


@pytest.mark.parametrize("role", get_args(Role))
def test_each_role_looks_different_and_as_its_mark(role: Role) -> None:
    def look(svg: str) -> str:
        return re.findall(r'<rect [^>]*style="([^"]*)"', svg)[0]

    looks = {other: look(to_svg(Diagram("t", [Panel("", [Node("x", "", other)], [])]))) for other in get_args(Role)}
    assert look(mark(role)) == looks[role]
    assert [other for other, style in looks.items() if style == looks[role]] == [role]


def test_a_diagram_without_panels_is_only_told() -> None:
    bare = replace(DIAGRAM, panels=[], title="5 others")
    page = to_html(Document("t", "", [Section("s", [Diagrams([bare])])]))
    assert "5 others" in page
    assert "<svg" not in page


def test_the_page_holds_names_and_caption_and_a_text_no_picture() -> None:
    document = Document("t", "", [Section("s", [Diagrams([DIAGRAM], [("gone", "the norm")])])])
    page = to_html(document)
    assert page.count("<svg") == 2  # the drawing, and the mark in the legend
    for words in ("2 norms, like bn", "bn, bn2", "It went &amp; came.", "the norm", "conv2d → &lt;batch_norm&gt;"):
        assert words in page
    assert to_text(document) == "t"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_wide_diagram_does_not_widen_the_page(tmp_path, open_page, width: int) -> None:
    row = [Node(f"operator_number_{i}", "a.long.name.of.a.module") for i in range(12)]
    wide = Diagram("wide", [Panel("", [*row, Node("end")], [(i, 12) for i in range(12)])], ["n"] * 30, "words " * 40)
    path = tmp_path / "page.html"
    path.write_text(to_html(Document("t", "", [Section("s", [Diagrams([wide, DIAGRAM, DIAGRAM])])])))
    opened = open_page(path, width=width)
    assert opened.said == []
    assert opened.overflow <= 0


@pytest.mark.parametrize(
    ("details", "outer", "shown"),
    [
        (["stem.0", "stem.1", "stem.2"], "stem", ["0", "1", "2"]),
        (["layer1.0.conv1", "layer1.0.bn1", "layer1.0"], "layer1.0", ["conv1", "bn1"]),
        (["layer1.0.bn1", "layer10.bn1"], "", ["layer1.0.bn1", "layer10.bn1"]),
        (["body.norm", "body.norm"], "body", ["norm"]),
        (["norm"], "", ["norm"]),
        ([""], "", []),
    ],
)
def test_names_are_those_inside_of_what_holds_all_of_them(details: list[str], outer: str, shown: list[str]) -> None:
    """Of one picture all names begin at the same module, which the heading says."""
    diagram = Diagram("t", [Panel("", [Node("op", detail) for detail in details], [])])
    assert inside(diagram) == outer
    page = to_html(Document("t", "", [Section("s", [Diagrams([diagram])])]))
    svg = page[page.index("<svg") : page.index("</svg>")]
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert set(labels) == {"op", *shown}
    assert (f", in {outer}</span>" in page) is bool(outer)


def test_a_long_name_loses_whole_parts() -> None:
    diagram = Diagram("t", [Panel("", [Node("conv2d", "backbone.layer3.12.conv_block.conv1"), Node("relu", "x")], [])])
    assert "….12.conv_block.conv1" in texts(to_svg(diagram))
