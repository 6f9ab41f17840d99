"""ResNets from whichever package of architectures is installed; none of them is a requirement of this library."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from benchmarks.train_step.competitors import NotOfferedError
from torch import nn

PACKAGES = ("torchvision", "timm", "pytorchcv")


def build(name: str) -> tuple[nn.Module, str]:
    """Return an untrained network, and the package and version that it comes from.

    Raises:
        NotOfferedError: no package can be imported; the message says why of each.
    """
    reasons = []
    for package in PACKAGES:
        try:
            return _build(package, name), f"{package} {_version(package)}"
        except Exception as error:  # a package that is there may still fail to load, in many ways
            reasons.append(f"{package}: {str(error).splitlines()[0]}")
    raise NotOfferedError(f"no package of architectures can be used ({'; '.join(reasons)})")


def _build(package: str, name: str) -> nn.Module:
    if package == "torchvision":
        model: nn.Module = _module("torchvision.models").get_model(name, weights=None)
    elif package == "timm":
        model = _module("timm").create_model(name, pretrained=False)
    else:
        model = _module("pytorchcv.model_provider").get_model(name, pretrained=False)
    return model


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _version(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", "")) or importlib.metadata.version(package)
