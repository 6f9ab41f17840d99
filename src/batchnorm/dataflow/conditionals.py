"""``torch.cond`` in a pass: both branches are looked into, and what comes out is of either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_map

from batchnorm.observers import OperatorMode

__all__ = ["COND", "run_both"]

_library = torch.library.Library("batchnorm", "FRAGMENT")
_library.define("cond(Tensor?[] branches) -> Tensor[]")

COND = torch.ops.batchnorm.cond.default
"""Stands, in a dataflow, for the choice between the results of branches. It is never run."""


def run_both(mode: OperatorMode, func: HigherOrderOperator, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
    """Run both branches of ``torch.cond`` such that the mode sees what they call.

    Other inputs may take the branch that these do not take, so what is read there counts as read.

    Args:
        mode: supports higher-order operators and is, as always in its ``__torch_dispatch__``, switched off.
        func: the operator.
        args: its arguments.
        kwargs: those given by name.

    Returns:
        what the branch that is taken returns, copied, since it is of either; and the condition and both results.

    Raises:
        NotImplementedError: it is another operator than ``torch.cond``.
    """
    if func is not torch.ops.higher_order.cond:
        raise NotImplementedError(f"{func.name()} is given functions, into which a pass is not followed")
    names = ("pred", "true_fn", "false_fn", "operands")
    given = {"operands": (), **dict(zip(names, args, strict=False)), **kwargs}
    with mode:
        results = [given[name](*given["operands"]) for name in ("true_fn", "false_fn")]
    taken = results[0] if bool(given["pred"]) else results[1]
    copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, taken)
    return copied, [given["pred"], *results]
