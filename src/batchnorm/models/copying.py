"""A deep copy of a model, or a sentence that says why there is none."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from batchnorm.errors import StateError

__all__ = ["copied", "copy_model"]

_Copied = TypeVar("_Copied")


def copied(value: _Copied, memo: dict[int, Any] | None = None) -> _Copied:
    """Return a deep copy, without what torch warns of where it copies the tree specs of exported programs itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec", FutureWarning)
        return copy.deepcopy(value, memo)


def copy_model(verb: str, model: Module, remedy: str) -> Module:
    """Return a deep copy of a model.

    Tensors with a history, which ``copy.deepcopy`` refuses, are copied without it: activations that a model keeps,
    weights that a hook computes before each forward.

    Args:
        verb: what the message opens with.
        model: any model.
        remedy: what to do where it cannot be copied, as a sentence.

    Raises:
        StateError: it cannot be copied.
    """
    kept = [leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    try:
        return copied(model, memo)
    except Exception as error:
        raise StateError(
            f"{verb}: {type(model).__name__} cannot be copied ({type(error).__name__}: {error}). {remedy}"
        ) from error
