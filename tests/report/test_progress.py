"""The bar goes to standard error, and only where somebody looks at it."""

from __future__ import annotations

import io
import sys

import pytest

from batchnorm.report.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, show: bool | None, total: int | None = 3) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("Measuring", total, show) as advance:
        for _ in range(3):
            advance()
    return stream.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = shown(monkeypatch, Terminal(), None)
    assert "Measuring" in text
    assert "3/3" in text


def test_a_pipe_gets_none_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), None) == ""
    assert "Measuring" in shown(monkeypatch, io.StringIO(), True)


def test_a_terminal_gets_none_if_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), False) == ""


def test_an_unknown_total_is_counted_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "3/?" in shown(monkeypatch, io.StringIO(), True, total=None)


def test_no_standard_error_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar("Measuring", 1, None) as advance:
        advance()
