"""The inputs that an exported program was made on."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

from batchnorm.errors import InputError

__all__ = ["own_inputs"]


def own_inputs(program: Any) -> Any:
    """Return the example inputs that an exported program holds, as a fold takes them.

    Raises:
        InputError: it holds none.
    """
    known = program.example_inputs if isinstance(program, ExportedProgram) else None
    if known is None or (known[0] and known[1]):
        raise InputError("fold: there are no example inputs to run the model on. Pass example_inputs.")
    args, kwargs = known
    return kwargs or args
