"""``torch.export``, and ``batchnorm.fold`` of the program that it gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.fold.counting import count_norms
from benchmarks.fold.tools import Folded
from torch import nn

import batchnorm


def fold(model: nn.Module, inputs: tuple[Any, ...]) -> Folded:
    program = torch.export.export(model, inputs)
    folded = batchnorm.fold(program).model.module()
    return Folded(folded, partial(count_norms, folded))
