"""``--model FILE.pt2``: a program that ``torch.export`` wrote, read without running anything that the file contains."""

from __future__ import annotations

from pathlib import Path

from torch.export import ExportedProgram

from batchnorm.cli.errors import CommandError, reason
from batchnorm.errors import InputError
from batchnorm.files.program import read_program
from batchnorm.report.provenance import source

__all__ = ["load_program"]


def load_program(path: Path) -> ExportedProgram:
    """Return the program in a file.

    Raises:
        CommandError: there is no such file, or it holds something else.
    """
    source("model", str(path))
    if not path.is_file():
        raise CommandError(f"--model {path}: no such file.")
    try:
        return read_program(path)
    except InputError as error:
        raise CommandError(f"--model {error}") from error
    except Exception as error:  # a damaged archive raises many things
        raise CommandError(
            f"--model {path}: expected a program that torch.export.save wrote; it cannot be read ({reason(error)})."
        ) from error
