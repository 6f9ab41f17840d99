"""``torch.fx.experimental.optimization.fuse``: pairs of modules in a symbolic trace."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.fold.counting import count_norms
from benchmarks.fold.tools import Folded
from torch import nn
from torch.fx.experimental.optimization import fuse


def fold(model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
    folded = fuse(model)
    return Folded(folded, partial(count_norms, folded))
