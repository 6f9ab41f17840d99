"""What a program in a file may call: operators on tensors, and arithmetic on their sizes."""

from __future__ import annotations

import functools
import re

import torch
from torch._ops import OpOverload

__all__ = ["is_operator"]

_NAMESPACES = ("aten", "prims", "quantized", "quantized_decomposed", "torchvision", "batchnorm")
_WITH_GRAPHS = frozenset(
    """
    associative_scan cond flex_attention invoke_subgraph map_impl out_dtype scan strict_mode tag_activation_checkpoint
    while_loop wrap_with_autocast wrap_with_set_grad_enabled
    """.split()  # noqa: SIM905
)
"""Operators that run a part of the graph, with no function of their own."""
_ON_SIZES = frozenset(
    """
    abs add and_ eq floordiv ge getitem gt le lshift lt mod mul ne neg not_ or_ pos pow rshift sub truediv
    """.split()  # noqa: SIM905
)
_NAME = re.compile(r"torch\.ops\.(?P<namespace>\w+)\.(?P<name>[A-Za-z_]\w*)(\.(?P<overload>[A-Za-z_]\w*))?", re.ASCII)


def is_operator(target: str) -> bool:
    """Return whether a name is that of an operator which only computes.

    ``torch.export`` looks names up attribute by attribute, so that ``torch.os.system`` is one for it.

    >>> is_operator("torch.ops.aten.relu.default"), is_operator("_operator.mul"), is_operator("torch.os.system")
    (True, True, False)
    """
    module, _, name = target.rpartition(".")
    if module == "_operator":
        return name in _ON_SIZES
    if module == "math":
        return name.isidentifier() and not name.startswith("_")
    if module == "torch":
        return re.fullmatch(r"_?sym_[a-z_]+", name) is not None
    found = _NAME.fullmatch(target)
    if found is None:
        return False
    if found["namespace"] == "higher_order":
        return found["overload"] is None and found["name"] in _WITH_GRAPHS
    return found["namespace"] in _NAMESPACES and _computes(found["namespace"], found["name"], found["overload"])


def _computes(namespace: str, name: str, overload: str | None) -> bool:
    operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload or "default", None)
    if not isinstance(operator, OpOverload):
        return False
    # TorchScript has more of them, on its own dictionaries, strings and files
    if operator._schema.name not in _dispatched():
        return False
    return not any("filename" in argument.name for argument in operator._schema.arguments)


@functools.cache
def _dispatched() -> frozenset[str]:
    return frozenset(name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names())
