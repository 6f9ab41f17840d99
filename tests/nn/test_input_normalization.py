"""The normalization of the inputs, folded: the model takes what is not normalized."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import InputError, ShapeError, StateError

MEAN, STD = [123.7, 116.3, 103.5], [58.4, 57.1, 57.4]


def make(padding: int = 1, first: type[nn.Conv2d] = nn.Conv2d) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        first(3, 8, 3, padding=padding, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    for norm in (net[1], net[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net


def raw(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 255


def normalized(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@pytest.mark.every(3)
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_folded_model_takes_raw_pixels(padding: int, inplace: bool) -> None:
    net = make(padding)
    before = copy.deepcopy(net)
    result = batchnorm.fold(net, raw(2, 3, 9, 9), input_mean=MEAN, input_std=STD, inplace=inplace)
    assert (result.model is net) is inplace
    assert [f.norm for f in result.folded] == ["input_normalization", "1", "4"]
    assert [f.into for f in result.folded] == ["0", "0", "3"]
    x = raw(3, 3, 12, 7)  # of another size
    torch.testing.assert_close(result.model(x), before(normalized(x)), rtol=1e-4, atol=1e-5)
    assert isinstance(result.model[0], nn.Conv2d)


class Twice(nn.Module):
    """Names of its own that are those of the module that holds the normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        inner = nn.Module()
        inner.bn = nn.BatchNorm2d(4)
        inner.bn.running_mean.fill_(1.0)
        self.normalized_model = nn.Module()
        self.normalized_model.bn = nn.BatchNorm2d(4)
        self.normalized_model.normalized_model = inner

    def forward(self, x):
        x = self.normalized_model.bn(self.conv(x))
        return self.normalized_model.normalized_model.bn(x.relu()).sin()


def test_modules_of_that_name_keep_theirs() -> None:
    model = Twice().eval()
    result = batchnorm.fold(model, raw(2, 3, 9, 9), input_mean=MEAN, input_std=STD)
    assert [(f.norm, f.into) for f in result.folded] == [
        ("input_normalization", "conv"),
        ("normalized_model.bn", "conv"),
    ]
    (left,) = result.left
    assert left.norm == "normalized_model.normalized_model.bn"
    assert left.reason.startswith("No shift can cross relu, whose slope changes at zero.")
    assert set(result.model.state_dict()) - {"conv.bias"} <= set(model.state_dict())


def test_every_name_and_reason_is_that_of_a_fold_without_the_normalization() -> None:
    net = nn.Sequential(make(), nn.Tanh(), nn.BatchNorm2d(4), nn.Sigmoid()).eval()
    alone = batchnorm.fold(net, raw(2, 3, 9, 9))
    result = batchnorm.fold(net, raw(2, 3, 9, 9), input_mean=MEAN, input_std=STD)
    assert [item.norm for item in result.folded] == ["input_normalization", *(item.norm for item in alone.folded)]
    assert result.left == alone.left
    assert [item.parameter for item in result.ranges] == [item.parameter for item in alone.ranges]
    assert result.pairs.norms.keys() == alone.pairs.norms.keys()
    assert result.pairs.digests.keys() == alone.pairs.digests.keys()


def test_a_layer_by_itself_is_the_model() -> None:
    net = nn.Conv2d(3, 4, 3, padding=1)
    result = batchnorm.fold(net, raw(2, 3, 9, 9), input_mean=MEAN, input_std=STD)
    x = raw(2, 3, 5, 8)
    torch.testing.assert_close(result.model(x), net(normalized(x)), rtol=1e-4, atol=1e-4)
    assert torch.equal(result.unfold()(x), net(x))
    deployed = batchnorm.refold(copy.deepcopy(net), result.pairs)
    deployed.load_state_dict(result.model.state_dict())
    assert torch.equal(deployed(x), result.model(x))
    assert set(result.pairs.parameters) == {"weight", "bias"}


def test_a_module_called_like_the_normalization_keeps_its_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.input_normalization = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.input_normalization(self.conv(x))

    result = batchnorm.fold(Named().eval(), raw(2, 3, 9, 9), input_mean=MEAN, input_std=STD)
    assert [item.norm for item in result.folded] == ["input_normalization_", "input_normalization"]
    assert isinstance(result.model.input_normalization, nn.Identity)
    assert set(result.pairs.norms) == {"input_normalization"}


def test_it_is_undone_too(tmp_path) -> None:
    net = make()
    result = batchnorm.fold(net, raw(2, 3, 9, 9), input_mean=MEAN, input_std=STD)
    for back in (result.unfold(), batchnorm.unfold(result.model, result.save_pairs(tmp_path / "pairs.safetensors"))):
        assert type(back[0]) is nn.Conv2d
        assert torch.equal(back(raw(1, 3, 8, 8)), net(raw(1, 3, 8, 8)))


def test_rows_and_one_number_for_all_channels() -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.Tanh()).eval()
    result = batchnorm.fold(net, raw(4, 5), input_mean=127.5, input_std=64)
    x = raw(6, 5)
    torch.testing.assert_close(result.model(x), net((x - 127.5) / 64), rtol=1e-5, atol=1e-5)


def test_dict_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, image: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.net(image) * scale

    model = Net().eval()
    result = batchnorm.fold(model, {"image": raw(2, 3, 9, 9), "scale": 2.0}, input_mean=MEAN, input_std=STD)
    x = raw(2, 3, 9, 9)
    torch.testing.assert_close(result.model(x), model(normalized(x)), rtol=1e-4, atol=1e-5)


class Own(nn.Conv2d):
    """A class of somebody's own, which may pad in its own way."""


def test_where_it_cannot_be_folded_that_is_an_error_and_the_model_is_as_it_was() -> None:
    net = make(first=Own)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(StateError, match=r"normalization of the input cannot be folded.*Own"):
        batchnorm.fold(net, raw(2, 3, 9, 9), input_mean=MEAN, input_std=STD, inplace=True)
    assert type(net[1]) is nn.BatchNorm2d
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert (
        len(batchnorm.fold(make(0, Own), raw(2, 3, 9, 9), input_mean=MEAN, input_std=STD).folded) == 3
    )  # without padding


@pytest.mark.parametrize(("inputs", "options", "error", "said"), [
    (raw(2, 3, 9, 9), {"input_mean": [1.0, 2.0]}, ShapeError, "input_mean: expected one number, or 3"),
    (raw(2, 3, 9, 9), {"input_mean": [1.0, float("nan"), 0.0]}, ShapeError, "input_mean: expected finite numbers"),
    (raw(2, 3, 9, 9), {"input_std": float("inf")}, ShapeError, "input_std: expected finite numbers"),
    (raw(2, 3, 9, 9), {"input_std": [1.0, 0.0, 1.0]}, ShapeError, "input_std: expected positive numbers"),
    (torch.zeros(2, 3, dtype=torch.int64), {"input_std": 2.0}, InputError, "of real numbers"),
    (raw(9), {"input_std": 2.0}, InputError, r"shape \(N, C, \.\.\.\)"),
])  # fmt: skip
def test_wrong_numbers_and_inputs(inputs, options, error, said) -> None:
    with pytest.raises(error, match=said):
        batchnorm.fold(make(), inputs, **options)
