"""How Hypothesis searches; and the examples in the README, the manual and the docstrings, which are tests too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

# The same examples in every run and on every machine, and no clock: whether a test passes is not left to chance. A test
# that wants more than others asks for a multiple of ``settings.default.max_examples``.
settings.register_profile(
    "test", max_examples=10, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("all", settings.get_profile("test"), max_examples=60)  # pytest --hypothesis-profile all
settings.load_profile("test")


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the sweeps the page that compiles C++: tests/folding/test_fold_deploy.py does as it says."""
    for item in items:
        if item.path.name == "deploy.md":
            item.add_marker(pytest.mark.sweep)
