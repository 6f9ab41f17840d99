"""The yardstick: torch's ``copy_`` between two contiguous buffers of the activation's size, both warm."""

from __future__ import annotations

import time
from typing import Any

import torch
from benchmarks.train_step.cases import Layer


class _Copy:
    def __init__(self, case: Layer) -> None:
        self._from = torch.ones(case.numel, dtype=case.torch_dtype)
        self._to = torch.zeros_like(self._from)

    def once(self) -> dict[str, float]:
        start = time.perf_counter()
        self._to.copy_(self._from)
        return {"copy": time.perf_counter() - start}

    def info(self) -> dict[str, Any]:
        return {"backend": "torch", "inplace": False}


def subject(case: Layer) -> _Copy:
    return _Copy(case)
