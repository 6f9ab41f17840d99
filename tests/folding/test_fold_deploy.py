"""Folded models leave for other programs: torch.export, AOTInductor, torch.compile, ONNX Runtime; any batch size."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lively import lively
from torch import Tensor, nn

import batchnorm


class Pyramid(nn.Module):
    """A residual block that is run as often as the input is large, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False)
        self.last = nn.BatchNorm2d(4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.stem(image)))
        while x.shape[-1] > 6:
            x = nn.functional.max_pool2d(torch.relu(x + self.bn(self.conv(x))), 2)
        return {"map": self.last(self.up(x)), "pooled": x.mean((2, 3))}


class Preactivated(nn.Module):
    """Norms before convolutions that pad, in one and in two dimensions, with strides, dilation and padding by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, (3, 5), stride=(1, 2), padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4)
        self.rows = nn.BatchNorm1d(8)
        self.along = nn.Conv1d(8, 5, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.tanh(self.wide(self.norm(self.conv(self.first(image)))))
        return self.along(self.rows(x.mean(3)))


def images(size: int) -> Tensor:
    return torch.randn(size, 3, 24, 24, generator=torch.Generator().manual_seed(size))


@dataclass
class Deployed:
    """A folded model, what it was exported to, and how far rounding moves its outputs."""

    model: nn.Module
    program: torch.export.ExportedProgram
    bound: float

    def check(self, run: Callable[[Tensor], Any], *, exact: bool = False) -> None:
        """Run it on batches of several sizes, none of which is that of the example."""
        for size in (1, 2, 7):
            with torch.no_grad():
                expected, got = self.model(images(size)), run(images(size))
            torch.testing.assert_close(got, expected, rtol=0, atol=0 if exact else self.bound)


CASES: dict[str, Callable[[], batchnorm.FoldResult]] = {
    "shared modules, control flow": lambda: batchnorm.fold(lively(Pyramid(), positive=True), images(4)),
    "raw inputs": lambda: batchnorm.fold(
        lively(Pyramid(), positive=True), images(4), input_mean=[0.3, 0.5, -0.2], input_std=0.7
    ),
    "borders": lambda: batchnorm.fold(lively(Preactivated(), positive=True), images(4), borders=True),
}


def sweep(name: str) -> Any:
    """Leave a case to `make test-all`, whose class of program another case or docs/deploy.md stands for."""
    return pytest.param(name, marks=pytest.mark.sweep)


@cache
def deploy(name: str) -> Deployed:
    result = CASES[name]()
    assert not result.left
    batch = torch.export.Dim("batch")
    program = torch.export.export(result.model, (images(4),), dynamic_shapes=({0: batch},))
    assert not any("norm" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Deployed(result.model, program, result.bound)


@pytest.fixture(params=CASES)
def deployed(request: pytest.FixtureRequest) -> Deployed:
    return deploy(request.param)


SCRIPT = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
outputs = []
for number in range(int(sys.argv[3])):
    program = torch.export.load(sys.argv[1] + f"/{number}.pt2").module()
    with torch.no_grad():
        outputs.append([program(x) for x in torch.load(sys.argv[1] + "/inputs.pt")])
assert "batchnorm" not in sys.modules
torch.save(outputs, sys.argv[1] + "/outputs.pt")
"""


@pytest.mark.sweep
def test_files_of_torch_export_give_the_same_bits_in_a_process_without_this_library(tmp_path: Path) -> None:
    for number, name in enumerate(CASES):
        torch.export.save(deploy(name).program, tmp_path / f"{number}.pt2")
    torch.save([images(size) for size in (1, 2, 7)], tmp_path / "inputs.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(torch.get_num_threads()), str(len(CASES))]
    subprocess.run(command, check=True, cwd=tmp_path)
    for name, outputs in zip(CASES, map(iter, torch.load(tmp_path / "outputs.pt")), strict=True):
        deploy(name).check(lambda _, outputs=outputs: next(outputs), exact=True)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler; no g++")


@needs_compiler
@pytest.mark.parametrize("deployed", [sweep("shared modules, control flow"), sweep("borders")], indirect=True)
def test_a_package_of_aotinductor_gives_the_same_up_to_rounding(deployed: Deployed, tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(deployed.program, package_path=str(tmp_path / "folded.pt2"))
    deployed.check(torch._inductor.aoti_load_package(package))


@needs_compiler
@pytest.mark.parametrize("deployed", [sweep("raw inputs")], indirect=True)
def test_a_compiled_model_gives_the_same_up_to_rounding(deployed: Deployed) -> None:
    torch._dynamo.reset()
    deployed.check(torch.compile(deployed.model, dynamic=True))


@pytest.mark.parametrize("deployed", [sweep("shared modules, control flow"), "raw inputs", "borders"], indirect=True)
def test_onnx_runtime_gives_the_same_up_to_rounding(deployed: Deployed, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"torch.onnx.export needs {name}, which is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    exported = torch.onnx.export(deployed.program, dynamo=True, verbose=False)
    operators = {node.op_type for node in exported.model_proto.graph.node}
    assert "BatchNormalization" not in operators
    assert "ScatterND" not in operators  # what writing into a padded tensor would become
    exported.save(tmp_path / "folded.onnx")
    session = runtime.InferenceSession(str(tmp_path / "folded.onnx"), providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]

    def run(x: Tensor) -> Any:
        outputs = [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]
        return outputs[0] if len(outputs) == 1 else dict(zip(("map", "pooled"), outputs, strict=True))

    deployed.check(run)
