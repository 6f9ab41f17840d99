"""The public API on one page: every name is there, documented, and found without importing torch first."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import batchnorm


@pytest.mark.parametrize("name", batchnorm.__all__)
def test_every_name_is_there_and_documented(name: str):
    assert getattr(batchnorm, name).__doc__
    assert name in dir(batchnorm)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'folds'"):
        _ = batchnorm.folds


def test_the_version_is_that_of_the_package():
    assert batchnorm.__version__ == version("batchnorm")


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, batchnorm.cli\n"
        "try: batchnorm.cli.main(['--help'])\n"
        "except SystemExit as leave: assert leave.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("file", ["moments.py", "nn/batch_norm.py", "cli/load/example.py"])
def test_docstring_examples_are_collected_at_every_depth(file: str):
    path = Path(batchnorm.__file__).parent / file
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout
    assert "::line:" in done.stdout
