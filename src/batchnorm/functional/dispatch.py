"""Which backend serves a call: the first, in order of preference, that does not refuse.

``"native"`` are this library's own CPU kernels, where they were built and the input is large enough for them to pay;
``"torch"`` is torch's own ``batch_norm`` with torch's operators for residual and activation; ``"reference"`` serves the
rest. Another backend joins with one call of :func:`register`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from batchnorm.blocks import block, undone
from batchnorm.errors import InputError, StateError, UnknownNameError, closest
from batchnorm.kernels.contract import Backend, Candidate, Request
from batchnorm.kernels.native import NATIVE, missing
from batchnorm.kernels.native.backend import SMALLEST, pays
from batchnorm.kernels.reference import REFERENCE
from batchnorm.kernels.torch_backend import TORCH
from batchnorm.observers import recorded

__all__ = [
    "NATIVE",
    "TORCH",
    "active_backend",
    "backend",
    "backends",
    "choose",
    "choose_split",
    "instead_of_torch",
    "is_forced",
    "quick_choice",
    "register",
    "use_backend",
]


_Candidate = TypeVar("_Candidate", bound=Candidate)

_ALWAYS: dict[str, Candidate] = {c.name: c for c in (NATIVE, TORCH, REFERENCE) if c is not NATIVE or missing is None}
_candidates = _ALWAYS  # in order of preference
_forced: ContextVar[str | None] = ContextVar("batchnorm_backend", default=None)
# The names of all use_backend contexts that are open, in all threads: while there is none, nobody pays for the look-up
# above. A compiler cannot read a context variable, but it watches this tuple and compiles again when it changes.
_open: tuple[str, ...] = ()
_lock = threading.Lock()


def register(new: Backend, *, before: str | None = None) -> None:
    """Let a backend join, preferred to the one called ``before``, or to all others.

    Raises:
        StateError: there is a backend of that name already.
        UnknownNameError: there is none called ``before``.
    """
    global _candidates
    if new.name in _candidates:
        raise StateError(f"register: there is a backend called {new.name!r} already; choose another name.")
    if before is None:
        before = next(iter(_candidates))
    _known(before)
    order: dict[str, Candidate] = {}
    for name, candidate in _candidates.items():
        if name == before:
            order[new.name] = new
        order[name] = candidate
    _candidates = order


def unregister(name: str) -> None:
    """Take a backend out again.

    Raises:
        StateError: it is one of those that are always there.
        UnknownNameError: there is none of that name.
    """
    global _candidates
    _known(name)
    if name in _ALWAYS:
        raise StateError(f"unregister: {name!r} is always there; only registered backends can be taken out.")
    remaining = {n: c for n, c in _candidates.items() if n != name}
    _candidates = _ALWAYS if remaining == _ALWAYS else remaining


def backends() -> tuple[str, ...]:
    """Return the names of all backends, the preferred one first.

    >>> backends()[-2:]
    ('torch', 'reference')
    """
    return tuple(_candidates)


def backend(name: str) -> Backend:
    """Return the backend of that name, with its split phases.

    Raises:
        UnknownNameError: there is none of that name.
        StateError: it is ``"torch"``, which has no split phases.
    """
    found = _known(name)
    if not isinstance(found, Backend):
        raise StateError(f"the backend {name!r} serves only whole calls and has no split phases; use 'reference'.")
    return found


def _check_name(name: str) -> None:
    _known(name)


@block(_check_name)
def use_backend(name: str) -> Iterator[None]:
    """Serve every call in this context, in this thread or task, by one backend.

    A call that it cannot serve raises ``InputError``: nothing else is taken silently. Code under ``torch.compile``
    follows the context opened last in any thread.

    Raises:
        UnknownNameError: there is no backend of that name.

    Example:
        >>> import torch
        >>> from batchnorm.functional import active_backend, batch_norm, use_backend
        >>> x = torch.randn(8, 3)
        >>> with use_backend("reference"):
        ...     active_backend(x, training=True)
        'reference'
        >>> active_backend(x, training=True)
        'torch'
    """
    before, joined = _forced.get(), False

    def join() -> None:
        nonlocal joined
        global _open
        with _lock:
            _open, joined = (*_open, name), True
        _forced.set(name)

    def leave() -> None:
        nonlocal joined
        global _open
        _forced.set(before)
        with _lock:
            if joined:
                last = len(_open) - 1 - _open[::-1].index(name)
                _open, joined = _open[:last] + _open[last + 1 :], False

    yield from undone(join, leave)


def active_backend(
    input: Tensor,
    *,
    training: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> str:
    """Return the name of the backend that ``batch_norm`` would take for this call.

    Raises:
        InputError: ``use_backend`` names one that cannot serve it.

    Example:
        >>> import torch
        >>> from batchnorm.functional import active_backend
        >>> x = torch.randn(8, 3, 5)
        >>> active_backend(x, training=True, activation="relu")
        'torch'
        >>> active_backend(x, training=True, mask=torch.ones(8, 5, dtype=torch.bool))
        'reference'
    """
    return choose(Request(input, weight, bias, training, activation, residual, mask)).name


def choose(request: Request) -> Candidate:
    """Return the backend that serves a call.

    Raises:
        InputError: the forced one, or every one, refuses; the message says why.
    """
    forced = _forced_name()
    if forced is not None:
        return _require(_candidates[forced], request)
    return _first({c: c.refusal(request) or c.prefers_not(request) for c in _candidates.values()})


def choose_split(request: Request, *, any_size: bool = False) -> Backend:
    """Return the backend that serves a call phase by phase, which torch's does not, forced or not.

    With ``any_size`` it is the first that does not refuse, whatever it prefers not to serve: for one who measures many
    inputs, to whom small ones matter for their time and not for their last digits.

    Raises:
        InputError: the forced one, or every one, refuses; the message says why.
    """
    forced = _forced_name()
    found = None if forced is None else _candidates[forced]
    if isinstance(found, Backend):
        return _require(found, request)
    there = [c for c in _candidates.values() if isinstance(c, Backend)]
    return _first({c: c.refusal(request) or (None if any_size else c.prefers_not(request)) for c in there})


def _require(forced: _Candidate, request: Request) -> _Candidate:
    why = forced.refusal(request)
    if why is not None:
        raise InputError(f"use_backend({forced.name!r}) cannot serve this call: {why}. Leave the choice to dispatch.")
    return forced


def _first(candidates: Mapping[_Candidate, str | None]) -> _Candidate:
    """Return the first candidate with no reason against it."""
    for candidate, why in candidates.items():
        if why is None:
            return candidate
    reasons = "; ".join(f"{candidate.name}: {why}" for candidate, why in candidates.items())
    raise InputError(f"no backend can serve this call ({reasons}). Move the tensors to another device.")


def quick_choice(input: Tensor, training: bool, fused: bool) -> Candidate | None:
    """Return the backend of a call without mask where little has to be asked for that, else None.

    ``TORCH`` is certain; ``NATIVE`` is what serves the call unless it refuses.
    """
    if _open:
        return NATIVE if _forced_name() == NATIVE.name else None
    if _candidates is not _ALWAYS:
        return None
    if missing is not None or recorded():  # an exported program may take any number of values: to ask would bound it
        return TORCH
    if not isinstance(input, Tensor) or input.numel() < SMALLEST or not input.is_cpu:
        return TORCH
    return NATIVE if pays(input, training, fused) else TORCH


def is_forced() -> bool:
    """Return whether :func:`use_backend` has said which backend serves the calls here."""
    return _forced_name() is not None


def instead_of_torch(request: Request) -> Backend:
    """Return the backend of a call that torch's kernel would lose the digits of: native if it can, however small."""
    return NATIVE if missing is None and NATIVE.refusal(request) is None else REFERENCE


def _forced_name() -> str | None:
    if not _open:
        return None
    return _open[-1] if torch.compiler.is_compiling() else _forced.get()


def _known(name: str) -> Candidate:
    if name not in _candidates:
        raise UnknownNameError(
            f"{name!r}: no backend of that name; there are {', '.join(map(repr, _candidates))}"
            f"{closest(str(name), _candidates) or '.'}"
        )
    return _candidates[name]
