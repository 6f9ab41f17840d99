"""Two writers of one file do not meet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchnorm.files.replace import replacing


def test_two_writers_at_once_each_write_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    with replacing(target) as one, replacing(target) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one"  # the one that was finished last
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_pipe_or_a_device_is_not_replaced_with_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.html"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="a device or a pipe is no place for a file"), replacing(pipe):
        raise AssertionError("the body is not entered")
    assert pipe.is_fifo()
