"""A model's state set aside, so that whatever happens next can be taken back bit for bit.

:class:`Values` holds what is in tensors, :class:`Structure` which modules and tensors stand where, :class:`Snapshot`
both as far as a run of a model can change them. Each has a ``restore``, which may be called after half a change, and
twice; :func:`restored_if_raised` calls it where a body raises, or an interrupt meets the verb around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from batchnorm.blocks import undone
from batchnorm.files.tensor_memory import bytes_of, without_repeats
from batchnorm.models.random_state import generators_kept
from batchnorm.models.transaction import on_failure

__all__ = ["Snapshot", "Structure", "Values", "on_snapshot", "restored_if_raised", "set_eval", "untouched", "write"]

OnBuffers: TypeAlias = Callable[[Iterable[Tensor]], None]

_before_taking: list[OnBuffers] = []
_before_restoring: list[OnBuffers] = []


def on_snapshot(before_taking: OnBuffers, before_restoring: OnBuffers) -> None:
    """Let layers that write into their buffers later than they are called finish that first.

    Args:
        before_taking: called with the buffers of which a snapshot is about to be taken.
        before_restoring: called with the same buffers before they are restored.
    """
    _before_taking.append(before_taking)
    _before_restoring.append(before_restoring)


class Values:
    """What tensors hold, bit for bit; it is put back into the very tensors, so that whoever shares them sees it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._values: list[tuple[Tensor, Tensor]] = []
        for tensor in tensors:
            if is_lazy(tensor):  # without a value until the first forward
                continue
            # an expanded tensor (one element seen many times) is written only through what it was expanded from
            own = without_repeats(tensor.detach()) if tensor.layout == torch.strided else tensor
            self._values.append((own, own.detach().clone()))

    def restore(self) -> None:
        """Put every value back."""
        for tensor, value in self._values:
            # a write, even of the same value, would fail a backward pass that is still to come
            if not _same_bits(tensor, value):
                write(tensor, value)


def write(tensor: Tensor, value: Tensor) -> None:
    """Write a value into a tensor, in place; what was made in inference mode can be written only there."""
    # in this order: inference_mode(False) records gradients
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


class Snapshot:
    """The train/eval mode of every module, its attributes and the value of every buffer, as they are now.

    An attribute often says what is in a buffer: for how long a sequence a table was made, whether a reference has been
    taken. So those of modules whose class is neither torch's nor this library's are put back with the buffers; what a
    list or another object in an attribute holds is not.

    Buffers are restored into the tensors they live in, so that whoever shares them sees the old values again; a buffer
    or parameter that was replaced, added or removed in between is put back, taken out, or returned to its name.
    """

    def __init__(self, model: Module) -> None:
        self._buffers = list(model.buffers())
        for finish in _before_taking:
            finish(self._buffers)
        # scripted modules that went through torch.jit.freeze have no mode
        self._modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")]
        # a scripted module keeps its buffers in C++, where their slots cannot change
        plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._slots: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (slots, dict(slots)) for m in plain for slots in (m._parameters, m._buffers)
        ]
        self._attributes = [(m, _attributes_of(m)) for m in plain if not type(m).__module__.startswith(_NOT_THE_USERS)]
        self._values = Values(self._buffers)

    def restore(self) -> None:
        """Put every mode and value back."""
        for cancel in _before_restoring:
            cancel(self._buffers)
        for module, training in self._modes:
            # the attribute itself: train() may be overridden (a frozen norm ignores it)
            module.training = training
        for slots, tensors in self._slots:
            slots.clear()
            slots.update(tensors)
        for module, attributes in self._attributes:
            _put_back(module, attributes, _attributes_of(module))
        self._values.restore()


_NOT_THE_USERS = ("torch.", "batchnorm.")
_OF_MODULE = torch.nn.Module().__dict__.keys()  # parameters, submodules, hooks, the mode


def _attributes_of(module: Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _OF_MODULE}


def _put_back(module: Module, attributes: dict[str, Any], now: dict[str, Any]) -> None:
    """Give a module the attributes that it had, and take away those among ``now`` that it had not."""
    for added in now.keys() - attributes.keys():
        del module.__dict__[added]
    module.__dict__.update(attributes)


class Structure:
    """The class and the attributes of modules, and which modules, parameters and buffers stand where in them."""

    def __init__(self, modules: Iterable[Module]) -> None:
        # a scripted module keeps them in C++, where they cannot change
        plain = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        self._modules = [(module, type(module), dict(module.__dict__)) for module in plain]
        self._slots = [
            (slots, dict(slots)) for module in plain for slots in (module._parameters, module._buffers, module._modules)
        ]

    def restore(self) -> None:
        """Put all of it back, as often as need be."""
        for module, cls, attributes in self._modules:
            module.__class__ = cls
            _put_back(module, attributes, module.__dict__)
        for slots, tensors in self._slots:
            slots.clear()
            slots.update(tensors)  # type: ignore[arg-type]


class Restorable(Protocol):
    """Something set aside."""

    def restore(self) -> None:
        """Put it back."""


@contextmanager
def restored_if_raised(before: Restorable) -> Iterator[None]:
    """Put back what was set aside if the body raises, or the verb that it is part of is interrupted later."""
    on_failure(before.restore)
    try:
        yield
    except BaseException:
        before.restore()
        raise


def set_eval(model: Module) -> None:
    """Put every module into eval mode by its attribute: ``eval()`` may be overridden to do more than that."""
    for module in model.modules():
        if getattr(module, "training", False):
            module.training = False


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype hold the same bits: NaN equals itself, −0 is not 0."""
    if a.is_meta:
        return True
    if a.layout != torch.strided or a.is_quantized:
        return False
    return torch.equal(bytes_of(a), bytes_of(b))


@contextmanager
def untouched(model: Module) -> Iterator[None]:
    """Leave the model and the random generators as they were, whatever the body does, however it ends."""
    snapshot = Snapshot(model)
    on_failure(snapshot.restore)
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # all that draw_for seeds
    with generators_kept(devices):
        yield from undone(_nothing, snapshot.restore)


def _nothing() -> None:
    """Change nothing yet: the body does."""
