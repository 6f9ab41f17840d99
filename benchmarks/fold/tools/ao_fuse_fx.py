"""``torch.ao.quantization.quantize_fx.fuse_fx``: what quantization does before it quantizes."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.fold.counting import count_norms
from benchmarks.fold.tools import Folded
from torch import nn
from torch.ao.quantization.quantize_fx import fuse_fx


def fold(model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
    folded = fuse_fx(model)
    return Folded(folded, partial(count_norms, folded))
