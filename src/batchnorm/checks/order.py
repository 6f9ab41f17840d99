"""In which order layer, activation and norm follow each other."""

from __future__ import annotations

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.checks.patterns import sole_reader, source
from batchnorm.dataflow.graph import Call, Graph
from batchnorm.dataflow.operator_kinds import DROPOUTS, activation_kind, family, suppresses
from batchnorm.placement.sites import norm_calls

__all__ = ["activated_layer", "is_a_design"]

_MAX_POOLS = {"max_pool1d", "max_pool2d", "max_pool3d"}
_DEEP = 10
_SHARE = 0.9


def activated_layer(graph: Graph, norm: Call) -> tuple[Call, Call] | None:
    """Return the activation that a norm reads and the layer that the activation reads; None where it is not so.

    Activations of the ReLU's family are meant. Dropout and maximum pooling may lie between activation and norm, as far
    as nobody else reads what they give: they neither mix channels nor take averages.
    """
    activation = source(norm.args["input"])
    while activation is not None and family(activation) in DROPOUTS | _MAX_POOLS:
        if sole_reader(graph, activation.outputs[0]) is None:
            return None
        activation = source(next(activation.tensor_args()))
    if activation is None or (activation_kind(activation) != "rectifying" and not suppresses(activation)):
        return None
    layer = source(next(activation.tensor_args()))
    return None if layer is None or linear_operator_of(layer) is None else (activation, layer)


def is_a_design(graph: Graph) -> bool:
    """Whether the norms stand after the activations throughout a deep network: no slip, but how it was designed.

    That is where ten norms and nine tenths of those behind layers do. In a shallow network it cannot be told.
    """
    norms = norm_calls(graph)
    after = sum(activated_layer(graph, norm) is not None for norm in norms)
    layers = [source(norm.args["input"]) for norm in norms]
    before = sum(layer is not None and linear_operator_of(layer) is not None for layer in layers)
    return after >= max(_DEEP, _SHARE * (after + before))
