"""Which backend serves a call: the first, in order of preference, that does not refuse.

``"native"`` are this library's own CPU kernels, where they were built and the input is large enough for them to pay;
``"torch"`` is torch's own ``batch_norm`` with torch's operators for residual and activation; ``"reference"`` serves the
rest. Another backend joins with one call of :func:`register`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from batchnorm.blocks import block
from batchnorm.errors import InputError, StateError, UnknownNameError, closest
from batchnorm.kernels.contract import Backend, Request
from batchnorm.kernels.native import NATIVE, missing
from batchnorm.kernels.native.backend import SMALLEST, pays
from batchnorm.kernels.reference import REFERENCE

__all__ = [
    "active_backend",
    "at_once",
    "backend",
    "backends",
    "choose",
    "instead_of_torch",
    "is_forced",
    "register",
    "use_backend",
]


class Candidate(Protocol):
    """What dispatch asks of everything that may serve a call."""

    @property
    def name(self) -> str:
        """How ``use_backend`` and ``active_backend`` call it."""

    def refusal(self, request: Request) -> str | None:
        """Return None to serve the call, else why not."""

    def declines(self, request: Request) -> str | None:
        """Return why another should serve it, or None; not asked of a backend that is forced."""


class _Torch:
    """torch.nn.functional.batch_norm: the whole operation at once, without split phases and without a mask."""

    name = "torch"

    def refusal(self, request: Request) -> str | None:
        return None if request.mask is None else "torch's own batch_norm takes no mask"

    def declines(self, request: Request) -> str | None:
        return None


_ALWAYS: dict[str, Candidate] = {"torch": _Torch(), "reference": REFERENCE}
if missing is None:
    _ALWAYS = {NATIVE.name: NATIVE, **_ALWAYS}
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
    global _open
    with _lock:
        _open = (*_open, name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
        with _lock:
            last = len(_open) - 1 - _open[::-1].index(name)
            _open = _open[:last] + _open[last + 1 :]


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
    return choose(Request(input, weight, bias, training, activation, residual, mask))


def choose(request: Request, *, split: bool = False) -> str:
    """Return the name of the backend that serves a call; with ``split``, one that has the split phases.

    Raises:
        InputError: the forced one, or every one, refuses; the message says why.
    """
    forced = _forced_name()
    if forced is not None and not (split and forced == "torch"):
        why = _candidates[forced].refusal(request)
        if why is None:
            return forced
        raise InputError(f"use_backend({forced!r}) cannot serve this call: {why}. Leave the choice to dispatch.")
    reasons = []
    for name, candidate in _candidates.items():
        if split and not isinstance(candidate, Backend):
            continue
        why = candidate.refusal(request) or candidate.declines(request)
        if why is None:
            return name
        reasons.append(f"{name}: {why}")
    raise InputError(f"no backend can serve this call ({'; '.join(reasons)}). Move the tensors to another device.")


def at_once(input: Tensor, training: bool, fused: bool) -> str | None:
    """Return the backend of a call without mask where little has to be asked for that, else None.

    ``"torch"`` is certain; ``"native"`` is what serves the call unless it refuses.
    """
    if _open:
        return NATIVE.name if _forced_name() == NATIVE.name else None
    if _candidates is not _ALWAYS:
        return None
    if missing is not None or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch"
    if torch.compiler.is_exporting():  # the number of values may be any: to ask for it would bound it in the program
        return "torch"
    if not isinstance(input, Tensor) or input.numel() < SMALLEST:
        return "torch"
    return NATIVE.name if pays(input, training, fused) else "torch"


def is_forced() -> bool:
    """Return whether :func:`use_backend` has said which backend serves the calls here."""
    return _forced_name() is not None


def instead_of_torch(request: Request) -> str:
    """Return the backend of a call that torch's kernel would lose the digits of: native if it can, however small."""
    return NATIVE.name if missing is None and NATIVE.refusal(request) is None else REFERENCE.name


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
