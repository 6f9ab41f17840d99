"""Where stdout is closed, or its reader leaves, or has a width of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from batchnorm.cli import main


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, closed, None)  # what Python makes of >&-
    with pytest.raises(SystemExit) as exit_:
        main(["info"])
    assert exit_.value.code == 0


def test_a_reader_that_leaves_is_told_in_the_exit_code_alone() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", "check", "--rules"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("told", "width"), [("60", 60), ("200", 200), (None, 120), ("", 120), ("wide", 120), ("0", 120)]
)
def test_what_goes_to_a_file_is_as_wide_as_columns_says(
    told: str | None, width: int, command: Any, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", told)
    net = "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
    (here / "long.py").write_text(net)
    out = command("fold", "-m", "long:build", "-i", "2,3,9,9").out
    longest = max(map(len, out.splitlines()))
    assert longest <= width
    assert longest > width * 0.6 or width == 200
