"""``torch.jit.trace`` and ``torch.jit.freeze``: a TorchScript program whose parameters are constants."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.fold.counting import count_norms
from benchmarks.fold.tools import Folded
from torch import nn


def fold(model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
    # strict=False lets a model return a dict; the trace is checked by whoever measures, on other inputs
    traced = torch.jit.trace(model, inputs, strict=False, check_trace=False)
    folded = torch.jit.freeze(traced)
    return Folded(folded, partial(count_norms, folded))
