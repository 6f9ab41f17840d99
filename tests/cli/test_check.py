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
def late():
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.GELU(), nn.BatchNorm2d(6))
def misused():
    norms = nn.BatchNorm2d(6, momentum=0.99), nn.BatchNorm2d(6, eps=1.0), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), *norms, nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6))
    model[1].running_var[2] = -1
    return model
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
    off = [line.split()[0] for line in done.out.splitlines() if line.endswith("Off unless selected.")]
    assert off == [rule.code for rule in RULES if not rule.by_default]


@pytest.mark.parametrize(
    ("arguments", "codes"), [([], []), (["--select", "BN015"], ["BN015"]), (["--select", "BN"], [])]
)
def test_a_rule_that_is_off_runs_when_it_is_named(
    command: Callable[..., Any], arguments: list[str], codes: list[str]
) -> None:
    done = command("check", "-m", "clean:late", "-i", SHAPE, "--json", *arguments)
    assert [f["code"] for f in json.loads(done.out)["findings"]] == codes
    assert done.code == (1 if codes else 0)


def test_values_and_modes_are_told_in_80_columns(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = command("check", "-m", "clean:misused", "-i", "2,3,8,8")
    assert done.code == 1
    assert max(map(len, done.out.splitlines())) <= 80
    assert all(code in done.out for code in ("BN007", "BN008", "BN009", "BN010", "BN014"))


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
