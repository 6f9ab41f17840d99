from __future__ import annotations

import copy
import pickle
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fusion.networks import Subclass, resnet
from torch import nn

import batchnorm
import batchnorm.nn as ours
from batchnorm.errors import ArgumentTypeError, InputError, ShapeError, StateError
from batchnorm.fusion.convert import convert, revert

pytestmark = pytest.mark.usefixtures("deferring")

KINDS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
OURS = dict(zip(KINDS, (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d), strict=True))


class Identity(nn.Module):
    def forward(self, x):
        return x


def fingerprint(model):
    """Return everything that conversion must keep, comparable by value, and by identity within the model."""
    order: dict[int, int] = {}
    return [
        (
            name,
            type(module),
            module.training,
            list(module.__dict__),
            {k: v for k, v in module.__dict__.items() if isinstance(v, int | float | str | bool | None)},
            [
                (k, order.setdefault(id(p), len(order)), None if p is None else (p.tolist(), p.requires_grad))
                for k, p in module._parameters.items()
            ],
            [
                (k, order.setdefault(id(b), len(order)), None if b is None else b.tolist())
                for k, b in module._buffers.items()
            ],
            [(k, order.setdefault(id(m), len(order))) for k, m in module._modules.items()],
            list(module._forward_hooks.values()),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def hook(module, args, output):
    return None


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Draw a tree of modules with norms at any depth, shared ones, hooks, and mixed modes."""
    shared = [draw(norms()) for _ in range(2)]

    def tree(depth):
        children = []
        for _ in range(draw(st.integers(1, 3))):
            kind = draw(st.sampled_from(["norm", "shared", "other"] + ["tree"] * (depth > 0)))
            if kind == "norm":
                children.append(draw(norms()))
            elif kind == "shared":
                children.append(draw(st.sampled_from(shared)))
            elif kind == "tree":
                children.append(tree(depth - 1))
            else:
                children.append(draw(st.sampled_from([Identity, lambda: nn.Linear(2, 2), lambda: nn.LayerNorm(2)]))())
        return nn.Sequential(*children)

    return draw(norms()) if draw(st.booleans()) and draw(st.booleans()) else tree(2)


@st.composite
def norms(draw: st.DrawFn) -> nn.Module:
    options = {
        "momentum": draw(st.sampled_from([0.1, None])),
        "affine": draw(st.booleans()),
        "track_running_stats": draw(st.booleans()),
    }
    norm = draw(st.sampled_from(KINDS))(2, **options).train(draw(st.booleans()))
    if norm.affine and draw(st.booleans()):
        norm.weight.requires_grad_(False)
    if draw(st.booleans()):
        norm.register_forward_hook(hook)
    if draw(st.booleans()):
        norm.note = "kept"
    return norm


@given(models(), st.booleans())
def test_there_and_back_is_where_we_were(model, inplace):
    before = fingerprint(model)
    there = convert(model, inplace=inplace)
    assert (there.model is model) is inplace
    assert there.left == ()
    for name, module in there.model.named_modules():
        if isinstance(module, tuple(KINDS)):
            assert type(module) in OURS.values()
            assert name in there.converted
    if not inplace:
        assert fingerprint(model) == before
    back = revert(there.model, inplace=inplace)
    assert back.converted == there.converted
    assert fingerprint(back.model) == before


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))


def test_identity_and_numbers_are_kept_in_place():
    model, x = block(), torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model)(x)
    norm, weight = model[1], model[1].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = convert(model, inplace=True)
    assert result.model is model
    assert model[1] is norm
    assert norm.weight is weight
    y = model(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    old = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(norm.weight, old)


def test_layers_know_their_names_and_say_them():
    result = convert(block())
    assert result.converted == ("1", "2.1")
    with pytest.raises(ShapeError, match=r"^2\.1: training needs"):
        result.model[2](torch.zeros(1, 4, 1, 1))
    assert "layer_name" not in revert(result.model).model[1].__dict__


def test_the_root_may_be_a_norm():
    norm = nn.BatchNorm1d(2)
    result = convert(norm)
    assert type(result.model) is ours.BatchNorm1d
    assert type(norm) is nn.BatchNorm1d
    assert result.converted == ("",)
    with pytest.raises(ShapeError, match=r"^BatchNorm1d\(2\): "):
        result.model(torch.zeros(1, 2))


def test_what_is_left_has_its_reason():
    patched = nn.BatchNorm2d(2)
    patched.forward = lambda x: x
    frozen = nn.BatchNorm2d(2)
    ours.freeze(frozen)
    marked = nn.BatchNorm2d(2)
    marked.activation = "relu"  # somebody's own note, which our layer would act upon
    model = nn.ModuleDict(
        {
            "subclass": Subclass(2),
            "sync": nn.SyncBatchNorm(2),
            "lazy": nn.LazyBatchNorm2d(),
            "parametrized": nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(2), "weight", Identity()),
            "patched": patched,
            "frozen": frozen,
            "marked": marked,
            "ours": ours.BatchNorm2d(2),
            "plain": nn.BatchNorm2d(2),
            "instance": nn.InstanceNorm2d(2),
        }
    )
    classes = {name: type(m) for name, m in model.items()}
    result = convert(model, inplace=True)
    assert result.converted == ("plain",)
    reasons = dict(result.left)
    assert set(reasons) == set(classes) - {"plain", "instance"}
    for name, piece in {
        "subclass": "Subclass, a subclass whose own behaviour would be lost",
        "sync": "SyncBatchNorm",
        "lazy": "lazy: run the model once",
        "parametrized": "remove the parametrization",
        "patched": "forward was replaced",
        "frozen": "unfreeze it first",
        "marked": "has an attribute 'activation' of its own",
        "ours": "is batchnorm.nn.BatchNorm2d already",
    }.items():
        assert piece in reasons[name]
        assert type(model[name]) is classes[name]
    assert marked.activation == "relu"


def test_converting_twice_changes_nothing_more():
    once = convert(block())
    twice = convert(once.model)
    assert twice.converted == ()
    assert fingerprint(twice.model) == fingerprint(once.model)


def test_what_torchs_layer_cannot_do_is_refused_and_nothing_changed():
    model = nn.Sequential(ours.BatchNorm2d(2), ours.BatchNorm2d(2, activation="relu"), ours.BatchNorm2d(2))
    ours.freeze(model, "2")
    before = fingerprint(model)
    with pytest.raises(StateError) as caught:
        revert(model, inplace=True)
    assert "1: applies relu; torch's batch norm has no activation." in str(caught.value)
    assert "2: is frozen: unfreeze it first." in str(caught.value)
    assert fingerprint(model) == before


@pytest.mark.parametrize("options", [{"scale": False}, {"center": False}, {}])
def test_a_layer_made_by_this_library_becomes_torchs(options):
    layer, x = ours.BatchNorm2d(3, **options), torch.randn(4, 3, 2, 2)
    torchs = revert(layer).model
    assert type(torchs) is nn.BatchNorm2d
    assert not {"activation", "layer_name"} & set(torchs.__dict__)
    assert torch.equal(torchs(x), layer(x))
    torchs.reset_parameters()
    assert repr(torchs)


def test_a_failure_midway_puts_everything_back(monkeypatch):
    model = block()
    before = fingerprint(model)

    class Bomb(dict):
        def __getitem__(self, cls):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__getitem__(cls)

    # the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["batchnorm.fusion.convert"], "OURS", Bomb(OURS))
    with pytest.raises(KeyboardInterrupt):
        convert(model, inplace=True)
    assert fingerprint(model) == before


def test_a_model_that_cannot_be_copied_is_explained():
    model = block()
    model.lock = threading.Lock()
    with pytest.raises(StateError, match=r"convert: Sequential cannot be copied .*Pass inplace=True"):
        convert(model)
    assert convert(model, inplace=True).converted == ("1", "2.1")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_converted_model_can_be_scripted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(torch.jit.script(convert(model).model)(x), model(x))


# -- fuse --------------------------------------------------------------------------------------------------------------


def step(net, x):
    """Return the loss of a training step, all gradients, and the buffers after it."""
    net.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


@pytest.mark.parametrize("inplace", [True, False])
def test_norms_are_fused_and_the_model_stays_the_same(inplace):
    net = resnet()
    plain, before = copy.deepcopy(net), fingerprint(net)
    result = convert(net, net.x, fuse=True, inplace=inplace)
    assert (result.model is net) is inplace
    assert inplace or fingerprint(net) == before
    assert [str(norm) for norm in result.fused] == [
        "0.bn1 → relu in 0.act: fused.",
        "0.bn2 → add → relu in 0.act: fused.",
        "1.bn1 → silu in 1: fused.",
        "1.bn2 → add → silu in 1: fused.",
    ]
    assert result.unfused == (("0.downsample.1", "Its output is added in place to another tensor, by add_ in 0."),)
    fused = result.model
    assert type(fused) is type(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        for a, b in zip(step(plain, plain.x), step(fused, plain.x), strict=True):
            assert torch.equal(a, b)
    assert fused[0].bn1.num_batches_tracked == 2
    assert torch.equal(plain.eval()(plain.x), fused.eval()(plain.x))
    back = revert(fused).model
    assert [(type(m), list(m.__dict__)) for m in back.modules()] == [
        (type(m), list(m.__dict__)) for m in plain.modules()
    ]


def test_copies_are_fused_too(monkeypatch):
    fused = convert(*(lambda net: (net, net.x))(resnet()), fuse=True).model
    seen = []
    original = sys.modules["batchnorm.nn.pending"]._Source.compute
    monkeypatch.setattr(
        sys.modules["batchnorm.nn.pending"]._Source,
        "compute",
        lambda source, activation, residual: (seen.append(activation), original(source, activation, residual))[1],
    )
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied(fused.x), fused(fused.x))
        assert seen == ["relu", "relu", "silu", "silu"] * 2
        seen.clear()


def test_fusing_again_finds_the_same_and_forgets_what_is_gone():
    net = resnet()
    once = convert(net, net.x, fuse=True)
    twice = convert(once.model, net.x, fuse=True)
    assert twice.fused == once.fused
    assert twice.converted == ()
    once.model[0].act = nn.ELU()
    third = convert(once.model, net.x, fuse=True)
    assert [norm.norm for norm in third.fused] == ["1.bn1", "1.bn2"]
    assert not third.model[0].bn1.fused
    assert convert(third.model).model[1].bn1.fused  # without fuse the marks stay


def test_the_other_verbs_work_on_a_fused_model():
    net = resnet()
    fused = convert(net, net.x, fuse=True).model.eval()
    plain = net.eval()
    assert str(batchnorm.check(fused, net.x)) == str(batchnorm.check(plain, net.x))
    folded = batchnorm.fold(fused, net.x)
    assert len(folded.folded) == 5
    torch.testing.assert_close(folded.model(net.x), plain(net.x))
    batches = [net.x, net.x + 1]
    for model in (fused, plain):
        batchnorm.recalibrate(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(fused.buffers(), plain.buffers(), strict=True))
    reports = []
    for model in (fused, plain):
        with batchnorm.watch(model) as watching:
            model(net.x)
        reports.append(str(watching.result()))
    assert reports[0] == reports[1]
    batchnorm.freeze(fused)
    assert torch.equal(fused.train()(net.x), plain(net.x))


def test_a_fused_model_is_compiled_and_exported_whole():
    net = resnet(nn.GELU())
    fused = convert(net, net.x, fuse=True).model.eval()
    expected = fused(net.x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(fused, backend="aot_eager", fullgraph=True)(net.x), expected)
    assert torch.equal(torch.export.export(fused, (net.x,)).module()(net.x), expected)


def test_what_fuse_needs_is_said():
    with pytest.raises(StateError, match=r"Pass example inputs: convert\(model, example_inputs, fuse=True\)"):
        convert(resnet(), fuse=True)
    with pytest.raises(ArgumentTypeError, match="got Tensor without it"):
        convert(resnet(), torch.zeros(1))
    with pytest.raises(StateError, match="has no value yet"):
        convert(nn.Sequential(nn.LazyBatchNorm2d()), torch.zeros(2, 2, 2, 2), fuse=True)


@pytest.mark.every(3)
@pytest.mark.parametrize("stage", ["trace", "find_fusions", "mark_those_that_hold"])
def test_a_failure_while_fusing_puts_everything_back(stage, monkeypatch):
    net = resnet()
    x = net.x
    convert(net, x, fuse=True, inplace=True)
    net[0].bn1 = nn.BatchNorm2d(4)
    before = fingerprint(net)
    generator = torch.get_rng_state()

    def fail(*args):
        original(*args)
        raise KeyboardInterrupt

    module = sys.modules["batchnorm.fusion.convert"]
    original = getattr(module, stage)
    monkeypatch.setattr(module, stage, fail)
    with pytest.raises(KeyboardInterrupt):
        convert(net, x, fuse=True, inplace=True)
    assert fingerprint(net) == before
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(InputError, match="fails on the example inputs"):
        convert(net, x[:, :1], fuse=True, inplace=True)
    assert fingerprint(net) == before


@pytest.mark.parametrize("inplace", [False, True])
def test_inference_mode_changes_nothing(inplace):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with torch.inference_mode():
        result = convert(model, torch.randn(4, 3, 8, 8), fuse=True, inplace=inplace)
        back = revert(result.model).model
    assert len(result.fused) == 1
    for one in (result.model, back):
        assert not any(t.is_inference() for t in one.state_dict().values())
        one.train()(torch.randn(4, 3, 8, 8)).sum().backward()


def test_a_layer_without_channels_is_told():
    with pytest.raises(InputError, match="expected an input with at least one channel"):
        ours.BatchNorm1d(0)(torch.randn(4, 0, 3))
