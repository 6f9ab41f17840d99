"""Every operator that absorbs a map."""

from __future__ import annotations

from batchnorm.absorbers.convolution import Convolution
from batchnorm.absorbers.embedding import Embedding
from batchnorm.absorbers.linear import Linear
from batchnorm.absorbers.linear_operator import LinearOperator
from batchnorm.absorbers.norm import Norm
from batchnorm.absorbers.operator import AbsorbingOperator
from batchnorm.absorbers.transposed_convolution import TransposedConvolution
from batchnorm.dataflow.graph import Call

__all__ = ["ABSORBERS", "absorber_of", "linear_operator_of"]

ABSORBERS: dict[str, AbsorbingOperator] = {
    f"{operator.namespace}::{operator.name}": operator
    for operator in (
        *(Convolution(n) for n in (1, 2, 3)),
        *(TransposedConvolution(n) for n in (1, 2, 3)),
        Linear(),
        Embedding(),
        Norm(),
    )
}
"""Its row by each operator's name in its schema, ``"aten::conv2d"``."""


def absorber_of(call: Call) -> AbsorbingOperator | None:
    """Return the row of the operator that a call runs; None for an operator that absorbs nothing."""
    return ABSORBERS.get(call.op._schema.name)


def linear_operator_of(call: Call) -> LinearOperator | None:
    """Return the row of a convolution, transposed convolution or linear layer; None for any other operator."""
    operator = absorber_of(call)
    return operator if isinstance(operator, LinearOperator) else None
