"""Who takes part: one file a tool.

A tool's file offers ``fold(model, inputs) -> Folded``. The model is in eval mode, the inputs are a tuple of positional
arguments. A tool may do to the model what it likes, except where it is declared here to only read it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["OURS", "OURS_EXPORTED", "TOOLS", "Folded", "NotJudgedError", "Tool"]

OURS = "batchnorm"
OURS_EXPORTED = "batchnorm.export"


class NotJudgedError(Exception):
    """What a tool is to be given is wrong before it folds anything; the message says how."""


@dataclass(frozen=True)
class Folded:
    """What a tool made of a model.

    Attributes:
        run: takes what the model takes, returns what it returns (or the tensors of that, in a list).
        norms: how many norms it still runs on these inputs; None where they cannot be told from other operators.
    """

    run: Callable[..., Any]
    norms: Callable[..., int | None]


@dataclass(frozen=True)
class Tool:
    """One who takes part.

    Attributes:
        name: in the rows.
        title: in tables.
        file: the module of this package that holds it.
        packages: what it needs, the one whose version is told first.
        dtype: of the model and its inputs: float64 where the tool can, so that rounding hides nothing.
        reads_only: whether it leaves the model as it is, so that all such tools can be given the same one.
        networks: whether it is fast enough to be given networks.
        optional: whether it takes part only when asked for.
    """

    name: str
    title: str
    file: str
    packages: tuple[str, ...]
    dtype: torch.dtype = torch.float64
    reads_only: bool = False
    networks: bool = True
    optional: bool = False

    def missing(self) -> str | None:
        """Return why it cannot take part, None if it can."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            except Exception as error:  # a package that is there may still fail to load, in many ways
                return f"{package} cannot be imported ({type(error).__name__}: {error})"
        return None

    def version(self) -> str:
        """Return the package and version that do the work."""
        package = self.packages[0].partition(".")[0]
        version = getattr(importlib.import_module(package), "__version__", "")
        return f"{package} {version or importlib.metadata.version(package)}"

    def fold(self, model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
        """Let it do its work."""
        module = importlib.import_module(f"{__name__}.{self.file}")
        folded: Folded = module.fold(model, inputs)
        return folded


_ONNX = {"dtype": torch.float32, "reads_only": True}  # ONNX Runtime convolves in float32 only

TOOLS = (
    Tool(OURS, "batchnorm", "ours", ("batchnorm",)),
    Tool(OURS_EXPORTED, "batchnorm, exported", "ours_exported", ("batchnorm",)),
    Tool("fx.fuse", "torch.fx fuse", "fx_fuse", ("torch.fx.experimental.optimization",)),
    Tool("fuse_fx", "torch.ao fuse_fx", "ao_fuse_fx", ("torch.ao.quantization.quantize_fx",)),
    Tool("jit.freeze", "jit trace + freeze", "jit_freeze", ("torch",)),
    Tool(
        "inductor",
        "Inductor freezing",
        "inductor",
        ("torch._inductor.config",),
        dtype=torch.float32,  # it has no convolution of its own in float64 and stops
        networks=False,
        optional=True,
    ),
    Tool("onnxscript", "torch.onnx (onnxscript)", "onnx_export", ("onnxscript", "onnx", "onnxruntime"), **_ONNX),
    Tool("onnxoptimizer", "onnxoptimizer", "onnx_optimizer", ("onnxoptimizer", "onnxscript", "onnxruntime"), **_ONNX),
    Tool("onnxruntime", "ONNX Runtime", "onnx_runtime", ("onnxruntime", "onnxscript", "onnx"), **_ONNX),
)
