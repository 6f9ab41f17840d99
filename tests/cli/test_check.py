from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.checks import RULES
from batchnorm.cli.load import load_model

SHAPE = "4,3,32,32"
CLEAN = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
def swapped():
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(6))
"""


@pytest.fixture(autouse=True)
def clean(here: Path) -> None:
    (here / "clean.py").write_text(CLEAN)


def test_findings_exit_with_1_and_a_clean_model_with_0(command: Callable[..., Any]) -> None:
    found = command("check", "-m", "net:build", "-i", SHAPE)
    assert found.code == 1
    assert "BN001" in found.out
    clean = command("check", "-m", "clean:build", "-i", SHAPE)
    assert clean.code == 0
    assert "No findings" in clean.out


@pytest.mark.parametrize("arguments", [["--json"], ["--format", "json"]])
def test_json_alone_is_on_stdout(command: Callable[..., Any], arguments: list[str]) -> None:
    done = command("check", "-m", "net:build", "-i", SHAPE, *arguments)
    assert done.code == 1
    assert [(f["code"], f["layer"]) for f in json.loads(done.out)["findings"]] == [("BN001", "conv")]


def test_sarif_holds_the_findings_at_the_file_of_the_model(command: Callable[..., Any]) -> None:
    done = command("check", "-m", "net:build", "-i", SHAPE, "--format", "sarif")
    assert done.code == 1
    log = json.loads(done.out)
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    (result,) = run["results"]
    assert result["ruleId"] == "BN001"
    assert "net.py" in json.dumps(result["locations"])
    assert "conv" in json.dumps(result["locations"])


@pytest.mark.parametrize(
    ("arguments", "codes"),
    [
        (["--eval"], ["BN001", "BN006"]),
        (["--eval", "--select", "BN006"], ["BN006"]),
        (["--eval", "--select", "BN006, statistics-never-updated", "--select", "BN001"], ["BN001", "BN006"]),
        (["--eval", "--ignore", "BN001,BN006"], []),
        (["--eval", "--select", "BN006", "--ignore", "BN006"], []),
    ],
)
def test_rules_are_selected_and_ignored(command: Callable[..., Any], arguments: list[str], codes: list[str]) -> None:
    done = command("check", "-m", "net:build", "-i", SHAPE, "--json", *arguments)
    assert sorted({f["code"] for f in json.loads(done.out)["findings"]}) == codes
    assert done.code == (1 if codes else 0)


def test_the_list_of_rules_needs_no_model(command: Callable[..., Any]) -> None:
    done = command("check", "--rules")
    assert done.code == 0
    assert [line.split()[:2] for line in done.out.splitlines()] == [[rule.code, rule.name] for rule in RULES]


def test_fix_writes_the_mended_state_dict_and_exits_with_0(
    command: Callable[..., Any], here: Path, weights: Path
) -> None:
    done = command("check", "-m", "net:build", "-w", weights, "-i", SHAPE, "--fix", "-o", "fixed.pt")
    assert done.code == 0
    assert "no longer holds conv.bias: change net.py likewise" in done.err
    state = torch.load(here / "fixed.pt", weights_only=True)
    original = load_model("net:build", weights).eval()
    mended = load_model("net:build").eval()
    mended.conv.bias = None
    mended.load_state_dict(state)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(mended(x), original(x))


def test_what_fix_leaves_exits_with_1_and_is_told(command: Callable[..., Any], here: Path) -> None:
    done = command("check", "-m", "clean:swapped", "-i", SHAPE, "--fix", "-o", "fixed.pt", "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert [f["code"] for f in found["findings"]] == [f["code"] for f in found["left"]] == ["BN002"]
    assert found["output"] == "fixed.pt"
    assert "--unsafe-fixes mends more" in done.err
    done = command("check", "-m", "clean:swapped", "-i", SHAPE, "--fix", "--unsafe-fixes", "-o", "fixed.pt", "--json")
    assert done.code == 0
    assert [f["code"] for f in json.loads(done.out)["applied"]] == ["BN002"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-i", SHAPE, "--select", "BN099"], "no rule of that code or name"),
        (["-i", SHAPE, "--fix"], "--fix and --output go together"),
        (["-i", SHAPE, "-o", "fixed.pt"], "--fix and --output go together"),
        (["-i", SHAPE, "--unsafe-fixes"], "give --fix too"),
        (["-i", SHAPE, "--format", "yaml"], "--format"),
        (["-i", SHAPE, "--fix", "-o", "fixed.onnx"], "got .onnx"),
        (["-i", "4,5,32,32"], "5"),
        ([], "--input or --data is needed"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    command: Callable[..., Any], here: Path, arguments: list[str], said: str
) -> None:
    before = {path.name for path in here.iterdir()}
    assert said in command("check", "-m", "net:build", "--json", *arguments).sentence
    assert {path.name for path in here.iterdir()} == before
