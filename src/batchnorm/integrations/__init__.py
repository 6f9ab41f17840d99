"""The verbs as parts of other packages. Each module here needs the package it is named after, and says so."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "lightning":  # imported when it is asked for: the package may not be installed
        return import_module("batchnorm.integrations.lightning")
    raise AttributeError(f"module 'batchnorm.integrations' has no attribute {name!r}")
