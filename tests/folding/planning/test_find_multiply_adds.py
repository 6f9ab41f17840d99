"""Norms that nobody can absorb become multiply-adds, which compute the same, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.lively import lively
from tests.wired import Wired
from torch import nn

import batchnorm
from batchnorm.errors import StateError
from batchnorm.folding.fold import fold
from batchnorm.folding.planning import find_multiply_adds as leftover_module
from batchnorm.nn import BatchNorm2d
from batchnorm.nn.scale_shift import ScaleShift

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WITH_RELU = "one multiply-add per channel, with its relu"
ALONE = "one multiply-add per channel"


class Dense(nn.Module):
    """Concatenate what there is, norm, ReLU, convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False)

    def forward(self, values: list[torch.Tensor]) -> torch.Tensor:
        return self.conv(self.relu(self.norm(torch.cat(values, 1))))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.a, self.b = Dense(8), Dense(12)
        self.last = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x))
        y = self.a([x])
        z = self.b([x, y])
        return torch.relu(self.last(torch.cat([x, y, z], 1)))


def became(result) -> dict[str, str | None]:
    return {item.norm: item.becomes for item in result.left}


def assert_same(result, model: nn.Module, x: torch.Tensor = X) -> None:
    with torch.no_grad():
        torch.testing.assert_close(result.model(x.clone()), model(x.clone()), rtol=1e-4, atol=1e-5)


def test_a_dense_block():
    net = lively(DenseNet())
    before = copy.deepcopy(net.state_dict())
    result = fold(net, X, fuse=True)
    assert [item.norm for item in result.folded] == ["bn"]
    # the last one is followed by a function, which nobody can take out of the model's own forward
    assert became(result) == {"a.norm": WITH_RELU, "b.norm": WITH_RELU, "last": ALONE}
    assert result.error <= result.bound
    assert result.error_float64 is not None
    assert result.error_float64 < 1e-12
    assert_same(result, net)
    block = result.model.a
    assert type(block.norm) is ScaleShift
    assert type(block.norm.activation) is nn.ReLU
    assert type(block.relu) is nn.Identity
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert str(result.left[0]).startswith(f"a.norm: left, as {WITH_RELU}. ")
    assert result.summary.startswith("1 of 4 norms folded, 3 made multiply-adds; ")
    assert result.to_dict()["left"][0]["becomes"] == WITH_RELU


def test_it_is_off_by_default():
    result = fold(lively(DenseNet()), X)
    assert became(result) == {"a.norm": None, "b.norm": None, "last": None}
    assert type(result.model.a.norm) is nn.BatchNorm2d


def test_scale_and_shift_are_rounded_once():
    net = lively(nn.Sequential(nn.BatchNorm2d(3)))
    layer = fold(net, X, fuse=True).model[0]
    norm = copy.deepcopy(net[0]).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert torch.equal(layer.weight, scale.float())
    assert torch.equal(layer.bias, (norm.bias - scale * norm.running_mean).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_it_is_as_near_as_the_norm(dtype):
    net = lively(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())).to(dtype)
    result = fold(net, X.to(dtype), fuse=True)
    layer = result.model[0]
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    x = torch.randn(4, 3, 50, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = copy.deepcopy(net).double()(x.double())
    ours, torchs = ((model(x).double() - exact).abs() for model in (result.model, net))
    assert ours.mean() <= torchs.mean()
    # both round once to the type; before that they differ by roundings of float32
    assert ours.max() <= torchs.max() + 2**-20 * exact.abs().max()


def test_a_norm_that_absorbed_another_one():
    # the first goes into the second, which stays: it has another γ
    net = lively(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)))
    result = fold(net, X, fuse=True)
    assert [item.norm for item in result.folded] == ["0"]
    assert became(result) == {"1": WITH_RELU}
    assert_same(result, net)
    back = result.unfold()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())


