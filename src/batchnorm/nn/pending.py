r"""The output of a norm that waits for what follows it, so that all can be computed in one trip through memory.

When a model calls ``out = bn(x)`` nobody knows yet that ``out += identity`` and ``out = relu(out)`` come next, and the
residual may not be there yet. A layer that ``convert(fuse=True)`` has marked therefore hands out a :class:`Pending`: a
tensor of the right shape and dtype that remembers its layer and input instead of values. Adding a tensor to it leaves
it pending, an activation computes

.. math::

    y = \mathrm{act}\!\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \mathrm{residual}\right)

in one call and gives a plain tensor, and whatever else reads it is given what torch's layer would have returned. It
stands on the protocol ``__torch_function__``, which every function of torch honours. Code that goes past it finds a
tensor without memory, and an error rather than wrong numbers.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock, get_ident
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from batchnorm.errors import StateError
from batchnorm.functional import dispatch
from batchnorm.kernels.activation import ACTIVATIONS, leaky_relu
from batchnorm.kernels.plain import ORDINARY, is_ordinary
from batchnorm.models.snapshot import on_snapshot
from batchnorm.nn.frozen import THAWED, state_of
from batchnorm.nn.redirect import shallow_copy
from batchnorm.observers import intercepted, output_hooked, recomputing, unreachable_by_gradients

__all__ = ["Pending", "defer", "deferring_always"]

_Layer: TypeAlias = Any
"""A layer of :mod:`batchnorm.nn.batch_norm`, which imports this file."""


def defer(layer: _Layer, input: Any) -> Pending | None:
    """Return the output of ``layer`` for ``input`` as a tensor that is computed when it is read.

    None where somebody may look at the operators or at the layer's own output: under a compiler, a tracer, a transform
    or a mode, with hooks, inside a ``torch.autograd.Function``; for frozen and parametrized layers; and for tensors
    that keep no version counter (those of ``torch.inference_mode``), where a write in between could not be noticed.
    None as well where nothing is gained: torch's own kernels would serve the call, with a trip through memory each.

    Raises:
        ShapeError: the input has another number of dimensions than the layer takes.
    """
    if (
        torch.compiler.is_compiling()  # asked first: a compiler can read no further
        or not (_always.get() or _pays(layer, input))
        or layer.inplace
        or intercepted()
        or type(input) not in ORDINARY
        or output_hooked(layer)
        or "parametrizations" in layer._modules
        or state_of(layer) != THAWED
    ):
        return None
    layer._check_input_dim(input)
    if input.shape[1] != layer.num_features or (layer.training and input.numel() <= layer.num_features):
        return None  # an error, now
    source = _Source(layer, input)
    if not source.countable:
        return None
    source.open()
    return Pending(source)


_always: ContextVar[bool] = ContextVar("batchnorm_defer_always", default=False)


@contextmanager
def deferring_always() -> Iterator[None]:
    """Defer where nothing is gained too, in this thread or task: to see that the results are the same."""
    token = _always.set(True)
    try:
        yield
    finally:
        _always.reset(token)


def _pays(layer: _Layer, input: Any) -> bool:
    return isinstance(input, Tensor) and dispatch.quick_choice(input, layer.training, True) is dispatch.NATIVE


class _Source:
    """One call of a layer that has not been computed yet, or has.

    The layer's statistics are updated by the first computation and by no other; by none if a checkpoint runs again. A
    call whose output nobody reads updates them when it is forgotten, or when the layer is called again in this thread:
    so steps are taken in the order of the calls.

    Attributes:
        layer: a stand-in with the tensors and settings that the layer had when it was called.
        input: what it was called on.
        grad: whether gradients were recorded then.
        recomputed: whether a checkpoint ran the layer again then.
        differentiable: whether one of the tensors takes part in them.
        countable: whether each of the tensors counts how often it is written into.
        output: the norm's own output, if somebody asked for it.
        thread: in which the layer was called.
        seen: how many steps each thread had taken then.
    """

    def __init__(self, layer: _Layer, input: Tensor) -> None:
        self.layer = shallow_copy(layer)
        self.input = input
        self.grad = torch.is_grad_enabled()
        self.recomputed = recomputing()
        # What decides the output, and the order of the statistics' steps, which shows in their versions.
        statistics = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        self._read = (input, layer.weight, layer.bias, *statistics)
        self._versions = _versions(self._read)
        self.countable = self._versions is not None
        self.differentiable = self.grad and any(t is not None and t.requires_grad for t in self._read)
        self.output: Tensor | None = None
        self._output_version = 0
        self._computed = False
        self._turn = RLock()  # several threads may read one output: it takes one step
        self._steps = _steps_of(layer) if layer.training and not self.recomputed else None
        self._owes = False
        self.thread = get_ident()
        self.seen: dict[int, int] = {}

    def open(self) -> None:
        """Owe the statistics a step from now on, after those that are still owed in this thread."""
        if self._steps is not None:
            self._steps.finish()
            self._steps.begin(self)
            self._versions = _versions(self._read)
            self._owes = True

    def step(self) -> None:
        """Let the batch enter the running statistics if that is still to be done, without an output."""
        if self._owes:
            with torch.inference_mode(False), torch.no_grad():
                self.compute(None, None)

    def __del__(self) -> None:
        if getattr(self, "_owes", False) and not sys.is_finalizing():
            self.step_or_warn()

    def step_or_warn(self) -> None:
        """Take the step where nobody could catch what it raises, or would know what it is about."""
        try:
            self.step()
        except Exception as error:
            warnings.warn(f"{error} Its running statistics took no step.", RuntimeWarning, stacklevel=2)

    def cancel(self) -> None:
        """Owe no step any more."""
        self._owes = False

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Record gradients, or not, as it was when the layer was called."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.grad):
            yield

    def in_mode(self) -> bool:
        """Return whether gradients are recorded now as they were when the layer was called."""
        return torch.is_grad_enabled() == self.grad and not torch.is_inference_mode_enabled()

    def compute(self, activation: str | None, residual: Tensor | None) -> Tensor:
        """Run the layer on its input; the first time with a step of its statistics, then without.

        Raises:
            StateError: one of the tensors has been written into since the layer was called.
        """
        with self._turn:
            return self._compute(activation, residual)

    def _compute(self, activation: str | None, residual: Tensor | None) -> Tensor:
        layer, self._owes = self.layer, False
        # once the batch has been added to the running statistics they decide nothing any more
        done = self._computed or (self._steps is not None and self._steps.others_moved(self))
        read = self._read[:3] if done and layer.training else self._read
        now = _versions(read)
        if now is None or self._versions is None or now != self._versions[: len(read)]:
            raise self._stale(now)
        self._require_memory()
        layer.__dict__["activation"] = activation
        update = not (self._computed or self.recomputed)
        if self._steps is None or not update:
            y: Tensor = layer._normalize(self.input, residual, None, update)
        else:
            with self._steps.moving():
                y = layer._normalize(self.input, residual, None, update)
        self._computed = True
        return y

    def finish(self) -> Tensor:
        """Return the norm's own output, the same tensor each time unless somebody has written into it."""
        with self._turn:
            if self.output is None or self.output._version != self._output_version:
                self.output = self.compute(None, None)
                self._output_version = self.output._version
            return self.output

    def _require_memory(self) -> None:
        """Refuse tensors whose memory was taken away meanwhile, as reversible blocks and sharding do.

        Raises:
            StateError: the input or the weight has none any more.
        """
        for name, tensor in zip(("input", "weight"), self._read, strict=False):
            if tensor is not None and tensor.numel() and not tensor.untyped_storage().nbytes():
                raise StateError(
                    f"{self.layer._where()}: the memory of its {name} was given back before its output was read, and "
                    "fused layers compute their output when it is read. Convert the model again as it is now."
                )

    def _stale(self, now: list[int | None] | None) -> StateError:
        names = ("input", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        pairs = zip(names, self._versions or (), now or (), strict=False)
        changed = next((name for name, before, after in pairs if before != after), "input")
        return StateError(
            f"{self.layer._where()}: its {changed} was written into in place before its output was read, and fused "
            "layers compute their output when it is read. Convert the model again, on example inputs that take this "
            "way through it, or write out of place."
        )


class _Steps:
    """The steps of one pair of running statistics: which are owed, and which thread has moved them how often.

    Threads that train one model write into its statistics as they come, and a step is right on whatever it finds. What
    is no other thread's step is somebody's write between the layer's call and its step, which has to be noticed. One
    thread steps at a time: of two that read the old value before either writes the new one, a step would be lost.
    """

    def __init__(self) -> None:
        self._turn = RLock()  # taken again by a call that is forgotten, and so takes its step, during another's
        self._owed: dict[int, weakref.ref[_Source]] = {}
        self._begun: dict[int, int] = {}
        self._ended: dict[int, int] = {}

    def finish(self) -> None:
        """Take the step that is owed for the last call in this thread."""
        reference = self._owed.pop(get_ident(), None)
        source = None if reference is None else reference()
        if source is not None:
            source.step()

    def owed(self) -> list[_Source]:
        """Return the calls that owe a step, in all threads."""
        return [source for reference in list(self._owed.values()) if (source := reference()) is not None]

    def begin(self, source: _Source) -> None:
        """Note a call that owes a step."""
        self._owed[get_ident()] = weakref.ref(source)
        source.seen = dict(self._ended)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Count the step that the block takes."""
        me = get_ident()
        with self._turn:
            self._begun[me] = self._begun.get(me, 0) + 1
            try:
                yield
            finally:
                self._ended[me] = self._ended.get(me, 0) + 1

    def others_moved(self, source: _Source) -> bool:
        """Return whether another thread has, or may have, taken a step since the call of ``source``."""
        begun = dict(self._begun)
        return any(n > source.seen.get(thread, 0) for thread, n in begun.items() if thread != source.thread)


_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()
_steps_lock = RLock()  # two threads must not make a pair of statistics two records


def _renew_locks() -> None:
    """Give a forked process locks of its own: threads that held the old ones are not in it."""
    global _steps_lock
    _steps_lock = RLock()
    for steps in list(_steps.values()):
        steps._turn = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _steps_of(layer: _Layer) -> _Steps | None:
    """Return the steps of a layer's running statistics, shared by all that share these; None if it keeps none."""
    mean = layer.running_mean if layer.track_running_stats else None
    if mean is None:
        return None
    with _steps_lock:
        steps: _Steps | None = _steps.get(mean)
        return _steps.setdefault(mean, _Steps()) if steps is None else steps


def _finish_steps(buffers: Iterable[Tensor]) -> None:
    """Take the steps that calls of this thread owe the running statistics among ``buffers``."""
    for source in _owed_to(buffers):
        if source.thread == get_ident():
            source.step_or_warn()


def _cancel_steps(buffers: Iterable[Tensor]) -> None:
    """Let no call owe a step to the running statistics among ``buffers``: they were set to what they were before it."""
    for source in _owed_to(buffers):
        source.cancel()  # an output that an exception still holds would take its step when that is gone


on_snapshot(before_taking=_finish_steps, before_restoring=_cancel_steps)


def _owed_to(buffers: Iterable[Tensor]) -> Iterator[_Source]:
    for buffer in buffers:
        steps: _Steps | None = _steps.get(buffer)
        yield from [] if steps is None else steps.owed()


class Pending(Tensor):
    """The output of a norm, possibly with a residual added, that is computed when somebody reads its values.

    Attributes:
        _source: the call of the layer.
        _residual: what was added to it, or None.
        _result: a plain tensor, once there is one; from then on everything is asked of it.
    """

    _source: _Source
    _residual: Tensor | None
    _residual_version: int | None
    _result: Tensor | None

    @staticmethod
    def __new__(cls, source: _Source, residual: Tensor | None = None) -> Pending:
        """Make a tensor of the shape, dtype and device of the layer's input, without memory."""
        x = source.input
        made: Pending = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)
        return made

    def __init__(self, source: _Source, residual: Tensor | None = None) -> None:
        self._source = source
        self._residual = residual
        self._residual_version = None if residual is None else residual._version
        self._result = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer what is known, remember an addition, compute at an activation, and at everything else."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _REQUIRES_GRAD:
            return _requires_grad(args[0])
        if func in _ADDITIONS:
            total = _add(_ADDITIONS[func], *args, **kwargs)
            if total is not None:
                return total
        known = _ACTIVATIONS.get(func)
        if known is not None:
            y = _activate(known, *args, **kwargs)
            if y is not None:
                return y
        args, kwargs = tree_map_only(Pending, _finish, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse what went past ``__torch_function__``: there are no values here."""
        pending = next((a for a in args if isinstance(a, Pending)), None)
        where = "a fused batch norm" if pending is None else pending._source.layer._where()
        raise StateError(
            f"{where}: {func} reads the output of this fused layer in a way that does not let it be computed first "
            "(code in C++, or compiled code that takes tensors apart). Make the layer plain again with "
            "batchnorm.revert, or convert the model again as it is now."
        )


# -- what is asked of a pending tensor ---------------------------------------------------------------------------------


def _requires_grad(pending: Pending) -> bool:
    if pending._result is not None:
        return pending._result.requires_grad
    residual = pending._residual
    return pending._source.differentiable or (pending._source.grad and residual is not None and residual.requires_grad)


def _require_reachable(pending: Pending) -> None:
    """Refuse to compute inside a ``torch.autograd.Function``, whose gradient would not arrive at the layer.

    Raises:
        StateError: this is one, and there is a gradient.
    """
    if not (unreachable_by_gradients() and _requires_grad(pending)):
        return
    raise StateError(
        f"{pending._source.layer._where()}: the output of this fused layer is given to a torch.autograd.Function (that "
        "of a reentrant checkpoint, of a module's backward hook, or one of the model), and the gradient would not "
        "reach the layer. Convert the model again as it is now, or use checkpoint(..., use_reentrant=False)."
    )


def _finish(pending: Pending) -> Tensor:
    """Return the plain tensor that a pending one stands for, the same one each time."""
    _require_reachable(pending)
    if pending._result is None:
        with pending._source.mode():
            y = pending._source.finish()
            if pending._residual is not None:
                _require_same_residual(pending)
                y = y + pending._residual
        pending._result = y
        pending._residual = None
    return pending._result


def _is_open(pending: Any) -> bool:
    """Return whether what follows can still be fused: nothing is computed, and gradients are recorded as before."""
    return (
        isinstance(pending, Pending)
        and pending._result is None
        and pending._source.output is None
        and pending._source.in_mode()
    )


def _require_same_residual(pending: Pending) -> None:
    residual = pending._residual
    if residual is not None and residual._version != pending._residual_version:
        raise StateError(
            f"{pending._source.layer._where()}: the tensor that was added to its output was written into in place "
            "before the sum was read, and fused layers compute it when it is read. Convert the model again, on example "
            "inputs that take this way through it, or write out of place."
        )


def _add(in_place: bool, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the sum as a pending tensor; None where torch is to compute it."""
    if len(args) + len(kwargs) != 2 or not args or not kwargs.keys() <= {"other"}:  # alpha, out
        return None
    one, two = args[0], args[1] if len(args) == 2 else kwargs["other"]
    if not _takes_residual(one):
        if in_place:
            return None
        one, two = two, one
        if not _takes_residual(one):
            return None
    _require_reachable(one)
    if isinstance(two, Pending):
        two = _finish(two)
        if not _takes_residual(one):  # one and the same
            return None
    if not _fits(two, one):
        return None
    if not in_place:
        return Pending(one._source, two)
    one._residual, one._residual_version = two, two._version
    pending: Pending = one
    return pending


def _takes_residual(pending: Any) -> bool:
    return _is_open(pending) and pending._residual is None


def _fits(residual: Any, pending: Pending) -> bool:
    """Return whether a residual is as the fused call takes it, and whether a write into it can be noticed."""
    x = pending._source.input
    return (
        isinstance(residual, Tensor)
        and is_ordinary(residual)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
        and not residual.is_inference()
        and not intercepted()
    )


def _activate(known: _Known, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the activated output, computed in one call; None where torch is to compute it."""
    found = known.matches(args[1:], kwargs)
    if found is None or not args or not _is_open(args[0]) or intercepted():
        return None
    pending: Pending = args[0]
    _require_reachable(pending)
    _require_same_residual(pending)
    activation, in_place = found
    y = pending._source.compute(activation, pending._residual)
    if in_place:  # whoever holds the tensor sees it activated
        pending._result = y
        pending._residual = None
    return y


# -- tables ------------------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """A function of torch that is an activation, for certain arguments.

    Attributes:
        activation: its name in ``ACTIVATIONS``; of leaky ReLU the slope is among the arguments.
        in_place: whether it always works in place.
        takes: its parameters after the input: name, default, and the value that it must have (None: any).
    """

    activation: str
    in_place: bool = False
    takes: tuple[tuple[str, Any, Any], ...] = ()

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, bool] | None:
        """Return the activation and whether the call works in place; None if it is no function that can be fused."""
        names = [name for name, *_ in self.takes]
        if len(args) > len(names) or not kwargs.keys() <= set(names):
            return None
        given = {name: default for name, default, _ in self.takes} | dict(zip(names, args, strict=False)) | kwargs
        if any(needed is not None and given[name] != needed for name, _, needed in self.takes):
            return None
        activation = self.activation
        if activation == "leaky_relu":
            slope = given["negative_slope"]
            if not isinstance(slope, float | int):
                return None
            activation = leaky_relu(slope)
        return activation, self.in_place or bool(given.get("inplace", False))


def _known_functions() -> dict[Any, _Known]:
    slope = ("negative_slope", 0.01, None)
    cuts = (("min_val", -1.0, 0.0), ("max_val", 1.0, 6.0))
    inplace = ("inplace", False, None)
    parameters: dict[str, tuple[tuple[str, Any, Any], ...]] = {
        "leaky_relu": (slope,),
        "hardtanh": cuts,
        "gelu": (("approximate", "none", "none"),),
    }
    found: dict[Any, _Known] = {}
    for name in (*ACTIVATIONS, "hardtanh"):
        takes = parameters.get(name, ())
        activation = "relu6" if name == "hardtanh" else name
        for home in (torch, Tensor, torch._C._nn):
            for suffix in ("", "_"):
                function = getattr(home, name + suffix, None)
                if function is not None:
                    found[function] = _Known(activation, suffix == "_", takes)
        if name not in ("sigmoid", "tanh", "gelu"):  # of these torch.nn.functional has no version with inplace=
            found[getattr(F, name)] = _Known(activation, False, (*takes, inplace))
    return found


_ACTIVATIONS = _known_functions()
_ADDITIONS: dict[Any, bool] = {
    torch.add: False,
    Tensor.add: False,
    Tensor.__add__: False,
    Tensor.__radd__: False,
    Tensor.add_: True,
    Tensor.__iadd__: True,
}
"""Functions that add two tensors, and whether they write into the first."""

_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_METADATA: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "itemsize")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")),
        *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size),
        *(Tensor.__len__, Tensor.get_device, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed),
        *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed),
    }
)
"""Questions that shape, dtype and device answer."""


def _versions(tensors: Sequence[Tensor | None]) -> list[int | None] | None:
    """Return how often each tensor has been written into; None if one of them does not count."""
    try:
        return [None if t is None else t._version for t in tensors]
    except RuntimeError:  # a tensor made in inference mode
        return None
