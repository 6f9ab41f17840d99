"""What a verb's result tells of where it comes from: the model as it was, the data, the device, the date."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import Signature, signature
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from batchnorm.nn.select import named_norms
from batchnorm.report import Result
from batchnorm.report.provenance import Provenance
from batchnorm.report.result import record

__all__ = ["describe", "saw", "with_provenance"]

_Parameters = ParamSpec("_Parameters")
_Made = TypeVar("_Made", bound=Result)
_MOST_TENSORS = 4


class _Current(threading.local):
    shapes: list[str] | None = None
    """The first batch of the verb that runs in this thread; None where none does."""


_current = _Current()


def with_provenance(
    verb: str, of: Callable[[Any], Any] = lambda subject: subject
) -> Callable[[Callable[_Parameters, _Made]], Callable[_Parameters, _Made]]:
    """Have a function's result say where it comes from.

    Args:
        verb: what the function is called.
        of: gives the model from its first argument. What is no model is told by the result's.
    """

    def decorate(function: Callable[_Parameters, _Made]) -> Callable[_Parameters, _Made]:
        named = signature(function)

        @wraps(function)
        def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Made:
            given = _given(named, args, kwargs)
            subject = of(next(iter(given.values()), None))
            about = describe(subject)  # as it is before the verb changes it
            shapes: list[str] = []
            outer, _current.shapes = _current.shapes, shapes
            try:
                result = function(*args, **kwargs)
            finally:
                _current.shapes = outer
            model, device = about if any(about) else describe(getattr(result, "model", None))
            record(result, Provenance(f"batchnorm.{verb}", model, _data(given, result, shapes), device))
            return result

        return call

    return decorate


def saw(batch: Any) -> None:
    """Note the first batch that the verb of this thread takes."""
    if _current.shapes == []:
        _current.shapes.append(_shapes(batch))


def _given(named: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return named.bind_partial(*args, **kwargs).arguments
    except TypeError:  # which the function itself raises with better words
        return {}


def describe(model: Any) -> tuple[str, str]:
    """Return a model in words, and the devices of its parameters; empty for what has none."""
    if not isinstance(model, Module | ExportedProgram):
        return "", ""
    parameters: Iterable[Tensor] = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))
    words = [f"{count:,} parameter{'s' * (count != 1)}"]
    if isinstance(model, Module):
        norms = len(named_norms(model))
        words.append(f"{norms} norm{'s' * (norms != 1)}")
    devices = sorted({str(parameter.device) for parameter in parameters})
    return f"{type(model).__name__}, {', '.join(words)}", ", ".join(devices)


def _data(given: dict[str, Any], result: Result, shapes: Sequence[str]) -> str:
    words = []
    if given.get("example_inputs") is not None:
        words.append(f"example inputs {_shapes(given['example_inputs'])}")
    for name, one in (("batches", "batch"), ("samples", "sample")):
        number = getattr(result, name, None)
        if isinstance(number, int):
            words.append(f"{number:,} {one if number == 1 else name}")
    words += [f"the first batch {shape}" for shape in shapes if shape]
    return "; ".join(words)


def _shapes(inputs: Any) -> str:
    """Return types and shapes of the tensors: ``float32 (8, 3, 32, 32), int64 (8,)``."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    shown = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors[:_MOST_TENSORS]]
    return ", ".join(shown + ["…"] * (len(tensors) > _MOST_TENSORS))
