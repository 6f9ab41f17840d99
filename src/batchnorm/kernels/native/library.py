"""The extension module: found or not, its instruction set, its threads.

The kernels run on torch's own thread pool. torch exports a C function for that, ``torch_parallel_for``; its address is
handed over once, so that the extension is built without torch and links to nothing of it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from batchnorm.blocks import block, undone
from batchnorm.errors import StateError, UnknownNameError, closest

__all__ = ["available_isas", "isa", "library", "missing", "use_isa"]

INTERFACE = 1
"""What ``native/bindings.cpp`` says of itself: files from two versions do not call each other."""


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        native = import_module("batchnorm._native")
    except ModuleNotFoundError:
        return None, (
            "the package was installed without native kernels, because no C++ compiler was found. Install g++ or "
            "clang, then run: pip install --force-reinstall --no-deps batchnorm"
        )
    except ImportError as error:
        return None, f"the native kernels do not load: {error}"
    built = getattr(native, "interface", None)
    if built != INTERFACE:
        return None, (
            f"the compiled kernels are of another version: expected interface {INTERFACE}; got {built}. Rebuild them: "
            "pip install --force-reinstall --no-deps batchnorm, or in a checkout: pip install --no-deps --editable ."
        )
    native.set_parallel_for(_address_of_parallel_for())
    wanted = os.environ.get("BATCHNORM_ISA")
    if wanted and not native.use_isa(wanted):
        raise StateError(
            f"BATCHNORM_ISA={wanted}: this machine runs {', '.join(native.isas())}. Unset it to take the best of them."
        )
    return native, None


def _address_of_parallel_for() -> int:
    """Return the address of torch's ``torch_parallel_for``, 0 where there is none: kernels then run on one thread."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            function = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


library, missing = _load()
"""The extension module or None, and in the second case why there is none."""


def available_isas() -> tuple[str, ...]:
    """Return the instruction sets that the kernels were built for and this machine has, the best last."""
    return () if library is None else tuple(library.isas())


def isa() -> str | None:
    """Return the instruction set that runs; None without native kernels."""
    return None if library is None else str(library.isa())


def _check_isa(name: str) -> None:
    if name not in available_isas():
        there = ", ".join(available_isas()) or "none"
        hint = closest(name, available_isas()) or "."
        raise UnknownNameError(f"{name!r}: no such instruction set here; there are {there}{hint}")


@block(_check_isa)
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set in this context, in all threads; for tests and measurements.

    Raises:
        UnknownNameError: this machine or this build does not have it.
    """
    assert library is not None
    yield from undone(partial(library.use_isa, name), partial(library.use_isa, isa()))
