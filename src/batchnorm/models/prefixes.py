"""What wrappers put before every name of the model inside."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["wrapper_prefix"]

_PREFIXES = ("module.", "_orig_mod.")
"""Of DataParallel and DistributedDataParallel; of torch.compile."""


def wrapper_prefix(names: Collection[str], own: Collection[str]) -> str:
    """Return what all ``names`` start with if they are of a wrapped model, and ``own`` are not; else nothing.

    >>> wrapper_prefix(["module._orig_mod.0.weight"], ["0.weight"])
    'module._orig_mod.'
    """
    found = ""
    while names:
        ahead = [p for p in _PREFIXES if all(name.startswith(found + p) for name in names)]
        if not ahead or any(name.startswith(ahead[0]) for name in own):
            break
        found += ahead[0]
    return found
