from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import batchnorm
from batchnorm.cli.load import load_model

FOLD = ["fold", "-m", "net:build", "-i", "4,3,32,32"]
UNFOLD = ["unfold", "-m", "net:build", "--pairs", "pairs.safetensors"]


@pytest.fixture
def folded(command: Callable[..., Any], here: Path, weights: Path) -> Path:
    """The weights of the folded model, the pairs beside them."""
    assert command(*FOLD, "-w", weights, "-o", "folded.safetensors", "--pairs", "pairs.safetensors").code == 0
    return here / "folded.safetensors"


def files(here: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["again.pt", "again.safetensors"])
def test_the_state_dict_from_before_is_back_bit_for_bit(
    command: Callable[..., Any], here: Path, weights: Path, folded: Path, name: str
) -> None:
    done = command(*UNFOLD, "-w", folded, "-o", name)
    assert done.code == 0
    assert "2 norms are back" in done.out
    again = load_file(here / name) if name.endswith("safetensors") else torch.load(here / name, weights_only=True)
    before = torch.load(weights, weights_only=True)
    assert set(again) == set(before)
    assert all(torch.equal(again[key], value) for key, value in before.items())


def test_the_folded_weights_are_loaded_in_python_too(here: Path, weights: Path, folded: Path) -> None:
    original = load_model("net:build", weights).eval()
    deployed = batchnorm.refold(load_model("net:build").eval(), here / "pairs.safetensors")
    deployed.load_state_dict(load_file(folded))
    x = torch.randn(3, 3, 20, 20)
    torch.testing.assert_close(deployed(x), original(x))


CUSTOM = """
import torch
from torch import nn


class Norm(nn.BatchNorm2d):
    def __init__(self, channels, label):
        super().__init__(channels)
        self.label = label


def build():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), Norm(4, "mine"), nn.ReLU())
"""


def test_norms_of_your_own_class_and_borders(command: Callable[..., Any], here: Path) -> None:
    (here / "custom.py").write_text(CUSTOM)
    torch.manual_seed(0)
    net = load_model("custom:build")
    for norm in (net[0], net[2]):
        norm.running_mean.normal_()
    torch.save(net.state_dict(), here / "custom.pt")
    model = ["-m", "custom:build"]
    done = command(
        "fold", *model, "-w", "custom.pt", "-i", "2,3,8,8", "--borders", "-o", "f.pt", "--pairs", "p.safetensors"
    )
    assert done.code == 0
    assert "1.border" in torch.load(here / "f.pt", weights_only=True)
    assert command("unfold", *model, "-w", "f.pt", "--pairs", "p.safetensors", "-o", "again.pt").code == 0
    again = torch.load(here / "again.pt", weights_only=True)
    assert list(again) == list(net.state_dict())
    assert all(torch.equal(again[key], value) for key, value in net.state_dict().items())


def test_json_alone_is_on_stdout_and_without_an_output_nothing_is_written(
    command: Callable[..., Any], here: Path, folded: Path
) -> None:
    before = files(here)
    found = json.loads(command(*UNFOLD, "-w", folded, "--json").out)
    assert found["norms"] == [{"name": "bn", "class": "BatchNorm2d"}, {"name": "bn2", "class": "BatchNorm2d"}]
    assert (found["parameters"], found["removed"]) == (["conv.bias", "conv.weight", "down.weight"], ["down.bias"])
    assert found["output"] is None
    assert files(here) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--pairs": "none.safetensors"}, "--pairs none.safetensors: no such file."),
        (
            {"--pairs": "folded.safetensors"},
            "--pairs folded.safetensors: expected the pairs of a fold",
        ),
        ({"--pairs": "net.py"}, "--pairs net.py: expected the pairs of a fold"),
        ({"-w": "net.pt"}, "net.pt does not fit Net: 1 entry of the model not in the file, first 'down.bias'"),
        ({"-w": "trained.pt"}, "conv.weight is not what folding made of it"),
        ({"-m": "custom:build"}, "pairs.safetensors does not fit --model custom:build: the model has no module bn"),
        ({"-o": "again.pt2"}, "expected a name that ends in .safetensors, .pt or .pth; got .pt2"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_no_file_changes(
    command: Callable[..., Any], here: Path, folded: Path, change: dict[str, str], said: str
) -> None:
    (here / "custom.py").write_text(CUSTOM)
    state = load_file(folded)
    state["conv.weight"] *= 1.01
    torch.save(state, here / "trained.pt")
    before = files(here)
    arguments = {"-m": "net:build", "-w": str(folded), "--pairs": "pairs.safetensors", "-o": "net.pt"} | change
    assert said in command("unfold", *(word for pair in arguments.items() for word in pair)).sentence
    assert files(here) == before
