"""The examples in the README, the manual and the docstrings are tests too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run the examples of one page in a folder of their own, from a known seed."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("examples"))
    torch.manual_seed(0)
    yield
    os.chdir(before)


pages = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md"], fixtures=["example_folder"])
# a pattern without a folder matches at every depth; "**" would match one level only
docstrings = Sybil(parsers=[DocTestParser()], path="src", pattern="*.py")
pytest_collect_file = (pages + docstrings).pytest()
