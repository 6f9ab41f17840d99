"""place, convert(fuse=True) and check().fix() at sizes that the example does not have."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        self.way = way

    def forward(self, x):
        return self.way(self, x)


SOMETIMES = {
    "one sample": lambda n, x: n.bn(n.conv(x)) if len(x) > 1 else n.conv(x),
    "narrow": lambda n, x: n.bn(n.conv(x)) if x.shape[-1] >= 8 else n.conv(x),
    "positive": lambda n, x: n.bn(n.conv(x)) if x.mean() > -0.3 else n.conv(x),
}


@pytest.mark.parametrize("name", SOMETIMES)
def test_a_bias_stays_where_the_norm_does_not_always_run(name):
    net = Net(SOMETIMES[name]).eval()
    fixed = batchnorm.check(net, X, select="BN001").fix()
    assert fixed.applied == []
    assert "the model runs other code then" in fixed.left[0].reason
    for x in (X, X[:1], X[..., :5], X - 3):
        assert torch.equal(fixed.model(x), net(x))


def test_a_bias_goes_where_it_always_does_and_in_training_where_one_sample_is_too_few():
    net = Net(lambda n, x: n.last(n.bn(n.conv(x)).mean((2, 3), keepdim=True))).train()
    fixed = batchnorm.check(net, X, select="BN001").fix()
    assert [finding.layer for finding in fixed.applied] == ["conv"]


def test_a_norm_is_placed_where_the_activation_always_follows():
    net = Net(lambda n, x: n.last(F.relu(n.conv(x)) if len(x) > 1 else n.conv(x)))
    placed = batchnorm.place(net, X)
    assert placed.placed == []
    assert any(site.layer == "conv" and "With inputs of shape (1, 3" in site.reason for site in placed.left)
    placed = batchnorm.place(Net(lambda n, x: n.last(F.relu(n.conv(x)))), X)
    assert [norm.layer for norm in placed.placed] == ["conv"]


def test_a_norm_is_fused_with_what_always_follows():
    def way(n, x):
        h = n.bn(n.conv(x))
        return n.last(F.relu(h) if len(x) > 1 else h)

    converted = batchnorm.convert(Net(way), X, fuse=True)
    assert converted.fused == ()
    assert "not with inputs of other sizes" in dict(converted.unfused)["bn"]
    converted = batchnorm.convert(Net(lambda n, x: n.last(F.relu(n.bn(n.conv(x))))), X, fuse=True)
    assert [norm.norm for norm in converted.fused] == ["bn"]
