"""Pages name the commits that their rows come from, and refuse rows that no commit stands for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("jinja2")

from benchmarks.sheets import ChangedTreeError, commits, page_options, write_page

CLEAN, LATER, CHANGED = {"commit": "0123abc"}, {"commit": "4567def"}, {"commit": "0123abc, changed"}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def template(folder: Path, text: str) -> Path:
    path = folder / "page.md.jinja"
    path.write_text(text)
    return path


def test_a_page_names_every_commit_once(tmp_path):
    rows = [CLEAN, LATER, CLEAN]
    page = write_page(
        tmp_path / "page.md", template(tmp_path, "{{ x }} at {{ commits | join(', ') }}\n"), {"x": 3}, rows
    )
    assert page.read_text() == "3 at 0123abc, 4567def\n"


@pytest.mark.parametrize("commit", ["0123abc, changed", "", "of an installed library, not of this checkout"])
def test_rows_that_no_commit_holds_are_refused_and_nothing_is_written(tmp_path, commit):
    page, plain = tmp_path / "page.md", template(tmp_path, "{{ commits }}")
    rows = [CLEAN, {"commit": commit}]
    said = rf"1 of 2 rows .*\(1 of {re.escape(commit or 'no commit')}\).*measure them again"
    with pytest.raises(ChangedTreeError, match=said):
        write_page(page, plain, {}, rows)
    assert not page.exists()
    assert commit in write_page(page, plain, {}, rows, changed=True).read_text()


def test_a_template_that_hides_a_commit_or_asks_for_what_nobody_gives_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="names no 4567def"):
        write_page(tmp_path / "page.md", template(tmp_path, "{{ commits[0] }}"), {}, [CLEAN, LATER])
    with pytest.raises(Exception, match="'missing' is undefined"):
        write_page(tmp_path / "page.md", template(tmp_path, "{{ missing }}"), {}, [CLEAN])
    assert not (tmp_path / "page.md").exists()


def test_the_option_takes_rows_of_a_changed_tree():
    assert not page_options("").parse_args([]).changed
    assert commits([CHANGED], changed=page_options("").parse_args(["--changed"]).changed) == ["0123abc, changed"]


def test_every_report_writes_its_pages_in_one_place():
    for report in BENCHMARKS.glob("*/report.py"):
        text = report.read_text()
        assert "write_page(" in text, report
        assert "write_text(" not in text, report


def test_every_row_says_which_commit_it_comes_from():
    files = list(BENCHMARKS.glob("*/rows.jsonl"))
    assert files
    for path in files:
        assert all(json.loads(line).get("commit") for line in path.read_text().splitlines()), path