def test_one_relu_behind_several_norms():
    def run(net, x):
        return net.relu(net.two(torch.tanh(net.relu(net.one(x)))))

    net = lively(Wired(run, one=nn.BatchNorm2d(3), two=nn.BatchNorm2d(3), relu=nn.ReLU()))
    result = fold(net, X, fuse=True)
    assert became(result) == {"one": WITH_RELU, "two": WITH_RELU}
    assert type(result.model.relu) is nn.Identity
    assert result.model.one.activation is result.model.two.activation
    assert_same(result, net)
    assert type(result.unfold().relu) is nn.ReLU


def test_a_relu_that_also_runs_elsewhere_stays():
    def run(net, x):
        return net.relu(net.relu(net.norm(x)) - 1)

    net = lively(Wired(run, norm=nn.BatchNorm2d(3), relu=nn.ReLU()))
    result = fold(net, X, fuse=True)
    assert became(result) == {"norm": ALONE}
    assert type(result.model.relu) is nn.ReLU
    assert_same(result, net)


def other_reader(net, x):
    y = net.norm(x)
    return net.relu(y) + y


def later(net, x):
    y = net.norm(x)
    z = x.exp()
    return net.relu(y) * z


def hooked() -> nn.Module:
    relu = nn.ReLU()
    relu.register_full_backward_hook(lambda *_: None)
    return relu


@pytest.mark.parametrize(
    ("run", "relu"),
    [
        (other_reader, nn.ReLU()),
        (later, nn.ReLU()),
        (lambda net, x: net.relu(net.norm(x)), nn.Softplus()),
        (lambda net, x: net.relu(net.norm(x)), nn.ELU()),
        (lambda net, x: net.relu(net.norm(x)), hooked()),
    ],
)
def test_an_activation_that_cannot_go_along_stays(run, relu):
    net = lively(Wired(run, norm=nn.BatchNorm2d(3), relu=relu))
    result = fold(net, X, fuse=True)
    assert became(result) == {"norm": ALONE}
    assert type(result.model.relu) is type(relu)
    assert_same(result, net)


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.0, 6.0), nn.SiLU(), nn.GELU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh()],
    ids=str,
)
@pytest.mark.parametrize("side", [8, 200])
def test_every_activation_of_the_kernels(activation, side):
    net = lively(nn.Sequential(nn.BatchNorm2d(3), activation))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    result = fold(net, x, fuse=True)
    (becomes,) = became(result).values()
    assert becomes is not None
    assert "with its" in becomes
    assert_same(result, net, x)


