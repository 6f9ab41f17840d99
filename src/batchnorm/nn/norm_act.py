"""This library's layer in the place of timm's ``BatchNormAct2d``, a norm that holds its activation as a submodule.

timm is not imported for it: whoever has a model with such layers has done so.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.nn.batch_norm import _Layer

__all__ = ["timms_classes"]

_HOME = "timm.layers.norm_act"
_made: dict[type[Module], type[Module]] = {}


def timms_classes() -> dict[type[Module], type[Module]]:
    """Return timm's class and the one that takes its place; nothing before timm is imported."""
    timms = getattr(sys.modules.get(_HOME), "BatchNormAct2d", None)
    if timms is not None and timms not in _made:
        _made[timms] = _class_for(timms)
    return _made


def _class_for(timms: Any) -> type[Module]:
    class BatchNormAct2d(_Layer, timms):  # type: ignore[misc]
        """``act(drop(y))`` of the normalized input y, shape (N, C, H, W).

        It is a ``timm.layers.BatchNormAct2d``: the same submodules ``drop`` and ``act``, state-dict keys and numbers.
        """

        _dims = (4,)
        _shapes = "(N, C, H, W)"

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            timms.__init__(self, *args, **kwargs)

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            """Return the activated output."""
            if torch.jit.is_scripting():  # type: ignore[attr-defined]
                y = self._scripted(x)
            else:
                if isinstance(x, torch.fx.Proxy):
                    return self._record(x, None, None)
                y = self._deferred(x)
            activated: Tensor = self.act(self.drop(y))  # type: ignore[operator]
            return activated

    BatchNormAct2d.__module__ = __name__
    BatchNormAct2d.__qualname__ = "BatchNormAct2d"
    return BatchNormAct2d


def __getattr__(name: str) -> Any:
    """Find the class for pickle, which imports timm if need be."""
    if name == "BatchNormAct2d":
        __import__(_HOME)
        return timms_classes()[sys.modules[_HOME].BatchNormAct2d]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
