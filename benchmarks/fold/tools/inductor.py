"""``torch.compile`` with Inductor's freezing, which folds constants, and norms with them.

What is left of a norm is a multiply-add among others in a generated kernel: it is not counted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config as inductor_config
from benchmarks.fold.tools import Folded
from torch import nn


def fold(model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
    torch.compiler.reset()
    with inductor_config.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(model, dynamic=False)
        compiled(*inputs)  # compiles; what is compiled stays so when freezing is off again
    return Folded(compiled, lambda *_: None)