class NormAct(nn.BatchNorm2d):
    """A norm that activates, as libraries of models have them."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize(
    ("norm", "becomes"),
    [
        (NormAct(3, nn.ReLU()), WITH_RELU),
        (NormAct(3, nn.Softplus()), ALONE),
        (BatchNorm2d(3, activation="relu"), WITH_RELU),
    ],
)
def test_norms_that_activate_themselves(norm, becomes, tmp_path):
    net = lively(nn.Sequential(norm))
    result = fold(net, X, fuse=True)
    assert became(result) == {"0": becomes}
    assert_same(result, net)
    back = batchnorm.unfold(result.model, result.save_pairs(tmp_path / "pairs.safetensors"), like=net)
    assert type(back[0]) is type(norm)


def test_one_that_does_more_stays():
    net = lively(nn.Sequential(NormAct(3, nn.Sequential(nn.ReLU(), nn.Tanh()))))
    net[0].drop = nn.Sigmoid()
    result = fold(net, X, fuse=True)
    assert became(result) == {"0": None}
    assert torch.equal(result.model(X), net(X))


def test_batch_mode_and_alternatives_stay():
    def run(net, x):
        return net.relu(net.bns[0](x)) + net.free(x)

    net = lively(
        Wired(run, bns=nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]), relu=nn.ReLU(), free=nn.BatchNorm2d(3))
    )
    net.free.train()
    result = fold(net, X, fuse=True)
    assert became(result) == {"bns.0": None, "free": None, "bns.1": None}


def test_not_finite_in_float32_stays():
    net = lively(nn.Sequential(nn.BatchNorm2d(3)))
    net[0].running_mean.fill_(3e38)
    net[0].weight.data.fill_(10.0)
    assert became(fold(net, torch.full_like(X, 3e38), fuse=True)) == {"0": None}


def test_a_model_that_looks_at_its_norm_keeps_that_one_only():
    def run(net, x):
        return net.one(x) * net.two.eps + net.two(x)

    net = lively(Wired(run, one=nn.BatchNorm2d(3), two=nn.BatchNorm2d(3), three=nn.Conv2d(3, 3, 1)))
    result = fold(net, X, fuse=True)
    assert became(result) == {"one": ALONE, "two": None}
    assert_same(result, net)


def test_a_wrong_one_is_found_and_the_others_stay(monkeypatch):
    find = leftover_module.find_multiply_adds

    def wrong(*args):
        found = find(*args)
        for item in found:
            if item.name == "a.norm":
                item.shift[0] += 1e-3
        return found

    monkeypatch.setattr("batchnorm.folding.planning.make_plan.find_multiply_adds", wrong)
    net = lively(DenseNet())
    result = fold(net, X, fuse=True)
    assert became(result) == {"a.norm": None, "b.norm": WITH_RELU, "last": ALONE}
    assert [item.norm for item in result.folded] == ["bn"]
    assert_same(result, net)


@pytest.mark.parametrize("from_file", [False, True])
def test_the_way_back(from_file, tmp_path):
    net = lively(DenseNet())
    result = fold(net, X, fuse=True)
    path = result.save_pairs(tmp_path / "pairs.safetensors")
    back = batchnorm.unfold(result.model, path) if from_file else result.unfold()
    assert repr(back) == repr(net)
    assert list(back.state_dict()) == list(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())
    assert torch.equal(back(X), net(X))
    with torch.no_grad():
        result.model.a.norm.weight += 1
    with pytest.raises(StateError, match=r"a\.norm\.weight is not what folding made of it"):
        batchnorm.unfold(result.model, path)


def test_in_place():
    net = lively(DenseNet())
    with torch.no_grad():
        expected = net(X)
    norm = net.a.norm
    result = fold(net, X, fuse=True, inplace=True)
    assert result.model is net
    assert type(net.a.norm) is ScaleShift
    torch.testing.assert_close(net(X).detach(), expected, rtol=1e-4, atol=1e-5)
    assert result.unfold().a.norm.weight.equal(norm.weight)


def test_with_the_normalization_of_the_input():
    mean, std = [0.5, 0.4, 0.3], [2.0, 3.0, 4.0]
    net = lively(DenseNet())
    result = fold(net, X, fuse=True, input_mean=mean, input_std=std)
    assert became(result) == {"a.norm": WITH_RELU, "b.norm": WITH_RELU, "last": ALONE}
    shape = (1, 3, 1, 1)
    expected = net((X - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))
    torch.testing.assert_close(result.model(X), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.unfold().a.norm.weight, net.a.norm.weight)


def test_folded_once_more():
    net = lively(DenseNet())
    once = fold(net, X, fuse=True)
    twice = fold(once.model, X, fuse=True)
    assert became(twice) == {"a.norm": WITH_RELU, "b.norm": WITH_RELU, "last": ALONE}
    assert_same(twice, net)


def test_programs_of_the_folded_model_need_nothing_of_this_library():
    net = lively(DenseNet())
    model = fold(net, X, fuse=True).model
    with torch.no_grad():
        expected = net(X)
        program = torch.export.export(model, (X,))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for run in (program.module(), compiled, torch.jit.script(model), torch.jit.trace(model, X)):
            torch.testing.assert_close(run(X), expected, rtol=1e-4, atol=1e-5)
    assert all(str(node.target).startswith("aten") for node in program.graph.nodes if node.op == "call_function")


def test_in_onnx_runtime(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = lively(DenseNet())
    program = torch.onnx.export(fold(net, X, fuse=True).model, (X,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(X).detach(), rtol=1e-4, atol=1e-5)
