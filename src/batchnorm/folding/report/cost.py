r"""What a forward pass costs, counted from its dataflow: operators, multiply-adds, and the memory of the model's state.

A norm with fixed statistics multiplies and adds once for each element that it returns. A convolution or linear layer
with a weight W does so once for each element of W at each position:

.. math:: \text{multiply-adds} = |W| \cdot \frac{\text{elements}}{\text{channels}}

of its output; a transposed convolution likewise of its input. Zeros that are padded with are counted, as is usual.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch.nn import Module

from batchnorm.absorbers.convolution import Convolution
from batchnorm.absorbers.table import absorber_of, linear_operator_of
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.norms import is_norm

__all__ = ["Cost", "Saving", "border_bytes", "multiply_adds"]


@dataclass(frozen=True)
class Cost:
    """What one pass takes, and what the model holds.

    Attributes:
        operators: number of calls of each operator, by its name; views are operators too.
        layers: multiply-adds of convolutions and linear layers.
        norms: multiply-adds of norms.
        biases: additions of the biases of convolutions and linear layers.
        parameters: number of elements of all parameters, shared ones once.
        buffers: the same of buffers.
        state_bytes: what both take.
    """

    operators: Mapping[str, int]
    layers: int
    norms: int
    biases: int
    parameters: int
    buffers: int
    state_bytes: int

    @classmethod
    def of(cls, model: Module, graph: Graph) -> Cost:
        """Return what the pass took that ``graph`` records."""
        parameters, buffers = list(model.parameters()), list(model.buffers())
        return cls(
            dict(Counter(call.name for call in graph.calls)),
            sum(multiply_adds(call) for call in graph.calls if not is_norm(call)),
            sum(multiply_adds(call) for call in graph.calls if is_norm(call)),
            sum(_elements(call.output) for call in graph.calls if _has_bias(call)),
            sum(tensor.numel() for tensor in parameters),
            sum(tensor.numel() for tensor in buffers),
            sum(tensor.numel() * tensor.element_size() for tensor in [*parameters, *buffers]),
        )

    @property
    def calls(self) -> int:
        """Number of operator calls."""
        return sum(self.operators.values())


@dataclass(frozen=True)
class Saving:
    """What a pass is spared by the folding of one norm.

    Attributes:
        multiply_adds: the norm's own.
        additions: of a bias that a layer was given for it, which had none: they are new.
        bytes: of activations that are neither read nor written any more; less those that a border is written for.
    """

    multiply_adds: int
    additions: int
    bytes: int

    @classmethod
    def of(cls, norms: Collection[Call], given_bias: Collection[Call], given_border: Collection[Call]) -> Saving:
        """Return what is spared by the calls of a norm.

        Args:
            norms: the calls.
            given_bias: calls of layers that have a bias now and had none.
            given_border: calls of convolutions that pad with other values than zeros now.
        """
        moved = sum(_bytes(call.args["input"]) + _bytes(call.output) for call in norms)
        return cls(
            sum(multiply_adds(call) for call in norms),
            sum(_elements(call.output) for call in given_bias),
            moved - sum(border_bytes(call) for call in given_border),
        )


def multiply_adds(call: Call) -> int:
    """Return those of a norm, convolution or linear layer; 0 for every other operator.

    Example:
        >>> import torch
        >>> from batchnorm.dataflow.trace import trace
        >>> graph = trace(torch.nn.Conv2d(3, 8, 3, padding=1, groups=1), torch.ones(2, 3, 10, 10))
        >>> multiply_adds(graph.calls[0]) == 2 * 10 * 10 * 8 * 3 * 3 * 3
        True
    """
    if is_norm(call):
        return _elements(call.outputs[0])
    operator = absorber_of(call)
    return 0 if operator is None else operator.multiply_adds(call)


def border_bytes(call: Call) -> int:
    """Return what a convolution reads and writes to pad its input with a border.

    The border is written whole, the input is read and written into it, and the convolution reads the larger of the two.
    """
    value: Value = call.args["input"]
    operator = absorber_of(call)
    assert isinstance(operator, Convolution)
    return 2 * operator.padded_elements(call) * value.dtype.itemsize + _bytes(value)


def _has_bias(call: Call) -> bool:
    return linear_operator_of(call) is not None and call.args.get("bias") is not None


def _elements(value: Value) -> int:
    return math.prod(value.shape)


def _bytes(value: Value) -> int:
    return _elements(value) * value.dtype.itemsize
