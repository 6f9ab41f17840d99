"""The public API on one page: every name is there, documented, and found without importing torch first."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import batchnorm


@pytest.mark.parametrize("name", batchnorm.__all__)
def test_every_name_is_there_and_documented(name: str):
    assert getattr(batchnorm, name).__doc__
    assert name in dir(batchnorm)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'folds'"):
        _ = batchnorm.folds


ROOT = Path(__file__).parent.parent
DOTTED = re.compile(r"(?<![\w./-])batchnorm(?:\.[A-Za-z_]\w*)+")


def named_in_docs() -> set[str]:
    """Return the dotted names in code of the documentation; directives for Sphinx name modules, which it imports."""
    found: set[str] = set()
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"```\{eval-rst\}.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for code in re.findall(r"```python(.*?)```|`([^`\n]+)`", text, flags=re.DOTALL):
            lines = [line for part in code for line in part.splitlines() if not re.match(r"\s*(from|import) ", line)]
            found |= set(DOTTED.findall("\n".join(lines)))
    return found


def named_in_messages() -> set[str]:
    """Return the dotted names in texts of the source that are no docstrings and no names of modules by themselves."""
    found: set[str] = set()
    for path in Path(batchnorm.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        described = [n.body[0] for n in ast.walk(tree) if isinstance(n, holders) and n.body]
        docstrings = {id(first.value) for first in described if isinstance(first, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found |= set(DOTTED.findall(node.value)) - {node.value}
    return found


def unreached(names: list[str]) -> list[str]:
    """Return which of the names a process that imported nothing else of the package does not reach by their dots."""
    code = (
        "import functools, os, sys, batchnorm\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"  # once, and each name in a process of its own: what one imports may help the next
        "def reach(name):\n"
        "    try: functools.reduce(getattr, name.split('.')[1:], batchnorm)\n"
        "    except AttributeError: print(name, flush=True)\n"
        "    except Exception: assert 'integrations' in name\n"  # what it goes with is not installed, or not whole
        "for name in sys.argv[1:]:\n"
        "    if os.fork() == 0:\n"
        "        reach(name)\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.sweep
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied by fork")
def test_what_documentation_and_messages_name_is_reached_by_its_dots_in_a_fresh_process():
    named = named_in_docs() | named_in_messages()
    assert {"batchnorm.monitor.measure", "batchnorm.statistics.Population.load", "batchnorm.recalibrate"} <= named
    assert unreached([*sorted(named), "batchnorm.nothing"]) == ["batchnorm.nothing"]
    assert unreached([f"batchnorm.{name}" for name in batchnorm._SUBPACKAGES]) == []


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


def test_docstring_examples_are_collected_at_every_depth():
    files = ["moments.py", "nn/batch_norm.py", "cli/load/example.py"]
    paths = [str(Path(batchnorm.__file__).parent / file) for file in files]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout
    assert all(f"{file}::line:" in done.stdout for file in files)


def test_verbs_work_where_another_device_is_the_default():
    """Model and data are on the CPU; a tensor that a verb makes for itself would be on the meta device, and empty."""

    def made() -> tuple[torch.nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()]
        model, x = torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 4, 3)), torch.randn(32, 3, 8, 8)
        model(x)
        return model.eval(), x

    def watched(model: torch.nn.Module, x: torch.Tensor) -> object:
        with batchnorm.watch(model) as watching, torch.no_grad():
            model(x)
        return watching.result()

    verbs = {
        "fold": batchnorm.fold,
        "fold with normalization": lambda m, x: batchnorm.fold(m, x, input_mean=[0.1, 0.2, 0.3], input_std=0.5),
        "place": lambda m, x: batchnorm.place(torch.nn.Sequential(m[0], m[2], m[3]), x),
        "convert": lambda m, x: batchnorm.convert(m, x, fuse=True),
        "diagnose": lambda m, x: batchnorm.diagnose(m, [x]),
        "recalibrate": lambda m, x: batchnorm.recalibrate(m, [x]),
        "check": batchnorm.check,
        "watch": watched,
    }
    inputs = {name: made() for name in verbs}
    expected = {name: re.sub(r"\d", "", str(verb(*made()))) for name, verb in verbs.items()}
    torch.set_default_device("meta")
    try:
        got = {name: re.sub(r"\d", "", str(verb(*inputs[name]))) for name, verb in verbs.items()}
    finally:
        torch.set_default_device(None)
    assert got == expected
