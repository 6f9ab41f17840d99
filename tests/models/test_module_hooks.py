"""Hooks on all modules see each call, go away however it ends, and make no noise."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import batchnorm
from batchnorm.models.module_hooks import module_hooks


def hooks_there_are() -> list[int]:
    kinds = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_forward_hooks_with_kwargs")
    return [len(getattr(torch_module, kind)) for kind in kinds]


@pytest.mark.parametrize("kwargs", [False, True])
def test_each_call_is_seen_and_nothing_stays(kwargs: bool) -> None:
    seen: list[object] = []
    net, before = nn.Sequential(nn.ReLU()), hooks_there_are()
    with module_hooks(lambda m, args: seen.append(m), lambda m, *rest: seen.append(len(rest)), kwargs=kwargs):
        net(torch.ones(2))
    assert seen == [net, net[0], 2 + kwargs, 2 + kwargs]
    assert hooks_there_are() == before
    with pytest.raises(KeyboardInterrupt), module_hooks(lambda *_: None, lambda *_: None, kwargs=kwargs):
        raise KeyboardInterrupt
    assert hooks_there_are() == before


def test_a_compiled_module_is_looked_at_where_warnings_are_errors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(torch.compile(nn.Conv2d(3, 4, 3), backend="eager"), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(batchnorm.fold(net, x).folded) + len(batchnorm.fold(net, x).left) == 1
        batchnorm.check(net, x)
        batchnorm.diagnose(net, [x])
