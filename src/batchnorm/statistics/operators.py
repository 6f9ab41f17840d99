"""Batch norm operators, recognized in a dispatch mode."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_map

from batchnorm.nn.operators import eps_key, is_norm_operator, named_arguments
from batchnorm.observers import OperatorMode

__all__ = ["NormCall", "run_with_functions"]


@cache
def _is_norm(func: Any) -> bool:
    """Return whether an operator is a batch norm that takes running statistics."""
    return is_norm_operator(func) and any(a.name == "running_mean" for a in func._schema.arguments)


def run_with_functions(mode: OperatorMode, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
    """Run an operator that is given functions, such as ``torch.cond``, so that the mode sees what these call.

    For a mode that supports higher-order operators and is, as always in its ``__torch_dispatch__``, switched off.
    """

    def seen(leaf: Any) -> Any:
        if not callable(leaf) or isinstance(leaf, Tensor):
            return leaf

        @wraps(leaf)
        def within(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return leaf(*args, **kwargs)

        return within

    args, kwargs = tree_map(seen, (args, kwargs))
    return func(*args, **kwargs)


@dataclass(frozen=True)
class NormCall:
    """One call of a batch norm operator, with its arguments by name."""

    func: Any
    given: dict[str, Any]

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NormCall | None:
        """Return the call, or None if ``func`` is any other operator."""
        return cls(func, named_arguments(func, args, kwargs)) if _is_norm(func) else None

    @property
    def input(self) -> Tensor:
        """The values to normalize, (N, C, ...)."""
        x: Tensor = self.given["input"]
        return x

    @property
    def mask(self) -> Tensor | None:
        """True where a value counts; None where all do."""
        mask: Tensor | None = self.given.get("mask")
        return mask

    @property
    def running_mean(self) -> Tensor | None:
        """The stored mean that the operator was given."""
        tensor: Tensor | None = self.given["running_mean"]
        return tensor

    @property
    def running_var(self) -> Tensor | None:
        """The stored variance that the operator was given."""
        tensor: Tensor | None = self.given["running_var"]
        return tensor

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return float(self.given[eps_key(self.given)])

    def run(self) -> Any:
        """Run the call as it is, except that the running statistics it is given do not change."""
        if self.running_mean is None or self.running_var is None:
            return self._run(self.given)
        # some operators write to them without being asked (``training`` is not among their arguments)
        copies = {"running_mean": self.running_mean.clone(), "running_var": self.running_var.clone()}
        return self._run(self.given | copies if self.given.get("training", True) else self.given)

    def run_on(self, mean: Tensor, variance: Tensor) -> Any:
        """Run the call in eval mode on these statistics, which stand in for the stored ones."""
        changes: dict[str, Any] = {"running_mean": mean, "running_var": variance}
        if "training" in self.given:
            changes["training"] = False
        for name in ("weight", "bias"):
            # kernels for half-precision inputs take all of their parameters in one precision
            if self.given.get(name) is not None:
                changes[name] = self.given[name].to(mean.dtype)
        return self._run(self.given | changes)

    def _run(self, given: dict[str, Any]) -> Any:
        arguments = self.func._schema.arguments
        positional = [given[a.name] for a in arguments if not a.kwarg_only]
        return self.func(*positional, **{a.name: given[a.name] for a in arguments if a.kwarg_only})
