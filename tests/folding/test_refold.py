"""A newly built model takes the shape of the folded one, and its weights then."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import batchnorm
from batchnorm.errors import ArgumentTypeError, StateError


class NormAct(nn.BatchNorm2d):
    """A norm that also runs an activation that has a parameter."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class NormTanh(nn.BatchNorm2d):
    """A norm that also calls an activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(super().forward(x), 0.3)


class Net(nn.Module):
    """A norm before a padded convolution, a shared one, one under two names, a transposed convolution with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = NormAct(4)
        self.alias = self.bn
        self.again = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), NormTanh(4))
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False)
        self.late = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(self.first(x)))
        for _ in range(2):
            x = self.again(x)
        return self.late(self.up(x))


def original() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
    return model.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def result() -> batchnorm.FoldResult:
    result = batchnorm.fold(original(), X, borders=True)
    assert not result.left
    return result


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("from_file", [False, True])
def test_it_takes_the_folded_weights_and_gives_the_folded_outputs(result, tmp_path, inplace, from_file) -> None:
    pairs = result.save_pairs(tmp_path / "pairs.safetensors") if from_file else result.pairs
    net = Net().eval()
    before = copy.deepcopy(net)
    deployed = batchnorm.refold(net, pairs, inplace=inplace)
    assert (deployed is net) is inplace
    assert list(deployed.state_dict()) == list(result.model.state_dict())
    if not inplace:
        assert repr(net) == repr(before)
    assert repr(deployed) == repr(result.model)
    assert deployed.alias is deployed.bn
    deployed.load_state_dict(result.model.state_dict())
    assert torch.equal(deployed(X), result.model(X))


def test_the_norms_come_back_from_there(result, tmp_path) -> None:
    path = result.save_pairs(tmp_path / "pairs.safetensors")
    deployed = batchnorm.refold(Net(), path)
    deployed.load_state_dict(result.model.state_dict())
    back = batchnorm.unfold(deployed, path, like=Net()).eval()
    net = original()
    assert list(back.state_dict()) == list(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())
    assert torch.equal(back(X), net(X))


def test_pairs_of_a_model_that_takes_raw_inputs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).eval()
    result = batchnorm.fold(net, X, input_mean=[1.0, 2.0, 3.0], input_std=2.0)
    deployed = batchnorm.refold(net, result.pairs)
    deployed.load_state_dict(result.model.state_dict())
    assert torch.equal(deployed(X), result.model(X))


def other(name: str, module: nn.Module) -> nn.Module:
    net = Net()
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)
    return net


@pytest.mark.parametrize(("make", "said"), [
    (lambda: nn.Linear(3, 3), "the model has no module first"),
    (lambda: other("late", nn.GroupNorm(2, 6)), "expected a BatchNorm2d at late; got a GroupNorm"),
    (lambda: batchnorm.convert(Net()).model, r"expected a torch\.nn\.\S+\.BatchNorm2d at \w+; got a batchnorm\.nn\."),
    (lambda: other("up", nn.Conv2d(4, 6, 2)), "expected a parameter of shape 4×3×2×2 at up.weight; got"),
    (lambda: other("conv", nn.Conv2d(3, 4, 3)), "expected no parameter at conv.bias; got a parameter of shape 4"),
    (lambda: other("up", nn.Identity()), r"the model has no parameter up\.weight"),
], ids=["another model", "another norm", "converted", "another shape", "a bias more", "no parameter"])  # fmt: skip
def test_a_model_of_another_architecture_is_refused_and_left_as_it_was(result, make, said) -> None:
    net = make()
    before = repr(net)
    with pytest.raises(StateError, match=f"refold: {said}"):
        batchnorm.refold(net, result.pairs, inplace=True)
    assert repr(net) == before


@pytest.mark.parametrize("verb", [batchnorm.unfold, batchnorm.refold])
@pytest.mark.parametrize("pairs", [None, 3], ids=["of nothing folded", "a number"])
def test_what_is_no_pairs_is_refused(verb, pairs) -> None:
    with pytest.raises(ArgumentTypeError, match=f"{verb.__name__}: expected the pairs of a fold or the path of their"):
        verb(Net(), pairs)


