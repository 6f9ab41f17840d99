"""What ``torch.onnx.export`` does by default: onnxscript's optimizer, whose rules fold norms too."""

from __future__ import annotations

from typing import Any

from benchmarks.fold.tools import Folded
from benchmarks.fold.tools.onnx_file import count, exported, runner
from torch import nn


def fold(model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
    program = exported(model, inputs)
    program.optimize()
    left = count(program.model_proto)
    return Folded(runner(program.model_proto, optimize=False), lambda *_: left)
