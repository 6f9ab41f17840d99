"""``batchnorm.fold``: the user's own modules, with other parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.fold.counting import count_norms
from benchmarks.fold.tools import Folded
from torch import nn

import batchnorm


def fold(model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
    folded = batchnorm.fold(model, inputs).model
    return Folded(folded, partial(count_norms, folded))
