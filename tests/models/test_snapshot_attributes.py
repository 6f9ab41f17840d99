"""What a model's own code keeps in attributes goes with the buffers that it describes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.models.snapshot import untouched


class Table(nn.Module):
    """Multiplies by a table in a buffer that grows with the input; ``size`` says how far it goes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.bn.running_var.fill_(4.0)
        self.grow(size)

    def grow(self, size: int) -> None:
        self.size = size
        self.register_buffer("table", torch.arange(1.0, size + 1), persistent=False)

    def forward(self, x):
        if x.shape[-1] > self.size:
            self.grow(x.shape[-1])
        return self.bn(x) * self.table[: x.shape[-1]]


class First(nn.Module):
    """Divides by what its first call has seen before the norm."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), how
        self.bn.running_mean.fill_(0.3)
        self.bn.running_var.fill_(0.04)
        self.register_buffer("top", torch.zeros(()))
        self.seen: object = None

    def forward(self, x):
        y = self.conv(x)
        if self.seen is None:
            self.seen = {"number": float, "tensor": lambda t: t, "flag": bool}[self.how](y.detach().abs().max())
            if self.how == "flag":
                self.top.copy_(y.detach().abs().max())
        return self.bn(y) / (self.top if self.how == "flag" else self.seen)


VERBS = {
    "check": batchnorm.check,
    "place": batchnorm.place,
    "fold": batchnorm.fold,
    "convert": lambda model, x: batchnorm.convert(model, x, fuse=True),
    "diagnose": lambda model, x: batchnorm.diagnose(model, x.split(8)),
    "recalibrate": lambda model, x: batchnorm.recalibrate(model, x.split(8)),
    "parallel": lambda model, x: batchnorm.recalibrate(model, x.split(8), order="parallel"),
    "measure": lambda model, x: batchnorm.monitor.measure(model, x.split(8)),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize("size", [1, 4])
def test_a_buffer_and_the_attribute_that_describes_it_stay_together(verb, size: int) -> None:
    x = torch.randn(32, 4, 9)
    model = Table(size).eval()
    verb(model, x)
    assert model.size == len(model.table) == size
    fresh = Table(size).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(x), fresh(x))


@pytest.mark.parametrize("how", ["number", "tensor", "flag"])
def test_what_the_first_call_reads_before_a_norm_is_seen_in_every_run(how: str) -> None:
    model, x = First(how).eval(), torch.randn(2, 3, 8, 8)
    result = batchnorm.fold(model, x)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(result.model)(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-5)


def test_attributes_that_were_set_added_and_deleted_are_put_back() -> None:
    model = First("number")
    with untouched(model):
        model.seen, model.added = 2.0, 1
        del model.how
    assert model.seen is None
    assert model.how == "number"
    assert not hasattr(model, "added")
