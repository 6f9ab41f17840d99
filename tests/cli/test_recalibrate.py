from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from batchnorm.cli.load import load_model
from batchnorm.moments import Moments

MODEL = ("-m", "net:build", "-w", "net.pt")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["better.pt", "better.pth", "better.safetensors"])
def test_what_it_writes_loads_and_holds_the_statistics_of_the_data(
    command: Callable[..., Any], here: Path, weights: Path, name: str
) -> None:
    done = command("recalibrate", *MODEL, "-d", "images.npz", "-b", 30, "-o", name)
    assert done.code == 0
    assert "bn2" in done.out
    assert f"wrote {name}." in done.err
    before, after = load_model("net:build", weights), load_model("net:build", here / name)
    x = torch.from_numpy(np.load(here / "images.npz")["x"]).float()
    with torch.no_grad():
        truth = Moments.of(before.conv(x))  # what the first norm meets does not depend on the cut into batches
    # float32 data: each value carries its rounding, relative 2⁻²⁴, and the sums are float64
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(after.bn.running_mean, truth.mean.float(), **tolerance)
    torch.testing.assert_close(after.bn.running_var, truth.variance(correction=1).float(), **tolerance)
    assert not torch.equal(before.bn2.running_var, after.bn2.running_var)
    assert torch.equal(before.conv.weight, after.conv.weight)


def test_json_alone_is_on_stdout(command: Callable[..., Any], here: Path, weights: Path) -> None:
    done = command("recalibrate", *MODEL, "-d", "net:batches", "--json")
    found = json.loads(done.out)
    assert found["output"] is None
    assert {"bn", "bn2"} <= set(json.dumps(found).replace('"', " ").split())
    assert set(files(here)) == {"images.npz", "net.py", "net.pt"}


@pytest.mark.parametrize("loader", ["net:batches", "net:labelled", "net:mapped"])
def test_batches_may_be_tensors_tuples_or_dicts(
    command: Callable[..., Any], here: Path, weights: Path, loader: str
) -> None:
    assert command("recalibrate", *MODEL, "-d", loader).code == 0


def test_only_the_norms_named_change(command: Callable[..., Any], here: Path, weights: Path) -> None:
    assert command("recalibrate", *MODEL, "-d", "images.npz", "--names", "bn2", "-o", "out.safetensors").code == 0
    before, after = torch.load(weights, weights_only=True), load_file(here / "out.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"bn2.running_mean", "bn2.running_var"} <= changed
    assert all(name.startswith("bn2.") for name in changed)


def test_the_estimators_differ(command: Callable[..., Any], here: Path, weights: Path) -> None:
    for estimator in ("pooled", "within"):
        done = command(
            "recalibrate", *MODEL, "-d", "images.npz", "-b", 30, "--estimator", estimator, "-o", f"{estimator}.pt"
        )
        assert done.code == 0
    states = [torch.load(here / f"{name}.pt", weights_only=True) for name in ("pooled", "within")]
    assert not torch.equal(states[0]["bn.running_var"], states[1]["bn.running_var"])


def test_the_weights_file_itself_may_be_replaced(command: Callable[..., Any], here: Path, weights: Path) -> None:
    old = torch.load(weights, weights_only=True)
    assert command("recalibrate", *MODEL, "-d", "images.npz", "-o", weights).code == 0
    new = torch.load(weights, weights_only=True)
    assert new.keys() == old.keys()
    assert not torch.equal(new["bn.running_mean"], old["bn.running_mean"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-d", "none.npz"], "no such file"),
        (["-d", "cut.npz"], "it may be cut short"),
        (["-d", "nan.npz"], "NaN"),
        (["-d", "net:poisoned"], "NaN"),
        (["-d", "empty.npz"], "has no sample"),
        (["-d", "net:empty"], "at least one batch; the list gave none"),
        (["-d", "net:failing"], "disk on fire"),
        (["-d", "net:broken"], "raised ValueError: no such checkpoint"),
        (["-d", "net:strings"], "str"),
        (["-d", "wrong.npz"], "batch 0"),
        (["-d", "images.npz", "--names", "bn9"], "did you mean"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_no_file_changes(
    command: Callable[..., Any], here: Path, weights: Path, arguments: list[str], said: str
) -> None:
    images = np.load(here / "images.npz")["x"]
    (here / "cut.npz").write_bytes((here / "images.npz").read_bytes()[:5000])
    np.savez(here / "empty.npz", x=images[:0])
    np.savez(here / "wrong.npz", x=images[:, :2])
    images[70, 1, 2, 3] = np.nan
    np.savez(here / "nan.npz", x=images)
    before = files(here)
    assert said.lower() in command("recalibrate", *MODEL, *arguments, "-o", "net.pt", "--json").sentence.lower()
    assert files(here) == before


def test_an_interrupt_leaves_every_file_as_it_was(command: Callable[..., Any], here: Path, weights: Path) -> None:
    before = files(here)
    done = command("recalibrate", *MODEL, "-d", "net:interrupted", "-o", "net.pt", "--json")
    assert done.code == 130
    assert done.out == ""
    assert done.err == "error: interrupted; every file is as it was, or complete.\n"
    assert files(here) == before


SLOW = """
import time
import torch
def batches():
    yield torch.randn(4, 3, 32, 32)
    open("running", "w").close()
    while True:
        time.sleep(0.05)
        yield torch.randn(4, 3, 32, 32)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_the_process_with_130(here: Path, weights: Path) -> None:
    (here / "slow.py").write_text(SLOW)
    before = files(here)
    command = [sys.executable, "-m", "batchnorm", "recalibrate", *MODEL, "-d", "slow:batches", "-o", "net.pt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not (here / "running").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 130
    assert out == ""
    assert err == "error: interrupted; every file is as it was, or complete.\n"
    (here / "running").unlink()
    assert {name: content for name, content in files(here).items() if name in before} == before


def test_the_options_of_the_sequential_order(command: Callable[..., Any], here: Path, weights: Path) -> None:
    from batchnorm.statistics import Population

    done = command(
        *("recalibrate", *MODEL, "-d", "images.npz", "-b", 10, "--json"),
        *("--memory", "20kB", "--cache", here, "--tolerance", "0.5", "--population", "p.safetensors"),
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["order"], found["processes"], found["tolerance"]) == ("sequential", 1, 0.5)
    population = Population.load(here / "p.safetensors")
    assert list(population.layers) == [layer["name"] for layer in found["layers"]]
    assert command("recalibrate", *MODEL, "-d", "images.npz", "--order", "parallel").code == 0


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--memory", "much", "memory='much'"),
        ("--tolerance", "0", "tolerance=0.0"),
        ("--population", "p.npz", "ends in .safetensors"),
    ],
)
def test_options_that_make_no_sense(
    command: Callable[..., Any], here: Path, weights: Path, option: str, value: str, said: str
) -> None:
    before = files(here)
    done = command("recalibrate", *MODEL, "-d", "images.npz", option, value)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert files(here) == before
