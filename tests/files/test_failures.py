"""Why a file cannot be written is said in the words of the system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from batchnorm.files.failures import system_error


def test_the_number_that_rust_tells_is_the_systems_error(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    error = system_error(RuntimeError(f"I/O error: gone (os error {errno.ENOSPC})"), path)
    assert error is not None
    assert (error.errno, error.strerror, error.filename) == (errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    assert not path.exists()  # nothing was tried


def test_without_a_number_the_same_place_is_written_again(tmp_path: Path) -> None:
    error = system_error(RuntimeError("unexpected pos 64"), tmp_path / "missing" / "net.pt")
    assert isinstance(error, FileNotFoundError)
    assert isinstance(system_error(RuntimeError("Parent directory is gone"), tmp_path), IsADirectoryError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_disk_that_is_full_is_found_by_writing_some_more() -> None:
    error = system_error(RuntimeError("PytorchStreamWriter failed writing file"), Path("/dev/full"))
    assert error is not None
    assert error.errno == errno.ENOSPC


def test_where_the_system_has_no_objection_there_is_none(tmp_path: Path) -> None:
    assert system_error(ValueError("(os error many)"), tmp_path / "net.pt") is None
