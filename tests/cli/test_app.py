from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import batchnorm
from batchnorm.cli import check, demo, diagnose, fold, info, merge, recalibrate, unfold, watch
from batchnorm.cli.load import load_model

COMMANDS = {
    "demo": demo,
    "diagnose": diagnose,
    "recalibrate": recalibrate,
    "merge": merge,
    "fold": fold,
    "unfold": unfold,
    "check": check,
    "watch": watch,
    "info": info,
}


@pytest.fixture(params=[80, 120])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def test_the_help_shows_every_command_in_one_line_each_at_120_columns(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = command("--help")
    assert shown.code == 0
    rows = re.findall(r"^│ ([a-z]+) +(\S.*?) +│$", shown.out, re.MULTILINE)
    assert {name for name, _ in rows} == set(COMMANDS)
    assert all(summary.endswith(".") for _, summary in rows)


def test_no_command_is_the_help(command: Callable[..., Any]) -> None:
    assert command().out == command("--help").out == command("-h").out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_fits_the_terminal_and_holds_its_examples_whole(
    command: Callable[..., Any], columns: int, name: str
) -> None:
    shown = command(name, "--help")
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= columns
    examples = [line.strip() for line in COMMANDS[name].EPILOG.splitlines() if line.startswith("  batchnorm")]
    assert examples
    assert set(examples) <= {line.strip() for line in lines}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(command: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    rows = [line for line in command(name, "--help").out.splitlines() if re.match(r"│ +\*? *--", line)]
    assert len(rows) >= 2
    for row in rows:
        assert row.strip("│ ").endswith((".", "]")), row


def test_the_version_is_the_packages(command: Callable[..., Any]) -> None:
    assert command("--version").out == f"batchnorm {batchnorm.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fold", "--help"], ["fold", "--bogus"]])
def test_help_and_usage_errors_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom batchnorm.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fold", "--bogus"], "No such option: --bogus"),
        (["fold"], "Missing option '--model' / '-m'"),
        (["fol"], "No such command 'fol'"),
        (["fold", "-m", "net:build", "-b", "0", "-i", "1,2"], "--batch-size"),
        (["fold", "-m", "net:build", "-b", "many", "-i", "1,2"], "--batch-size"),
        (["recalibrate", "-m", "net:build", "-d", "x.npz", "--estimator", "poled"], "poled"),
        (["info", "net:build"], "net:build"),
    ],
)
def test_a_command_typed_wrong_is_one_sentence_that_points_to_the_help(
    command: Callable[..., Any], arguments: list[str], said: str
) -> None:
    sentence = command(*arguments).sentence
    assert said in sentence
    assert re.search(r"See batchnorm( \w+)? --help\.$", sentence)


@pytest.mark.every(2)
@pytest.mark.parametrize("start", ["module", "script"])
def test_the_module_and_the_script_are_the_same_command(here: Path, start: str) -> None:
    script = Path(sys.executable).with_name("batchnorm")
    if start == "script" and not script.exists():
        pytest.skip("the package is not installed as a distribution")
    words = [sys.executable, "-m", "batchnorm"] if start == "module" else [str(script)]
    words += ["fold", "-m", "net:nothing", "-i", "1,2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --model net:nothing: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_printed_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "batchnorm", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device.\n"


def test_a_terminal_without_unicode_gets_what_it_can_show(here: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = [sys.executable, "-m", "batchnorm", "check", "-m", "net:build", "-i", "2,3,32,32"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BN001" in done.stdout


def examples() -> list[Any]:
    lines = [(name, line.strip()) for name, module in COMMANDS.items() for line in module.EPILOG.splitlines()]
    return [pytest.param(line, id=line) for name, line in lines if line.startswith("batchnorm") and name != "demo"]


@pytest.mark.every(4)
@pytest.mark.parametrize("line", examples())
def test_the_examples_of_the_help_work_when_pasted(
    command: Callable[..., Any], here: Path, weights: Path, line: str
) -> None:
    for name in ("a.pt", "b.pt", "c.pt"):  # the checkpoints that merge is shown with
        (here / name).write_bytes(weights.read_bytes())
    if line.startswith("batchnorm unfold"):  # it starts from what the line before it has written
        before = next(other for other in unfold.EPILOG.splitlines() if "batchnorm fold" in other)
        assert command(*shlex.split(before)[1:]).code == 0
    if "-m net.pt2" in line:
        torch.export.save(torch.export.export(load_model("net:build").eval(), (torch.rand(2, 3, 32, 32),)), "net.pt2")
    words = shlex.split(line.partition(" > ")[0])
    done = command(*words[1:])
    assert done.code in (0, 1), done.err
    assert done.out
    for option, file in pairwise(words):
        if option in ("-o", "--html", "--pairs"):
            assert (here / file).stat().st_size > 0
