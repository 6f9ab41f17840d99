from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm.nn
from batchnorm.checks import Finding, check
from batchnorm.nn.freeze import freeze


def findings(model: nn.Module, *shape: int) -> list[Finding]:
    return check(model, torch.randn(shape), select="BN001").findings


class Through(nn.Module):
    """A linear layer over a sequence, turned for the norm."""

    def __init__(self, *, turn: bool, channels: int = 5) -> None:
        super().__init__()
        self.linear, self.norm, self.turn = nn.Linear(4, channels), nn.BatchNorm1d(5), turn

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y.transpose(1, 2).contiguous() if self.turn else y)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), (2, 2, 8)),
        (nn.Sequential(nn.Conv3d(2, 4, 1, groups=2), nn.BatchNorm3d(4, affine=False)), (2, 2, 3, 3, 3)),
        (nn.Sequential(nn.ConvTranspose2d(2, 4, 2), batchnorm.nn.BatchNorm2d(4)), (2, 2, 4, 4)),
        (nn.Sequential(nn.Linear(2, 4), nn.Identity(), nn.BatchNorm1d(4, track_running_stats=False)), (8, 2)),
        (Through(turn=True), (3, 7, 4)),
    ],
)
def test_flagged_and_fixed(model: nn.Module, shape: tuple[int, ...]) -> None:
    (finding,) = findings(model, *shape)
    assert finding.fix is not None
    assert finding.fix.safe
    x = torch.randn(shape)
    fixed = check(model, x, select="BN001").fix()
    assert len(fixed.applied) == 1, fixed.left
    assert fixed.model.get_submodule(finding.layer).bias is None
    assert findings(fixed.model, *shape) == []


def test_statistics_of_another_axis_do_not_cancel_the_bias() -> None:
    assert findings(Through(turn=False), 3, 5, 4) == []  # 5 channels on axis 1 by luck, the bias on axis 2


class Custom(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: F.relu(net.conv(x)),
        lambda net, x: net.norm(F.relu(net.conv(x))),
        lambda net, x: net.norm(y := net.conv(x)) + y,
        lambda net, x: (net.norm(y := net.conv(x)), y),
        lambda net, x: net.norm(F.avg_pool2d(net.conv(x), 3, 1, padding=1)),
        lambda net, x: net.norm(F.avg_pool2d(net.conv(x), 2, divisor_override=3)),
        lambda net, x: net.norm(F.relu(F.avg_pool2d(net.conv(x), 2))),
        lambda net, x: net.norm(net.conv(x).transpose(1, 3).mean(1, keepdim=True).expand(-1, 4, -1, -1)),
        lambda net, x: net.norm(F.avg_pool2d(y := net.conv(x), 2)).sum() + y,
        lambda net, x: (net.norm(y := net.conv(x)), F.relu(y)),
        lambda net, x: (net.norm(net.conv(x)), net.conv(x)),
        lambda net, x: net.norm(net.conv(x)) * net.conv.bias.sum(),
        lambda net, x: F.group_norm(net.conv(x), 2),
        lambda net, x: net.norm(F.conv2d(x, net.conv.weight)),
        lambda net, x: (net.norm(net.conv(x)), F.relu(net.conv(x))),  # the second time nothing takes it out
    ],
)
def test_not_flagged(forward: Any) -> None:
    assert findings(Custom(forward), 2, 3, 4, 4) == []


def kept(net: Any, x: Tensor) -> Any:
    net.kept = net.conv(x)
    return net.norm(net.kept)


@pytest.mark.parametrize(
    ("forward", "phrase"),
    [
        (lambda net, x: (net.norm(net.conv(x)), net.norm(net.conv(x))), "norm is called more than once"),
        (lambda net, x: (net.norm(net.conv(x)), net.other(net.conv(x))), "It is called more than once"),
        (lambda net, x: F.batch_norm(net.conv(x), None, None, training=True), "a function called by code"),
        (lambda net, x: net.norm(F.conv2d(x, net.conv.weight, net.conv.bias)), "code calls it"),
        (kept, "the model stores it"),
    ],
)
def test_flagged_without_a_fix(forward: Any, phrase: str) -> None:
    (finding, *_) = findings(Custom(forward), 2, 3, 4, 4)
    assert finding.layer == "conv"
    assert finding.fix is None
    assert phrase in finding.advice


@pytest.mark.parametrize(
    ("count", "phrase"),
    [(2, "the norms norms.0 and norms.1 subtract each"), (3, "the norms norms.0, norms.1 and norms.2 subtract each"),
     (7, "the norms norms.0, norms.1, norms.2, norms.3 and 3 more subtract each")],
)  # fmt: skip
def test_one_layer_before_several_norms_is_one_finding(count: int, phrase: str) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            return sum(norm(self.conv(x + i)) for i, norm in enumerate(self.norms))

    (finding,) = findings(Heads(), 2, 3, 4, 4)
    assert finding.layer == "conv"
    assert finding.fix is None
    assert phrase in finding.message


