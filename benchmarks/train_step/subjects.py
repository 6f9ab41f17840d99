"""What a worker repeats: a layer in its frame, or the training step of a network."""

from __future__ import annotations

import importlib
import time
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from benchmarks.train_step import architectures
from benchmarks.train_step.cases import Case, Layer, Network
from benchmarks.train_step.frame import Frame
from torch import Tensor, nn

import batchnorm


class Subject(Protocol):
    """Something to time."""

    def once(self) -> dict[str, float]:
        """Do it once; return the seconds by phase."""

    def info(self) -> dict[str, Any]:
        """Return what ran, for the row."""


def make(file: str, case: Case) -> Subject:
    """Return what a competitor makes of a case."""
    competitor = importlib.import_module(f"benchmarks.train_step.competitors.{file}")
    if isinstance(case, Network):
        return _NetworkStep(competitor, case)
    if hasattr(competitor, "subject"):
        found: Subject = competitor.subject(case)
        return found
    return _LayerStep(competitor, case)


class _LayerStep:
    def __init__(self, competitor: ModuleType, case: Layer) -> None:
        sources = [case.random(seed) for seed in range(2 if "add" in case.work else 1)]
        layer = competitor.layer(case)
        self._backend = competitor.backend(layer, *sources)
        self._inplace = bool(getattr(layer, "inplace", False))
        self._frame = Frame(layer, sources, case.random(2))

    def once(self) -> dict[str, float]:
        return self._frame.once()

    def info(self) -> dict[str, Any]:
        return {"backend": self._backend, "inplace": self._inplace}


class _NetworkStep:
    """Forward, cross-entropy, backward, SGD with momentum; the pictures are random, the labels too."""

    def __init__(self, competitor: ModuleType, case: Network) -> None:
        torch.manual_seed(0)
        memory_format = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
        self._pictures = torch.randn(case.shape).to(memory_format=memory_format)
        self._labels = torch.randint(1000, (case.batch,))
        model, self._package = architectures.build(case.work)
        model = model.train().to(memory_format=memory_format)  # type: ignore[call-overload]
        self._model = competitor.network(model, self._pictures).train()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3, momentum=0.9)
        self._backend = "+".join(sorted(_backends(self._model, self._pictures))) or "torch"

    def once(self) -> dict[str, float]:
        start = time.perf_counter()
        self._optimizer.zero_grad()
        F.cross_entropy(self._model(self._pictures), self._labels).backward()
        self._optimizer.step()
        return {"step": time.perf_counter() - start}

    def info(self) -> dict[str, Any]:
        inplace = any(getattr(norm, "inplace", False) for norm in _norms(self._model))
        return {"backend": self._backend, "inplace": inplace, "package": self._package}


def _norms(model: nn.Module) -> list[nn.Module]:
    ours = (batchnorm.nn.BatchNorm1d, batchnorm.nn.BatchNorm2d, batchnorm.nn.BatchNorm3d)
    return [module for module in model.modules() if isinstance(module, ours)]


def _backends(model: nn.Module, pictures: Tensor) -> set[str]:
    """Return the backends that this library's norms take in one forward pass."""
    seen: set[str] = set()

    def look(norm: Any, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else named["input"]
        residual = args[1] if len(args) > 1 else named.get("residual")
        seen.add(
            batchnorm.active_backend(
                x, training=True, weight=norm.weight, bias=norm.bias, activation=norm.activation, residual=residual
            )
        )

    handles = [norm.register_forward_pre_hook(look, with_kwargs=True) for norm in _norms(model)]
    model(pictures)
    for handle in handles:
        handle.remove()
    return seen
