"""Files: tensors by name with a checksum, outputs that appear together or not at all, archives that nobody trusts.

::

    tensors ── tensor_file ── replace: written beside, renamed together
    a file of unknown origin ── program/: looked into, then loaded
"""
