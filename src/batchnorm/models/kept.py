"""Whether a model keeps something of its calls: a cache, a counter, what it was given first.

Buffers are restored after each run. All else that a module has is in its attributes. Where these are plain (numbers,
text, lists of such, functions, the model's own modules and tensors), it can be told whether a run changed them; a model
of which none did can be run again, and run on, as if it had not run before. Of others nothing is known.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module
from torch.nn.parameter import is_lazy

__all__ = ["Kept"]

_RESTORED = {"_parameters", "_buffers", "training"}
_ATOMS = (
    *(int, float, complex, bool, str, bytes, type(None), type(Ellipsis), enum.Enum, type, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),  # which all copies of a model share
)


class Kept:
    """The attributes of a model's modules, as far as they are plain.

    Args:
        model: any model.

    >>> net = torch.nn.Sequential(torch.nn.ReLU())
    >>> kept = Kept(net)
    >>> kept.is_known and kept.is_still_in(net)
    True
    >>> net.calls = 1
    >>> kept.is_still_in(net)
    False
    """

    def __init__(self, model: Module) -> None:
        self._held: list[Any] = []  # so that ids stay those of what they were
        try:
            self._attributes: Any = tuple(self._of_model(model))
        except _NotPlainError:
            self._attributes = None

    @property
    def is_known(self) -> bool:
        """Whether all attributes are plain."""
        return self._attributes is not None

    def is_still_in(self, model: Module) -> bool:
        """Whether all of the model's attributes are plain, and what they were."""
        return self.is_known and bool(Kept(model)._attributes == self._attributes)

    def _of_model(self, model: Module) -> Iterator[Any]:
        modules = list(model.modules())
        tensors = [*model.parameters(), *model.buffers()]
        own = {id(item) for item in (*modules, *tensors)}
        for parameter in model.parameters():
            if is_lazy(parameter) or parameter.is_inference():
                raise _NotPlainError
            yield self._same(parameter), parameter._version
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                raise _NotPlainError
            yield self._same(module), type(module)
            for name, value in module.__dict__.items():
                if name not in _RESTORED:
                    yield name, self._plain(value, own)

    def _plain(self, value: Any, own: set[int]) -> Any:
        """Return what a value is made of, to be compared.

        Raises:
            _NotPlainError: that cannot be told.
        """
        if isinstance(value, _ATOMS):
            return self._same(value) if callable(value) else (type(value), value)
        if id(value) in own:
            return self._same(value)
        if isinstance(value, types.MethodType) and id(value.__self__) in own:
            return self._same(value.__func__), self._same(value.__self__)
        if type(value) is functools.partial:
            return self._same(value), *(self._plain(part, own) for part in (value.func, value.args, value.keywords))
        if type(value) in (list, tuple, torch.Size, set, frozenset):
            items = sorted(value, key=id) if isinstance(value, set | frozenset) else value
            return self._same(value), tuple(self._plain(item, own) for item in items)
        if type(value) in (dict, OrderedDict):
            return self._same(value), tuple((self._plain(k, own), self._plain(v, own)) for k, v in value.items())
        raise _NotPlainError

    def _same(self, value: Any) -> int:
        self._held.append(value)
        return id(value)


class _NotPlainError(Exception):
    """Nothing is known of an attribute."""
