"""A folded model gets its norms back, bit for bit, or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.lively import lively
from torch import nn

import batchnorm
from batchnorm.errors import InputError, StateError
from batchnorm.folding.writing.record import FoldRecord


class Special(nn.BatchNorm2d):
    """A norm that only its own code can build."""

    def __init__(self, channels: int, label: str) -> None:
        super().__init__(channels)
        self.label = label


class Net(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2) if norm is None else norm
        self.alias = self.bn
        self.late = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.bn(self.conv(x)))
        return self.head(self.late(x).mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    old, new = a.state_dict(), b.state_dict()
    return list(old) == list(new) and all(torch.equal(old[key], new[key]) for key in old)


@pytest.fixture
def net() -> nn.Module:
    return lively(Net())


@pytest.mark.parametrize("inplace", [False, True])
def test_norms_and_parameters_are_back_bit_for_bit(net, inplace: bool) -> None:
    before = copy.deepcopy(net)
    result = batchnorm.fold(net, X, inplace=inplace)
    assert len(result.folded) == 2
    folded = copy.deepcopy(result.model)
    back = result.unfold()
    assert same_bits(before, back)
    assert same_bits(folded, result.model)  # a copy was unfolded
    assert (back.bn.eps, back.bn.momentum) == (1e-3, 0.2)
    assert back.alias is back.bn
    assert torch.equal(back(X), before(X))
    back.train()(X).sum().backward()
    assert back.bn.weight.grad is not None
    assert back.conv.bias is None


def test_a_file_beside_the_weights_does_the_same(net, tmp_path) -> None:
    result = batchnorm.fold(net, X)
    path = result.save_pairs(tmp_path / "pairs.safetensors")
    torch.save(result.model.state_dict(), tmp_path / "folded.pt")

    deployed = batchnorm.fold(lively(Net()), X).model  # of the same architecture, in another process
    deployed.load_state_dict(torch.load(tmp_path / "folded.pt"))
    back = batchnorm.unfold(deployed, path)
    assert same_bits(net, back)
    assert back.alias is back.bn


@pytest.mark.parametrize("by_file", [False, True])
def test_a_norm_that_took_in_another_one_and_then_went_is_back_too(tmp_path, by_file: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Tanh()).eval()
    for norm in (net[1], net[2]):
        norm.running_mean.normal_()
        nn.init.normal_(norm.weight)
    result = batchnorm.fold(net, X)
    assert [item.into for item in result.folded] == ["2", "3"]
    back = batchnorm.unfold(result.model, result.save_pairs(tmp_path / "p.safetensors")) if by_file else result.unfold()
    assert same_bits(net, back)
    assert torch.equal(back(X), net(X))


def test_in_place(net) -> None:
    result = batchnorm.fold(net, X)
    assert batchnorm.unfold(result.model, result.pairs, inplace=True) is result.model
    assert same_bits(net, result.model)


@pytest.mark.parametrize("change", [
    lambda m: m.conv.weight.data.mul_(1.01), lambda m: m.half(), lambda m: setattr(m, "conv", nn.Identity()),
    lambda m: m._modules.pop("bn"),
], ids=["trained", "cast", "another module", "a module less"])  # fmt: skip
def test_a_model_that_is_not_the_folded_one_is_refused_and_left_as_it_was(net, change) -> None:
    result = batchnorm.fold(net, X)
    change(result.model)
    before = copy.deepcopy(result.model)
    with pytest.raises(StateError, match="unfold: "):
        batchnorm.unfold(result.model, result.pairs, inplace=True)
    assert same_bits(before, result.model)


def test_a_norm_of_a_class_of_its_own_is_copied_from_a_model_like_it(tmp_path) -> None:
    net = lively(Net(Special(4, "mine")))
    result = batchnorm.fold(net, X)
    path = result.save_pairs(tmp_path / "pairs.safetensors")
    with pytest.raises(StateError, match=r"bn was a .*Special, which only its own code can build"):
        batchnorm.unfold(result.model, path)
    back = batchnorm.unfold(result.model, path, like=Net(Special(4, "mine")))
    assert back.bn.label == "mine"
    assert same_bits(net, back)


def test_nothing_folded_is_nothing_to_take_back(tmp_path) -> None:
    result = batchnorm.fold(nn.Linear(3, 3), torch.ones(1, 3))
    assert result.unfold() is result.model
    with pytest.raises(StateError, match="nothing was folded"):
        result.save_pairs(tmp_path / "pairs.safetensors")


def test_other_files_are_refused(net, tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("no tensors here")
    for name in ("weights.safetensors", "text"):
        with pytest.raises(InputError, match="expected"):
            FoldRecord.load(tmp_path / name)
