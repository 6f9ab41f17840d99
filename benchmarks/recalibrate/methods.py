"""The ways to measure population statistics that are compared; each takes a model and batches."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm

__all__ = ["METHODS", "bare", "methods"]

Method = Callable[[nn.Module, Sequence[Tensor]], Any]


def bare(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Run the model in eval mode: what no method can do without."""
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)


def _update_bn(model: nn.Module, batches: Sequence[Tensor]) -> None:
    model.train()  # it measures nothing otherwise
    torch.optim.swa_utils.update_bn(batches, model)


def _fvcore(model: nn.Module, batches: Sequence[Tensor]) -> None:
    model.train()
    importlib.import_module("fvcore.nn.precise_bn").update_bn_stats(model, batches, len(batches))


def _sequential(model: nn.Module, batches: Sequence[Tensor]) -> None:
    batchnorm.recalibrate(model, list(batches), progress=False)


def _parallel(model: nn.Module, batches: Sequence[Tensor]) -> None:
    batchnorm.recalibrate(model, list(batches), order="parallel", progress=False)


def _again(model: nn.Module, batches: Sequence[Tensor]) -> None:
    batchnorm.recalibrate(model, list(batches), memory=0, progress=False)


def _on_disk(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        batchnorm.recalibrate(model, list(batches), memory=0, cache=folder, progress=False)


METHODS: dict[str, Method] = {
    "update_bn": _update_bn,
    "fvcore": _fvcore,
    "parallel": _parallel,
    "sequential": _sequential,
    "sequential, on disk": _on_disk,
    "sequential, run again": _again,
}


def methods() -> dict[str, Method]:
    """Return those that can run here."""
    found = dict(METHODS)
    if importlib.util.find_spec("fvcore") is None:
        print("fvcore is not installed, and is left out")
        del found["fvcore"]
    return found
