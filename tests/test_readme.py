"""What the README shows is what its example prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from batchnorm.diagnosis.causes import CAUSES

README = Path(__file__).resolve().parents[1] / "README.md"


def lines(text: str) -> list[str]:
    """Return the lines without what differs between machines: errors of rounding, and spaces at the ends."""
    return [re.sub(r"\d(\.\d+)?e-\d+", "…", line).rstrip() for line in text.splitlines()]


@pytest.fixture
def shown() -> tuple[str, str]:
    section = README.read_text().split("## Ten lines")[1].split("\n## ")[0]
    code, text = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "text"))
    assert code is not None
    assert text is not None
    return code[1], text[1]


def test_the_example_prints_what_is_shown(shown: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = shown
    monkeypatch.setenv("COLUMNS", "80")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    rest = iter(lines(printed.getvalue()))
    for line in lines(text):
        assert line == "…" or line in rest, line  # in this order


def test_the_links_lead_to_files() -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", README.read_text())
    assert len(targets) > 10
    assert [target for target in targets if not (README.parent / target).exists()] == []


def test_the_number_of_causes_is_that_of_the_code() -> None:
    told = [re.findall(r"(\d+) causes,", (README.parent / name).read_text()) for name in ("README.md", "CHANGELOG.md")]
    assert told == [[str(len(CAUSES))]] * 2


def test_the_folders_that_pages_name_exist() -> None:
    pages = [README, *(README.parent / "docs").glob("*.md")]
    named = {folder for page in pages for folder in re.findall(r"`(?:src/)?(batchnorm/[a-z_/]+/)`", page.read_text())}
    assert named
    assert [folder for folder in sorted(named) if not (README.parent / "src" / folder).is_dir()] == []
