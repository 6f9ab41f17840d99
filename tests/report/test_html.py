"""A page is whole, holds what the document says, needs nothing from elsewhere, and never half replaces another."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchnorm.report import Document, Facts, Paragraph, Plot, Plots, Section, Series, Table
from batchnorm.report.html import to_html, write_html

DOCUMENT = Document(
    "Layers <b>",
    "3 & more",
    [
        Section("Numbers", [Facts([("error", 1.25e-6), ("ok", True), ("missing", None)]), Paragraph("A < B", "bad")]),
        Section("Rows", [Table(["layer", "count"], [["a[0]", 3], ["<script>", None]], "T", "C", {1: "bad"})]),
        Section(
            "Pictures",
            [
                Plot("Loss & more", "step", "loss", [Series("a", [0, 1], [1.0, 2.0]), Series("b", [0, 1], [2.0, 1.0])]),
                Plot("Bars", "layer", "size", [Series("s", ["x", "y"], [1.0, 2.0], "bar")], "caption", log_y=True),
                Plots([Plot(t, "x", "y", [Series("s", [0, 1], [1, 2])]) for t in ("left", "right")], "both"),
            ],
        ),
    ],
    tone="good",
)


def test_everything_is_on_the_page_and_escaped():
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    page = to_html(DOCUMENT)
    for text in ("Layers &lt;b&gt;", "3 &amp; more", "1.25e-06", "yes", "–", "A &lt; B", "a[0]", "&lt;script&gt;"):
        assert text in page
    assert "<script" not in page
    assert page.count("<svg") == 4
    assert 'aria-label="Loss &amp; more"' in page


def test_ids_are_unique_and_every_reference_has_its_target():
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    page = to_html(DOCUMENT)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'href="#([^"]+)"', page)
    assert targets
    assert set(targets) <= set(ids)


def test_without_matplotlib_a_sentence_stands_for_the_plot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("batchnorm.report.html.find_spec", lambda name: None)
    page = to_html(DOCUMENT)
    assert "<svg" not in page
    assert page.count("pip install") == 4
    assert page.count("<details") == 0
    assert '<th scope="col" class="number">b</th>' in page


def test_the_numbers_of_a_plot_are_on_the_page():
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    plot = Plot("t", "step", "y", [Series("a", range(1000), range(1000)), Series("b", [0, 999], [0.5, float("nan")])])
    page = to_html(Document("t", "", [Section("s", [plot])]))
    rows = re.findall(r"<tr class=\"plain\">(.*?)</tr>", page)
    assert len(rows) <= 25  # every n-th, and the last
    assert [re.sub(r"<[^>]+>", " ", row).split() for row in (rows[0], rows[1], rows[-1])] == [
        ["0", "0", "0.5"],
        ["42", "42", "–"],
        ["999", "999", "nan"],
    ]


def test_numbers_with_a_unit_are_set_flush_right():
    row = ["0", "97.6 %", "1.52 ×", "1,450 steps", "-1.5e-06", "layer1.0", "3 of 3 norms", None]
    page = to_html(Document("t", "", [Section("", [Table([f"c{i}" for i in range(8)], [row])])]))
    assert re.findall(r'<th scope="col"( class="number")?>', page) == ["", *[' class="number"'] * 4, "", "", ""]


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "made" / "report.html"
    write_html(DOCUMENT, path)
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_html(Document("new", "", []), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_folder_is_no_page(tmp_path: Path):
    with pytest.raises(OSError, match="irectory"):
        write_html(DOCUMENT, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wide_table_is_whole_on_a_screen(tmp_path: Path, open_page: Callable[..., Any]):
    """As watch has it: eight columns, long names, and a sentence in the last; of 60 rows, behind a bar on the right."""
    columns = ["norm", "verdict", "samples", "effective", "distance", "lower bound", "detectable", "worst channel"]
    worst = "41: +0.15 σ (2.4 s.e.), variance × 0.99"
    rows = [
        [f"backbone.layer3.{i}.conv_block.bn2", "as stored", 1280, 2048, 0.1234, 0.1234, 0.1234, worst]
        for i in range(60)
    ]
    document = Document("Watch", "s", [Section("Norms", [Table(columns, rows)])])
    opened = open_page(write_html(document, tmp_path / "report.html"), width=1280)
    assert opened.table_overflows == [0]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_has_nothing_to_complain_about(
    tmp_path: Path, open_page: Callable[..., Any], width: int, scheme: str
):
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    wide = Table([f"column number {i}" for i in range(20)], [["a.very.long.name." * 9, *[1.5] * 19]])
    document = Document("Wide" * 30, "unbroken_" * 40, [*DOCUMENT.sections, Section("Wide", [wide])])
    path = write_html(document, tmp_path / "report.html")
    opened = open_page(path, width=width, scheme=scheme)
    assert opened.said == []
    assert opened.requested == [path.as_uri()]
    assert opened.overflow <= 0
    assert len(opened.plot_heights) == 4
    assert min(opened.plot_heights) > 150