def test_shared_tensors_have_no_fix() -> None:
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    tied[2].bias = tied[0].bias
    assert findings(tied, 2, 3, 4, 4) == []  # it has an effect in the second layer
    tied.append(nn.BatchNorm2d(3))
    (finding,) = findings(tied, 2, 3, 4, 4)
    assert finding.fix is None
    assert "shares its parameters" in finding.advice
    stats = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    stats[3].running_mean = stats[1].running_mean
    (finding,) = findings(stats.eval(), 2, 3, 4, 4)
    assert finding.fix is None
    assert "running mean is shared" in finding.advice
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    (finding,) = findings(normed, 2, 3, 4, 4)
    assert finding.fix is None
    assert "computed" in finding.advice


def test_norms_with_fixed_statistics_do_not_cancel_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    freeze(model)
    assert findings(model, 2, 3, 4, 4) == []
    assert findings(model.eval(), 2, 3, 4, 4) == []
    by_hand = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3).eval())
    assert findings(by_hand, 2, 3, 4, 4) == []
    assert len(findings(by_hand.eval(), 2, 3, 4, 4)) == 1


def test_the_running_mean_takes_the_bias_over_in_its_own_precision() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).bfloat16()
    model[1].float()
    fixed = check(model.eval(), torch.randn(2, 3, 4, 4, dtype=torch.bfloat16), select="BN001").fix()
    assert torch.equal(fixed.model[1].running_mean, -model[0].bias.detach().float())


def test_no_fix_where_another_norm_may_run_for_other_inputs() -> None:
    class Domains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

        def forward(self, x: Tensor, domain: int = 0) -> Tensor:
            return self.norms[domain](self.conv(x))

    (finding,) = findings(Domains(), 2, 3, 4, 4)
    assert finding.fix is None
    assert "norms.1 stands beside the norm" in finding.advice


@pytest.mark.parametrize("training", [True, False])
def test_a_bias_before_a_norm_that_a_block_keeps_on_its_running_statistics_counts(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train(training)
    x = torch.randn(2, 3, 8, 8)

    def found() -> list[str]:
        return [finding.code for finding in batchnorm.check(model, x).findings if finding.code == "BN001"]

    assert found() == ["BN001"]
    with batchnorm.use("running", model):
        assert found() == []
        with batchnorm.use("batch", model):
            assert found() == ["BN001"]
    assert found() == ["BN001"]


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.norm(F.max_pool2d(net.conv(x), 3, 2, 1)),
        lambda net, x: net.norm(F.avg_pool2d(net.conv(x), 2)),
        lambda net, x: net.norm(F.avg_pool2d(net.conv(x), 3, 2, 1, ceil_mode=True, count_include_pad=False)),
        lambda net, x: net.norm(F.adaptive_avg_pool2d(F.max_pool2d(net.conv(x), 2), 1)),
        lambda net, x: net.norm(net.conv(x).mean((2, 3), keepdim=True)),
        lambda net, x: net.norm(net.conv(x).flatten(2).mean(2)[..., None, None]),
        lambda net, x: net.norm(F.interpolate(net.conv(x), scale_factor=2)),
        lambda net, x: net.norm(F.interpolate(net.conv(x), scale_factor=2, mode="bilinear")),
        lambda net, x: net.norm(F.interpolate(net.conv(x), size=(5, 9), mode="bicubic")),
        lambda net, x: net.norm(net.conv(x).mean(3).unsqueeze(3)),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_constant_is_carried_on_to_the_norm(forward: Any, training: bool) -> None:
    torch.manual_seed(0)
    net = Custom(forward)
    del net.other
    for _ in range(3):
        net(torch.randn(4, 3, 8, 8))
    net.train(training)
    x = torch.randn(4, 3, 8, 8)
    (finding,) = check(net, x, select="BN001").findings
    assert finding.layer == "conv"
    fixed = check(net, x, select="BN001").fix()
    assert [f.layer for f in fixed.applied] == ["conv"], fixed.left
    torch.testing.assert_close(fixed.model(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: [norm(y) for y in [net.conv(x)] for norm in net.norms],
        lambda net, x: [norm(net.conv(x)) for norm in net.norms],
        lambda net, x: [norm(F.avg_pool2d(y, 2)) for y in [net.conv(x)] for norm in net.norms],
    ],
)
def test_one_bias_before_three_norms_is_one_finding(forward: Any) -> None:
    class Three(Custom):
        def __init__(self) -> None:
            super().__init__(forward)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    (finding,) = findings(Three(), 2, 3, 4, 4)
    assert (finding.layer, finding.fix) == ("conv", None)
    assert "the norms norms.0, norms.1 and norms.2 subtract each channel's mean" in finding.message
