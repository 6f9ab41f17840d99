"""``--model FILE.pt2``: a program that ``torch.export`` wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from batchnorm.cli.errors import CommandError, reason

__all__ = ["load_program"]


def load_program(path: Path) -> ExportedProgram:
    """Return the program in a file.

    Raises:
        CommandError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise CommandError(f"--model {path}: no such file.")
    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged archive raises many things
        raise CommandError(
            f"--model {path}: expected a program that torch.export.save wrote; it cannot be read ({reason(error)})."
        ) from error