def test_a_folded_model_is_not_folded_again(result) -> None:
    with pytest.raises(StateError, match="expected a BatchNorm2d at first; got a Identity"):
        batchnorm.refold(result.model, result.pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_computed_its_weight_is_a_plain_one(tmp_path, dtype):
    def build():
        conv = parametrizations.weight_norm(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False))
        return nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()).to(dtype).eval()

    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    result = batchnorm.fold(build(), x)
    result.save_pairs(tmp_path / "pairs.safetensors")
    for pairs in (result.pairs, tmp_path / "pairs.safetensors"):
        deployed = batchnorm.refold(build(), pairs)
        deployed.load_state_dict(result.model.state_dict())
        assert torch.equal(deployed(x), result.model(x))
        assert deployed[0].weight is not result.model[0].weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_that_is_a_multiply_add_now(tmp_path, dtype):
    def build():
        plain, tanh = nn.BatchNorm2d(4, affine=False), nn.Tanh()
        parts = [tanh, plain, nn.ReLU(inplace=True), tanh, NormTanh(4), tanh, NormAct(4), tanh, nn.BatchNorm2d(4)]
        return nn.Sequential(*parts).to(dtype).eval()

    x = torch.randn(2, 4, 8, 8).to(dtype)
    result = batchnorm.fold(build(), x, fuse=True)
    assert sum(item.becomes is not None for item in result.left) == 4
    result.save_pairs(tmp_path / "pairs.safetensors")
    for pairs in (result.pairs, tmp_path / "pairs.safetensors"):
        deployed = batchnorm.refold(build(), pairs)
        assert [type(m) for m in deployed.modules()] == [type(m) for m in result.model.modules()]
        deployed.load_state_dict(result.model.state_dict())
        assert torch.equal(deployed(x), result.model(x))
        back = batchnorm.unfold(deployed, pairs, like=build())
        assert [type(m) for m in back.modules()] == [type(m) for m in build().modules()]


def test_weights_that_were_tied_are_apart(tmp_path):
    """Folding made two of one: loaded into one again, the second would take the place of the first."""

    def build():
        table, head = nn.Embedding(7, 4), nn.Linear(4, 7)
        head.weight = table.weight
        return nn.Sequential(table, nn.BatchNorm1d(4), nn.Tanh(), head).eval()

    model, tokens = build(), torch.tensor([1, 2, 3])
    nn.init.normal_(model[1].weight)
    result = batchnorm.fold(model, tokens)
    assert len(result.folded) == 1
    result.save_pairs(tmp_path / "pairs.safetensors")
    for pairs in (result.pairs, tmp_path / "pairs.safetensors"):
        deployed = batchnorm.refold(build(), pairs)
        deployed.load_state_dict(result.model.state_dict())
        assert torch.equal(deployed(tokens), result.model(tokens))


def normalized_weight(*settings: int, **more: int) -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(*settings, **more))


NORMALIZED = {"input_mean": [1.0, 2.0, 3.0], "input_std": [2.0, 3.0, 0.5]}
ITSELF = {
    "padded convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), NORMALIZED),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), NORMALIZED),
    "padded convolution of a computed weight": (lambda: normalized_weight(3, 4, 3, padding=1), NORMALIZED),
    "convolution of a computed weight": (lambda: normalized_weight(3, 4, 3), NORMALIZED),
    "norm": (lambda: nn.BatchNorm2d(3), {"fuse": True}),
    "norm of this library": (lambda: batchnorm.nn.BatchNorm2d(3, activation="relu"), NORMALIZED | {"fuse": True}),
    "norm and activation": (lambda: NormAct(3), NORMALIZED | {"fuse": True}),
    "norm that calls an activation": (lambda: NormTanh(3), {"fuse": True}),
    "norm and normalization": (lambda: nn.BatchNorm2d(3), NORMALIZED),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ITSELF)
def test_a_model_that_is_itself_what_folding_replaces(tmp_path, name, inplace) -> None:
    """No place holds it, so that it becomes what is to stand there; its record knows it by an empty name."""
    make, how = ITSELF[name]

    def build(seed: int = 1) -> nn.Module:
        torch.manual_seed(seed)
        model = make()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        return model.eval()

    x = X * 3 + 2
    model, before = build(), build()
    mean, std = (torch.tensor(how.get(key, 1.0 if key == "input_std" else 0.0)).view(-1, 1, 1) for key in
                 ("input_mean", "input_std"))  # fmt: skip
    expected = before((x - mean) / std)
    result = batchnorm.fold(model, x, inplace=inplace, **how)
    assert (result.model is model) is inplace
    torch.testing.assert_close(result.model(x), expected, rtol=1e-4, atol=1e-4)
    for pairs in (result.pairs, result.save_pairs(tmp_path / "pairs.safetensors")):
        deployed = batchnorm.refold(build(seed=2), pairs)
        assert type(deployed) is type(result.model)
        deployed.load_state_dict(result.model.state_dict())
        assert torch.equal(deployed(x), result.model(x))
        for folded in (result.model, deployed):
            back = batchnorm.unfold(folded, pairs, like=build(seed=2))
            assert type(back).__name__ == type(before).__name__
            assert list(back.state_dict()) == list(before.state_dict())
            assert all(torch.equal(value, before.state_dict()[key]) for key, value in back.state_dict().items())
    assert batchnorm.unfold(result.model, result.pairs, inplace=True) is result.model
    assert torch.equal(result.model((x - mean) / std), expected)


def test_another_model_itself_is_refused() -> None:
    result = batchnorm.fold(nn.BatchNorm2d(3).eval(), X, fuse=True)
    with pytest.raises(StateError, match="refold: expected a BatchNorm2d at the top of the model; got a Linear"):
        batchnorm.refold(nn.Linear(3, 3), result.pairs)
