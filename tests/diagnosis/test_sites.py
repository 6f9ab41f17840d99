"""Every norm is looked at, frozen ones too, and only those that were named are accused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import errors


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.LazyBatchNorm1d())])
def test_models_without_a_norm_or_without_a_size_are_refused(model) -> None:
    with pytest.raises(errors.StateError, match="diagnose: "):
        batchnorm.diagnose(model, [torch.randn(4, 3)])
