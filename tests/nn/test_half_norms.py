from __future__ import annotations

import torch
from torch import nn

from batchnorm.nn.half_norms import half_norms


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))


def test_models_of_one_precision_have_none() -> None:
    assert half_norms(net()) == ""
    assert half_norms(net().half()) == ""
    assert half_norms(nn.BatchNorm1d(2).half()) == ""


def test_the_first_is_named_with_the_line_that_makes_it_fit() -> None:
    model = net()
    model[2].bfloat16()
    text = half_norms(model)
    assert text.startswith("2 holds half precision in a model of float32 (1 of 2 norms do): ")
    assert "model.get_submodule('2').float()" in text


def test_buffers_count_too() -> None:
    model = net()
    model[1].running_var = model[1].running_var.to(torch.float16)
    assert half_norms(model).startswith("1 holds half precision")
