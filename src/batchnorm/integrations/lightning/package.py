"""Lightning under its two names, ``lightning.pytorch`` and ``pytorch_lightning``: which of them is in use."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

__all__ = ["base_class"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def base_class() -> Any:
    """Return the Callback of the package that is in use, else of the one that is installed.

    The two are one code under two names. Trainers call their callbacks by the names of the hooks, so that one of
    either package works in both; which it is matters to ``isinstance`` only.

    Raises:
        ImportError: neither is installed.
    """
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # it is installed, and lacks something of its own
    raise ImportError(
        "batchnorm.integrations.lightning needs Lightning, which is not installed: pip install lightning (or "
        "pytorch-lightning)."
    )
