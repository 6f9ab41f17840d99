"""``python -m batchnorm`` is the command line."""

from __future__ import annotations

import runpy
import sys

import pytest

import batchnorm


def test_the_package_runs_as_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["batchnorm", "--version"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("batchnorm", run_name="__main__")
    assert exit_.value.code in (0, None)
    assert batchnorm.__version__ in capsys.readouterr().out
