"""``onnxoptimizer.optimize`` with its default passes, and the one that folds."""

from __future__ import annotations

from typing import Any

import onnxoptimizer
from benchmarks.fold.tools import Folded
from benchmarks.fold.tools.onnx_file import count, exported, runner
from torch import nn


def fold(model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    optimized = onnxoptimizer.optimize(exported(model, inputs).model_proto, passes)
    left = count(optimized)
    return Folded(runner(optimized, optimize=False), lambda *_: left)
