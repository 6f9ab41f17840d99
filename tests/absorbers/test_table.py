"""An operator is added by its row alone: here one that torch does not have, y = w x + b in each channel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from batchnorm import fold, unfold
from batchnorm.absorbers.operator import AbsorbingOperator, LayerParameters
from batchnorm.absorbers.table import ABSORBERS, absorber_of, linear_operator_of
from batchnorm.dataflow.trace import trace

X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("toy::per_channel", mutates_args=())
def per_channel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (input.dim() - 2))
    out = input * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


@per_channel.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(input)


class PerChannel(nn.Module):
    def __init__(self, channels: int, *, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(channels, generator=generator))
        self.register_parameter("bias", nn.Parameter(torch.randn(channels, generator=generator)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.toy.per_channel(x, self.weight, self.bias)


class PerChannelRow(AbsorbingOperator):
    namespace, name, kind, forms = "toy", "per_channel", "toy layer", ("per_channel",)

    def channel_axis(self, dim):
        return 1

    def merge(self, call, absorbed, now, known):
        scale, shift = self.channels_of(call, absorbed)
        bias = torch.zeros_like(now.weight) if now.bias is None else now.bias
        if absorbed.side == "output":
            return LayerParameters(scale * now.weight, scale * bias + shift)
        return LayerParameters(scale * now.weight, bias + shift * now.weight)

    def by_channel(self, weight, groups):
        return weight.reshape(-1, 1)

    def settings(self, args):
        return PerChannel(len(args["weight"]))

    def written(self, layer, node, hold):
        parameters = (hold("weight", layer.weight), hold("bias", layer.bias))
        return torch.ops.toy.per_channel.default, (node.args[0], *parameters)


@pytest.fixture
def toy(monkeypatch) -> Iterator[None]:
    row = PerChannelRow()
    monkeypatch.setitem(ABSORBERS, f"{row.namespace}::{row.name}", row)


def network(*, after: bool = False, bias: bool = True) -> nn.Module:
    norm, layer = nn.BatchNorm2d(3), PerChannel(3, bias=bias)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            tensor.normal_(generator=generator)
    return nn.Sequential(*([nn.Tanh(), norm, layer] if after else [layer, norm, nn.Tanh()])).eval()


def test_without_its_row_the_norm_stays():
    assert [item.norm for item in fold(network(), X).left] == ["1"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_with_its_row_it_absorbs_norms_on_both_sides(toy, after, bias):
    net = network(after=after, bias=bias)
    result = fold(net, X)
    assert [(item.norm, item.kind) for item in result.folded] == [("1", "toy layer")]
    assert f"into the toy layer {2 if after else 0}" in result.folded[0].sentence
    assert result.error <= result.bound
    back = unfold(result.model, result.pairs)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())


def test_with_its_row_it_is_read_in_a_program_and_written_back(toy):
    net = network()
    result = fold(torch.export.export(net, (X,)))
    assert [item.kind for item in result.folded] == ["toy layer"]
    targets = [str(node.target) for node in result.model.graph.nodes if node.op == "call_function"]
    assert targets == ["toy.per_channel.default", "aten.tanh.default"]
    torch.testing.assert_close(result.model.module()(X), net(X))


def test_which_row_a_call_has():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 2)).eval()
    calls = trace(net, X).calls
    assert [None if (row := absorber_of(call)) is None else row.noun for call in calls] == [
        *("convolution", "norm", None, "linear layer")
    ]
    assert [linear_operator_of(call) is not None for call in calls] == [True, False, False, True]
