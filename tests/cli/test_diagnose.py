from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.cli.load import load_model
from batchnorm.statistics.recalibrate import recalibrate

MODEL = ("-m", "ready:build", "-w", "net.pt")
READY = """
import net


def build():
    return net.build().eval()


def size(output, batch):
    return output.square().mean()
"""


@pytest.fixture(autouse=True)
def trained(here: Path) -> None:
    """Weights with the statistics of pictures drawn like those in images.npz."""
    (here / "ready.py").write_text(READY)
    model = load_model("net:build", seed=3)
    recalibrate(model, [torch.randn(400, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 + 1])
    torch.save(model.state_dict(), here / "net.pt")


def test_a_healthy_model_exits_with_0(command: Callable[..., Any]) -> None:
    done = command("diagnose", *MODEL, "-d", "images.npz", "-b", 20)
    assert done.code == 0, done.out
    assert "Nothing found" in done.out


def test_a_fault_exits_with_1_and_is_in_the_data_and_on_the_page(command: Callable[..., Any], here: Path) -> None:
    state = torch.load("net.pt")
    state["bn2.running_mean"][1] = torch.nan
    torch.save(state, "net.pt")
    before = (here / "net.pt").read_bytes()
    done = command("diagnose", *MODEL, "-d", "images.npz", "--metric", "ready:size", "--html", "d.html", "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert [(f["cause"], f["layer"]) for f in found["findings"]] == [("poisoned", "bn2")]
    assert found["metrics"]["training"] is not None
    assert "poisoned" in (here / "d.html").read_text()
    assert (here / "net.pt").read_bytes() == before


def test_training_data_tell_a_shift(command: Callable[..., Any]) -> None:
    done = command("diagnose", *MODEL, "-d", "net:batches", "--training-data", "images.npz", "--json")
    assert done.code == 1
    assert json.loads(done.out)["findings"][0]["cause"] == "domain_shift"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-d", "none.npz"], "no such file"),
        (["-d", "images.npz", "--metric", "ready:nothing"], "has no 'nothing'"),
        (["-d", "images.npz", "--metric", "net:text"], "expected a function"),
        (["-d", "images.npz", "--metric", "net:wants"], "expected one number"),
        (["-d", "images.npz", "--names", "bn9"], "did you mean"),
    ],
)
def test_what_goes_wrong_is_one_sentence(command: Callable[..., Any], arguments: list[str], said: str) -> None:
    assert said in command("diagnose", *MODEL, *arguments).sentence
