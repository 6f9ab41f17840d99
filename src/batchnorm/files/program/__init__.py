"""Programs of ``torch.export`` in files that nobody trusts: looked into first, loaded then from what was looked at."""

from batchnorm.files.program.read import read_program

__all__ = ["read_program"]
