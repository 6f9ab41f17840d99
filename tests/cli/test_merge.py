from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.cli.load import load_model
from batchnorm.statistics import merge

MODEL = ("-m", "net:build")


@pytest.fixture
def checkpoints(here: Path, weights: Path) -> list[Path]:
    """Two networks that have seen different data."""
    other = load_model("net:build", seed=4).train()
    with torch.no_grad():
        for _ in range(3):
            other(torch.randn(16, 3, 32, 32) * 2 + 1)
    other.bn.num_batches_tracked.fill_(7)
    torch.save({"state_dict": {f"module.{k}": v for k, v in other.state_dict().items()}}, here / "other.ckpt")
    return [weights, here / "other.ckpt"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["soup.pt", "soup.safetensors"])
@pytest.mark.parametrize("spec", ["net:build", "net:module"])
def test_what_it_writes_is_the_merged_model(
    command: Callable[..., Any], here: Path, checkpoints: list[Path], name: str, spec: str
) -> None:
    one, other = checkpoints
    done = command("merge", "-m", spec, "-w", one, "--by", 3, "-w", other, "--by", 1, "-o", name)
    assert done.code == 0, done.err
    assert "2 models merged" in done.out
    assert f"batchnorm recalibrate -m {spec} -w {name}" in done.err
    merged = load_model("net:build", here / name)
    expected = merge([load_model("net:build", path) for path in checkpoints], [3, 1]).model
    for key, value in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[key], value)
    assert merged.bn.num_batches_tracked == 7


def test_json_alone_is_on_stdout(command: Callable[..., Any], here: Path, checkpoints: list[Path]) -> None:
    before = files(here)
    done = command("merge", *MODEL, "-w", checkpoints[0], "-w", checkpoints[1], "--json")
    found = json.loads(done.out)
    assert found["weights"] == [0.5, 0.5]
    assert [layer["name"] for layer in found["layers"]] == ["bn", "bn2"]
    assert found["output"] is None
    assert files(here) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-w", "net.pt", "-w", "none.pt"], "none.pt: no such file"),
        (["-w", "net.pt", "-w", "nan.pt"], "merge: nan.pt: bn2.weight holds nan or infinity in 1 of its 4 values"),
        (["-w", "net.pt", "-w", "cut.pt"], "cut.pt does not fit net: 1 entry of the model not in the file"),
        (["-w", "net.pt", "-w", "net.pt", "--by", "1"], "--by: expected 2, one a model; got 1"),
        (["-w", "net.pt", "-w", "net.pt", "--by", "1", "--by", "-1"], "--by[1] is -1; expected a finite number"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_no_file_changes(
    command: Callable[..., Any], here: Path, checkpoints: list[Path], arguments: list[str], said: str
) -> None:
    state = torch.load(here / "net.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "bn.weight"}, here / "cut.pt")
    state["bn2.weight"][1] = torch.nan
    torch.save(state, here / "nan.pt")
    before = files(here)
    assert said in command("merge", *MODEL, *arguments, "-o", "net.pt", "--json").sentence.lower()
    assert files(here) == before
