"""Programs of ``torch.export`` in files that nobody trusts: looked into first, loaded then from what was looked at.

::

    archive ── read ── text: every string of a known kind ── operators, expressions ── torch.export.load
"""

from batchnorm.files.program.read import read_program

__all__ = ["read_program"]
