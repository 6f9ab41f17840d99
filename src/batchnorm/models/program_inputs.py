"""The inputs that an exported program was made on."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

from batchnorm.errors import InputError

__all__ = ["own_inputs"]


def own_inputs(program: Any) -> Any:
    """Return the example inputs that an exported program holds, as a fold takes them.

    Raises:
        InputError: it holds none, or such as a fold does not take.
    """
    known = program.example_inputs if isinstance(program, ExportedProgram) else None
    if known is None:
        raise InputError("fold: there are no example inputs to run the model on. Pass example_inputs.")
    args, kwargs = known
    if args and kwargs:
        raise InputError(
            f"fold: expected a program with positional or with keyword arguments; this one was exported with "
            f"{len(args)} of the former and with {', '.join(kwargs)}, and takes no others. Export it with one kind."
        )
    return kwargs or args
