"""Programs are folded as graphs: functions like modules, shared weights, computed weights, saved and loaded."""

import copy
import io
import warnings

import pytest
import torch
from benchmarks.fold.patterns import PATTERNS
from tests.folding.lively_models import lively, randn
from torch import nn
from torch.export import Dim, export
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from batchnorm import fold
from batchnorm.errors import InputError, StateError


class Net(nn.Module):
    """One convolution with two norms, a functional norm, a normalized weight, and a counter that nobody reads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = parametrizations.weight_norm(nn.Linear(4, 5))
        self.last = nn.BatchNorm1d(5)

    def forward(self, x):
        a, b = self.one(self.conv(x)).relu(), self.two(self.conv(x.flip(-1))).relu()
        y = self.head((a + b).mean((2, 3)))
        last = self.last
        return F.batch_norm(y, last.running_mean, last.running_var, last.weight, last.bias, False, 0.1, last.eps)


@pytest.fixture
def net():
    return lively(Net())


def program_of(net, batch=None):
    shapes = None if batch is None else ({0: batch},)
    return export(net, (randn(2, 3, 6, 6),), dynamic_shapes=shapes)


def norms_in(graph):
    return [node for node in graph.nodes if "batch_norm" in str(node.target) or "bn" in str(node.target)]


def same(a, b, inputs):
    with torch.no_grad():
        torch.testing.assert_close(a(inputs), b(inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decompose", [None, dict, torch.export.default_decompositions], ids=["whole", "none", "core"])
def test_an_exported_program(net, decompose):
    program = program_of(net, Dim("batch", min=1))
    if decompose is not None:
        program = program.run_decompositions(decompose())
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    result = fold(program)
    assert [norm.norm for norm in result.folded] == ["one", "two", "last"]
    assert not result.left
    assert not norms_in(result.model.graph)
    same(result.model.module(), net, randn(5, 3, 6, 6, seed=1))  # of another size
    assert result.error <= result.bound
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict.items())
    same(program.module(), net, randn(2, 3, 6, 6))


def test_state_that_nobody_reads_any_more_is_gone(net):
    names = set(fold(program_of(net)).model.state_dict)
    assert {name for name in names if name.startswith(("one", "two", "last", "head.param"))} == set()
    assert len([name for name in names if name.endswith("weight")]) == 3  # the shared one is two now


def test_one_weight_stays_one_where_both_calls_become_the_same(net):
    net.two = net.one
    result = fold(program_of(net))
    assert len(result.folded) == 3
    assert sorted(result.model.state_dict) == ["conv.bias", "conv.weight", "head.bias", "head.weight"]
    same(result.model.module(), net, randn(2, 3, 6, 6, seed=1))


def test_torchs_own_warnings_about_its_tree_specs_are_not_shown(net):
    program = program_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        fold(program)


def test_a_folded_program_survives_a_file(net, tmp_path):
    result = fold(program_of(net, Dim("batch", min=1)))
    torch.export.save(result.model, tmp_path / "folded.pt2")
    loaded = torch.export.load(tmp_path / "folded.pt2")
    same(loaded.module(), net, randn(3, 3, 6, 6, seed=1))
    again = fold(loaded)
    assert not again.folded
    assert not again.left
    assert again.model is loaded


def test_a_program_from_a_file(net):
    buffer = io.BytesIO()
    torch.export.save(program_of(net), buffer)
    buffer.seek(0)
    result = fold(torch.export.load(buffer))
    assert len(result.folded) == 3
    same(result.model.module(), net, randn(2, 3, 6, 6, seed=1))


def test_the_module_of_an_exported_program(net):
    module = program_of(net).module()
    result = fold(module, randn(2, 3, 6, 6))
    assert len(result.folded) == 3
    assert not norms_in(result.model.graph)
    assert not [name for name, _ in result.model.named_parameters() if name.startswith(("one", "two", "last"))]
    same(result.model, net, randn(2, 3, 6, 6, seed=1))
    assert len(norms_in(module.graph)) > 0


def test_a_traced_module_with_functions_and_shared_modules(net):
    module = torch.fx.symbolic_trace(net)
    result = fold(module, randn(2, 3, 6, 6))
    assert [f"{f.norm}→{f.into}" for f in result.folded] == ["one→conv", "two→conv_1", "last→head"]
    assert not norms_in(result.model.graph)
    assert {name for name, _ in result.model.named_children()} == {"conv", "conv_1", "head"}
    same(result.model, net, randn(2, 3, 6, 6, seed=1))


def test_in_place(net):
    module = torch.fx.symbolic_trace(net)
    result = fold(module, randn(2, 3, 6, 6), inplace=True)
    assert result.model is module
    same(module, net, randn(2, 3, 6, 6, seed=1))
    same(result.unfold(), net, randn(2, 3, 6, 6, seed=1))
    with pytest.raises(StateError, match="Take result"):
        fold(program_of(net), inplace=True)


def test_the_way_back_is_the_original(net):
    program = program_of(net)
    result = fold(program)
    assert result.unfold() is program
    with pytest.raises(StateError, match="Keep the original"):
        result.save_pairs("nowhere")


def test_inputs_are_needed(net):
    with pytest.raises(InputError, match="example_inputs"):
        fold(torch.fx.symbolic_trace(net))
    program = program_of(net)
    program.example_inputs = None
    with pytest.raises(InputError, match="example_inputs"):
        fold(program)


def test_raw_pixels(net):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x))

    net = lively(Padded())
    program = export(net, (randn(2, 3, 6, 6),), dynamic_shapes=({0: Dim("batch", min=1)},))
    result = fold(program, input_mean=[1.0, 2.0, 3.0], input_std=[2.0, 3.0, 0.5])
    pixels = randn(3, 3, 6, 6, seed=1)
    mean, std = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), torch.tensor([2.0, 3.0, 0.5]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(result.model.module()(pixels), net((pixels - mean) / std))
    reloaded = io.BytesIO()
    torch.export.save(result.model, reloaded)


def test_training_mode_stays(net):
    program = export(net.train(), (randn(2, 3, 6, 6),))
    result = fold(program)
    assert [item.norm for item in result.left][:2] == ["one", "two"]
    assert "batch mode" in result.left[0].reason
    assert [norm.norm for norm in result.folded] == ["last"]


def test_a_state_that_the_program_writes_into_is_no_constant():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.register_buffer("factor", torch.ones(1))

        def forward(self, x):
            self.factor.mul_(2)
            return self.bn(F.conv2d(x, self.conv.weight * self.factor, self.conv.bias))

    net = lively(Counts())
    program = export(net, (randn(2, 3, 6, 6),))
    result = fold(program)
    assert not result.folded
    assert len(result.left) == 1


def test_a_weight_that_is_drawn_anew_is_no_constant():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            weight = self.conv.weight + torch.rand_like(self.conv.weight)
            return self.bn(F.conv2d(x, weight)) * 0 + x.mean()

    result = fold(torch.fx.symbolic_trace(lively(Noisy())), randn(2, 3, 6, 6))
    assert not result.folded


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x, *, y, scale: int):
            a = self.bn(self.conv(x))
            return {"a": a, "b": (self.other(self.conv(y)) * scale, y)}

    net = lively(Two())
    inputs = {"x": randn(2, 3, 6, 6), "y": randn(2, 3, 5, 5), "scale": 3}
    result = fold(export(net, (), inputs))
    assert len(result.folded) == 2
    expected, got = net(**inputs), result.model.module()(**inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_embeddings_transposed_convolutions_and_strings():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(7, 4, padding_idx=1), nn.BatchNorm1d(4)
            self.up, self.up_norm = nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1), nn.BatchNorm1d(6)
            self.same, self.same_norm = nn.Conv1d(6, 6, 3, padding="same", dilation=2), nn.BatchNorm1d(6)

        def forward(self, tokens):
            x = self.norm(self.table(tokens).transpose(1, 2)).relu()
            return self.same_norm(self.same(self.up_norm(self.up(x)).relu()))

    net = lively(Many())
    tokens = torch.tensor([[0, 1, 2, 3, 6], [1, 1, 4, 5, 0]])
    for program in (export(net, (tokens,)), torch.fx.symbolic_trace(net)):
        result = fold(program, tokens)
        assert len(result.folded) == 3
        same(result.model.module() if hasattr(result.model, "module") else result.model, net, tokens)


def test_parts_of_one_program_in_another():
    """A graph within an ordinary model is a module like others."""
    net = lively(Net())
    model = nn.Sequential(torch.fx.symbolic_trace(net), nn.Linear(5, 2)).double().eval()
    result = fold(model, randn(2, 3, 6, 6))
    same(result.model, model, randn(2, 3, 6, 6, seed=1))


def test_the_original_is_untouched_when_folding_fails(net, monkeypatch):
    program = torch.fx.symbolic_trace(net)
    code, state = program.code, copy.deepcopy(program.state_dict())
    monkeypatch.setattr("batchnorm.folding.program.fold_program._difference", lambda *_: float("nan"))
    with pytest.raises(Exception, match="original is unchanged"):
        fold(program, randn(2, 3, 6, 6), inplace=True)
    assert program.code == code
    assert all(torch.equal(state[name], tensor) for name, tensor in program.state_dict().items())


@pytest.mark.every(12)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_every_pattern_as_a_program(pattern):
    model, inputs = pattern.build(), pattern.inputs(0)
    as_module = fold(model, inputs)
    result = fold(export(model, inputs))
    assert len(result.left) <= len(as_module.left)
    other = pattern.inputs(1)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*other))
        got = torch.utils._pytree.tree_leaves(result.model.module()(*other))
    for one, two in zip(expected, got, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


class Leaves(torch.fx.Tracer):
    """Calls blocks as a whole."""

    def is_leaf_module(self, module, name):
        return isinstance(module, Block) or super().is_leaf_module(module, name)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x))


class Parts(nn.Module):
    """A block, and parts of it called or read beside it."""

    def __init__(self, use):
        super().__init__()
        self.block, self.use = Block(), use

    def forward(self, x):
        conv = self.block.conv
        if self.use == "call":
            return self.block(torch.tanh(self.block(x))) + conv(x)
        if self.use == "calls":
            return self.block(x) + torch.tanh(conv(x)) * conv(x * 2)
        return self.block(x) + F.conv2d(x, conv.weight)


@pytest.mark.every(4)
@pytest.mark.parametrize("use", ["call", "calls", "read"])
@pytest.mark.parametrize("tracer", [torch.fx.Tracer, Leaves])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_module_that_is_also_called_or_read_as_it_was(use, tracer, inplace):
    net = lively(Parts(use))
    program = torch.fx.GraphModule(net, tracer().trace(net))
    result = fold(program, randn(2, 3, 6, 6), inplace=inplace)
    assert bool(result.folded) is not (use == "calls" and tracer is Leaves)  # there the block's own module runs thrice
    same(result.model, net, randn(2, 3, 6, 6, seed=1))


def test_what_a_program_is_beside_its_graph_stays(net):
    class Special(torch.fx.GraphModule):
        pass

    traced = torch.fx.symbolic_trace(net)
    program = Special(traced, traced.graph)
    program.note = "mine"
    program.register_forward_hook(lambda _module, _inputs, output: output + 1)
    result = fold(program, randn(2, 3, 6, 6))
    assert len(result.folded) == 3
    assert isinstance(result.model, Special)
    assert type(result.model).__name__ == type(program).__name__
    assert result.model.note == "mine"
    same(result.model, program, randn(2, 3, 6, 6, seed=1))
    result.model.register_forward_hook(lambda _module, _inputs, output: output * 0)
    result.model.register_buffer("table", torch.zeros(1), persistent=False)
    same(program, lambda x: net(x) + 1, randn(2, 3, 6, 6))
    assert not program._non_persistent_buffers_set


@pytest.mark.parametrize("kept", [("one",), ("conv", "one"), ("head",)])
def test_signatures_of_modules(net, kept):
    program = export(net, (randn(2, 3, 6, 6),), preserve_module_call_signature=kept)
    result = fold(program)
    assert len(result.folded) == 3
    same(torch.export.unflatten(result.model), net, randn(2, 3, 6, 6, seed=1))
    same(torch.export.unflatten(program), net, randn(2, 3, 6, 6, seed=1))


def test_positional_and_keyword_inputs_at_once_are_refused():
    class Two(nn.Module):
        def forward(self, x, *, y):
            return x * y

    with pytest.raises(InputError, match="1 of the former and with y"):
        fold(export(Two(), (randn(2, 3),), {"y": randn(1)}))
