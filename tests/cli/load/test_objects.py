from __future__ import annotations

import sys
from pathlib import Path

import pytest

from batchnorm.cli.errors import CommandError
from batchnorm.cli.load.objects import call_factory, find_object


def test_a_module_of_the_current_directory_is_found(here: Path) -> None:
    assert find_object("--model", "net:build").__name__ == "build"


def test_a_package_and_a_nested_name_are_found(here: Path) -> None:
    (here / "nets").mkdir()
    (here / "nets" / "small.py").write_text("class Zoo:\n    def build(): return 5\n")
    assert find_object("--model", "nets.small:Zoo.build")() == 5


def test_an_installed_package_is_found(here: Path) -> None:
    assert find_object("--model", "torch.nn:Linear").__name__ == "Linear"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("net", "expected MODULE:NAME"),
        ("net:", "expected MODULE:NAME"),
        (":build", "expected MODULE:NAME"),
        ("net.py:build", "did you mean net:build?"),
        ("nets/small.py:build", "did you mean nets.small:build?"),
        ("net:build()", "expected MODULE:NAME"),
        ("missing:build", "no module 'missing' in "),
        ("net.sub:build", "no module 'net.sub' in "),
        ("net:bild", "has no 'bild'; did you mean 'build'?"),
        ("net:zzzzzz", "has no 'zzzzzz'; it has "),
        ("net:build.inner", "has no 'inner'"),
    ],
)
def test_what_cannot_be_found_is_told(here: Path, spec: str, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        find_object("--model", spec)
    assert str(raised.value).startswith(f"--model {spec.split(':')[0]}")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_package", "importing it failed, ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f(:", "importing it raised SyntaxError"),
        ("1 / 0", "importing it raised ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('usage')", "importing it ended the program"),
    ],
)
def test_a_module_that_fails_is_told_apart_from_one_that_is_missing(here: Path, source: str, said: str) -> None:
    (here / "faulty.py").write_text(source)
    with pytest.raises(CommandError) as raised:
        find_object("--model", "faulty:build")
    assert said in str(raised.value)
    assert "faulty" not in sys.modules


def test_a_factory_with_arguments_names_them(here: Path) -> None:
    with pytest.raises(CommandError, match=r"it needs arguments \(width, depth\)"):
        call_factory("--model", "net:wants", find_object("--model", "net:wants"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("broken", "raised ValueError: no such checkpoint."), ("quits", "ended the program")],
)
def test_a_factory_that_fails_is_told(here: Path, name: str, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        call_factory("--model", f"net:{name}", find_object("--model", f"net:{name}"))
    assert said in str(raised.value)
    assert "second line" not in str(raised.value)


def test_an_interrupt_in_a_factory_is_not_swallowed(here: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_factory("--model", "net:x", interrupted)


def test_only_what_a_file_defines_itself_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "import math\nimport torch.nn as nn\nfrom pathlib import Path\nfrom math import sqrt\n"
        "def build(): ...\nclass Net: ...\nbatches = [1]\nready = nn.Linear(1, 1)\n"
    )
    (tmp_path / "own_names.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CommandError, match="has no 'zzzzzz'; it has Net, batches, build, ready"):
        find_object("--model", "own_names:zzzzzz")
    with (tmp_path / "own_many.py").open("w") as file:
        file.writelines(f"a{i} = {i}\n" for i in range(8))
    with pytest.raises(CommandError, match="it has a0, a1, a2, a3, a4 and 3 more"):
        find_object("--model", "own_many:zzzzzz")
