"""A model as an ONNX file before anything is folded, and how such a file is counted and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript.optimizer
import torch
from benchmarks.fold.errors import WRONG, largest_error
from benchmarks.fold.tools import NotJudgedError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["count", "exported", "ort_options", "runner"]

_programs: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def exported(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Return an ``ONNXProgram`` as it is exported: the exporter's own optimization would fold before others can.

    Several tools read the same export, and it is the slow part: it is made once a model, and handed out as copies.

    Raises:
        NotJudgedError: the file computes something else than the model, before anything is folded.
    """
    if model not in _programs:
        program = torch.onnx.export(model, inputs, dynamo=True, optimize=False, verbose=False)
        _tidy(program.model)
        _require_right(program.model_proto, model, inputs)
        _programs[model] = program
    program = _programs[model]
    return torch.onnx.ONNXProgram(program.model.clone(), program.exported_program)


def _tidy(model: onnx_ir.Model) -> None:
    """Take out what the exporter's optimization would, and what keeps others from seeing a pair, but fold no norm.

    A convolution without a bias is exported with an empty name as its third input, and constants as operators.
    """
    for node in model.graph.all_nodes():
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
    onnxscript.optimizer.fold_constants(model)


def _require_right(proto: onnx.ModelProto, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    expected = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
    error = largest_error(expected, runner(proto, optimize=False)(*inputs))
    if error > WRONG:
        raise NotJudgedError(f"torch.onnx.export is off by {error:.1g} before anything is folded")


def count(proto: onnx.ModelProto) -> int:
    """Return the number of BatchNormalization nodes, in functions and branches too."""
    return sum(node.op_type == "BatchNormalization" for node in _nodes(proto.graph.node)) + sum(
        node.op_type == "BatchNormalization" for function in proto.functions for node in _nodes(function.node)
    )


def _nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def ort_options() -> onnxruntime.SessionOptions:
    """Return options for as many threads as torch uses, without messages."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    return options


def runner(proto: onnx.ModelProto, optimize: bool) -> Callable[..., list[Tensor]]:
    """Return a function that runs a file with ONNX Runtime, with or without that runtime's own optimizations."""
    options = ort_options()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def run(*inputs: Any) -> list[Tensor]:
        arrays = [np.asarray(tensor) for tensor in tree_leaves(inputs)]
        return [torch.from_numpy(np.asarray(y)) for y in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run
