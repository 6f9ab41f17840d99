"""What makes one norm stay frozen: a class that ignores ``train()``, and the memory of what the norm was before."""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import Parameter

from batchnorm.errors import StateError
from batchnorm.models.snapshot import Structure
from batchnorm.nn.guarded import Guarded

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Exact", "FrozenParts", "move", "state_of", "thawed_class"]

_MEMORY = "_frozen"


class FrozenParts(NamedTuple):
    """Which parts of a norm are frozen."""

    statistics: bool
    affine: bool


THAWED = FrozenParts(statistics=False, affine=False)


class _Memory(NamedTuple):
    """What a frozen norm has to know to thaw; copied and pickled with it."""

    training: bool | None = None
    """The mode last asked for; None while the statistics are not frozen."""
    requires_grad: dict[str, bool] | None = None
    """The flags that the norm's own parameters had; None while they are not frozen."""


class _Frozen(Guarded):
    """Goes before a norm's class: ``class FrozenBatchNorm2d(_Frozen, BatchNorm2d)``.

    The norm's class is swapped rather than its method replaced or a hook added, so that copies and pickles carry the
    freeze along, the forward pass costs nothing more, and ``isinstance`` still holds.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep frozen statistics: without them a norm takes those of each batch, whatever its mode.

        Raises:
            StateError: they are to be taken away, as ``torch.func.replace_all_batch_norm_modules_`` does.
        """
        if value is None and name in ("running_mean", "running_var") and state_of(self).statistics:
            raise StateError(
                f"{type(self).__name__}: its statistics are frozen, and {name} = None would take them away. Unfreeze "
                "the norm first, with batchnorm.unfreeze."
            )
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Self:
        """Pass the mode on to submodules, remember it, and keep frozen statistics in eval mode."""
        super().train(mode)
        memory = _memory(self)
        if memory is not None and memory.training is not None:
            # a new memory, not a changed one: a shallow copy of the norm may hold the same
            self.__dict__[_MEMORY] = memory._replace(training=mode)
            self.training = False
        return self

    def extra_repr(self) -> str:
        """Show what is frozen, after what the norm shows of itself."""
        shown = super().extra_repr()
        frozen = " and ".join(part for part, held in state_of(self)._asdict().items() if held)
        return f"{shown}, frozen={frozen}" if shown else f"frozen={frozen}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the original class: the swapped one is made at run time and cannot be imported."""
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        rebuild, args, *rest = reduced
        if rebuild is copyreg.__newobj__ and args[0] is type(self):  # type: ignore[attr-defined]
            return (_rebuild, (thawed_class(type(self)), *args[1:]), *rest)
        return (rebuild, args, *rest)


_classes: WeakValueDictionary[type, type] = WeakValueDictionary()
_classes_lock = threading.Lock()


def _frozen_class(base: type) -> type:
    """Return the class that norms of class ``base`` have while frozen, the same one each time."""
    with _classes_lock:
        cls = _classes.get(base)
        if cls is None:
            # the module of its base: torch.fx asks it whether a layer is to stay one node, as torch's own do
            members = {"__module__": base.__module__, "__doc__": base.__doc__}
            cls = type(f"Frozen{base.__name__}", (_Frozen, base), members)
            _classes[base] = cls
        return cls


def thawed_class(cls: type) -> type:
    """Return the class under a frozen one; any other class is returned as it is."""
    return cls.__bases__[1] if cls.__bases__[0] is _Frozen else cls


def _rebuild(base: type, *args: Any) -> Any:
    """Make an empty frozen norm of class ``base``, for pickle and copy to fill."""
    cls = _frozen_class(base)
    return cls.__new__(cls, *args)


def _memory(norm: Module) -> _Memory | None:
    memory = norm.__dict__.get(_MEMORY) if isinstance(norm, _Frozen) else None
    assert memory is None or isinstance(memory, _Memory)
    return memory


def state_of(norm: Module) -> FrozenParts:
    """Return which parts of a norm (or of any other module: none) are frozen."""
    memory = _memory(norm)
    if memory is None:
        return THAWED
    return FrozenParts(memory.training is not None, memory.requires_grad is not None)


def move(norms: Iterable[Module], states: Iterable[FrozenParts]) -> None:
    """Bring each norm into its state.

    All flags are noted before any is set, for norms may share a parameter.
    """
    todo = [(norm, state) for norm, state in zip(norms, states, strict=True) if state != state_of(norm)]
    flags = [{key: p.requires_grad for key, p in _own_parameters(norm).items()} for norm, _ in todo]
    for (norm, state), learned in zip(todo, flags, strict=True):
        memory = _memory(norm) or _Memory()
        if state.statistics and memory.training is None:
            memory = memory._replace(training=norm.training)
            norm.training = False
        elif not state.statistics and memory.training is not None:
            norm.training = memory.training
            memory = memory._replace(training=None)
        if state.affine and memory.requires_grad is None:
            memory = memory._replace(requires_grad=learned)
            _set_learning(norm, dict.fromkeys(learned, False))
        elif not state.affine and memory.requires_grad is not None:
            _set_learning(norm, memory.requires_grad)
            memory = memory._replace(requires_grad=None)
        _dress(norm, None if state == THAWED else memory)


def _own_parameters(norm: Module) -> dict[str, Parameter]:
    return {key: p for key, p in norm._parameters.items() if p is not None}


def _set_learning(norm: Module, flags: Mapping[str, bool]) -> None:
    for key, parameter in _own_parameters(norm).items():
        if key in flags:
            parameter.requires_grad_(flags[key])
            if not flags[key]:
                # an optimizer applies whatever waits here, momentum and weight decay included, even zeros
                parameter.grad = None


def _dress(norm: Module, memory: _Memory | None) -> None:
    """Give the norm its frozen class and memory or, for None, its own class and no memory."""
    base = thawed_class(type(norm))
    if memory is None:
        norm.__class__ = base
        norm.__dict__.pop(_MEMORY, None)
    else:
        norm.__dict__[_MEMORY] = memory
        norm.__class__ = _frozen_class(base)


class Exact:
    """Everything that :func:`move` may touch, set aside so that a move cut short leaves no trace."""

    def __init__(self, norms: Iterable[Module]) -> None:
        norms = list(norms)
        self._structure = Structure(norms)
        self._parameters: list[tuple[Parameter, bool, Tensor | None]] = [
            (p, p.requires_grad, p.grad) for norm in norms for p in _own_parameters(norm).values()
        ]

    def dropped_gradients(self) -> list[tuple[Parameter, Tensor]]:
        """Return the gradients that were waiting then and are gone."""
        return [(p, grad) for p, _, grad in self._parameters if grad is not None and p.grad is None]

    def restore(self) -> None:
        """Put everything back."""
        self._structure.restore()
        for parameter, learns, grad in self._parameters:
            parameter.requires_grad_(learns)
            parameter.grad = grad
