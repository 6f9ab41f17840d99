"""ONNX Runtime's session: it optimizes a file before it runs it.

What runs is a session at the default level. What is counted is the file that the level below writes: at the default
level the norms that are left become depthwise 1×1 convolutions in a layout of the runtime's own, which is the same work
by another name.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from benchmarks.fold.tools import Folded
from benchmarks.fold.tools.onnx_file import count, exported, ort_options, runner
from torch import nn


def fold(model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
    proto = exported(model, inputs).model_proto
    left = _left(proto)
    return Folded(runner(proto, optimize=True), lambda *_: left)


def _left(proto: onnx.ModelProto) -> int:
    options = ort_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return count(onnx.load(options.optimized_model_filepath))
