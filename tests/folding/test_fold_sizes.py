"""A fold is right at sizes, values and numbers that it was not made on, or the norm stays."""

import re

import pytest
import torch
from tests.lively import lively
from torch import nn
from torch.export import Dim, export
from torch.nn import functional as F

from batchnorm import fold
from batchnorm.errors import ArgumentTypeError, InputError, StateError

UNSEEN = [(2, 3, 16, 16), (1, 3, 18, 22), (3, 3, 17, 19), (6, 3, 9, 33), (4, 3, 15, 16), (2, 3, 16, 140), (9, 3, 8, 8)]


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.way = way

    def forward(self, x):
        return self.way(self, x)


def in_float64(net):
    return lively(net, positive=True).double()


def rand(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def worst(net, folded, inputs):
    with torch.no_grad():
        return max(float((net(*x) - folded(*x)).abs().max()) for x in inputs)


def parts(pieces, net, dim):
    first, *rest = pieces
    return torch.cat([net.bn(first), *rest], dim)


def slices(n, h, size):
    return parts([h[..., :size], h[..., size:]], n, -1)


# what stands between the convolution and the norm depends on the size of the input
BY_SIZE = {
    "divided by the width": lambda n, x: n.bn(n.conv(x) / x.shape[-1]),
    "times the batch": lambda n, x: n.bn(n.conv(x) * x.shape[0]),
    "plus the width": lambda n, x: n.bn(n.conv(x) + x.shape[-1]),
    "over the root of the area": lambda n, x: n.bn(n.conv(x) / (x.shape[-1] * x.shape[-2]) ** 0.5),
    "times a count of blocks": lambda n, x: n.bn(n.conv(x) * (x.shape[-1] // 100 + 1)),
    "the batch's size as a tensor": lambda n, x: n.bn(n.conv(x) * torch.tensor(float(len(x)), dtype=x.dtype)),
    "pad to a multiple": lambda n, x: n.bn(F.pad(n.conv(x), (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4))),
    "pad to a multiple of many": lambda n, x: n.bn(F.pad(n.conv(x), (0, -x.shape[-1] % 16))),
    "pad to a length": lambda n, x: n.bn(F.pad(n.conv(x), (0, max(16 - x.shape[-1], 0)))),
    "first two of the batch": lambda n, x: parts([(h := n.conv(x))[:2], h[2:]], n, 0),
    "slice of all": lambda n, x: slices(n, n.conv(x), 16),
    "slice of more than all": lambda n, x: slices(n, n.conv(x), 64),
    "slice of most": lambda n, x: slices(n, n.conv(x), 12),
    "slice from the end": lambda n, x: (lambda h: torch.cat([h[..., :-16], n.bn(h[..., -16:])], -1))(n.conv(x)),
    "split": lambda n, x: parts(n.conv(x).split(16, 3), n, 3),
    "chunk": lambda n, x: parts(n.conv(x).chunk(2, 0), n, 0),
    "narrow": lambda n, x: parts(n.conv(x).tensor_split([16], 3), n, 3),
    "norm of one sample only": lambda n, x: n.bn(n.conv(x)) if len(x) > 1 else n.conv(x),
    "norm of small inputs": lambda n, x: n.bn(n.conv(x)) if x.shape[-1] <= 16 else n.conv(x),
    "layer again": lambda n, x: n.bn(n.conv(x)) + (n.conv(2 * x) if x.shape[-1] > 16 else 0),
    "weight read": lambda n, x: n.bn(n.conv(x)) + (n.conv.weight.sum() if len(x) > 2 else 0),
    "mask by place": lambda n, x: n.bn(torch.where(torch.arange(x.shape[-1]) < 16, h := n.conv(x), 2 * h)),
    "mask by length": lambda n, x: n.bn(n.conv(x) * (torch.arange(x.shape[-1]) < 16).to(x)),
    "running count": lambda n, x: n.bn(n.conv(x) / torch.ones_like(x[:, :1]).cumsum(-1)),
    "sum over places": lambda n, x: n.bn(n.conv(x).sum((2, 3), keepdim=True)),
    "einsum with a position table": lambda n, x: n.bn(
        torch.einsum("nchw,w->nchw", n.conv(x), torch.ones(x.shape[-1], dtype=x.dtype) * x.shape[-1])
    ),
    "interpolated to the half": lambda n, x: n.bn(
        F.interpolate(n.conv(x), (max(x.shape[-2] // 2, 1), max(x.shape[-1] // 2, 1)), mode="bilinear") * len(x)
    ),
    "repeated": lambda n, x: n.bn(n.conv(x).repeat_interleave(2, 0)[: len(x)] + len(x)),
    "branch to the next layer": lambda n, x: n.out(n.bn(n.conv(x))) if len(x) > 1 else n.out(n.conv(x)),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.sweep), 2])
@pytest.mark.parametrize("name", BY_SIZE)
def test_what_depends_on_the_size_is_no_constant(name, batch):
    net = in_float64(Net(BY_SIZE[name]))
    result = fold(net, rand(batch, 3, 16, 16))
    assert worst(net, result.model, [(rand(*shape),) for shape in UNSEEN]) < 1e-9, name


# and here it does not, or the norm can go all the same
RIGHT = {
    "plain": lambda n, x: n.out(F.relu(n.bn(n.conv(x)))),
    "interpolated": lambda n, x: n.out(n.bn(F.interpolate(n.conv(x), (x.shape[-2] * 2, x.shape[-1] + 1)))),
    "pooled to a size": lambda n, x: n.bn(F.adaptive_avg_pool2d(n.conv(x), (2, max(x.shape[-1] // 3, 1)))),
    "views": lambda n, x: n.bn(n.conv(x).view(x.shape[0], 8, -1).view(x.shape[0], 8, x.shape[-2], x.shape[-1])),
    "expanded": lambda n, x: n.bn(n.conv(x).unsqueeze(0).expand(2, -1, -1, -1, -1).flatten(0, 1)),
    "padded after it": lambda n, x: F.pad(n.bn(n.conv(x)), (0, -x.shape[-1] % 4)),
    "cut": lambda n, x: n.bn(n.conv(x)[..., :12]),
    "channels in halves": lambda n, x: n.out(torch.cat(n.bn(n.conv(x)).chunk(2, 1)[::-1], 1)),
    "repeated": lambda n, x: n.bn(n.conv(x).repeat_interleave(2, 0)),
    "mean": lambda n, x: n.bn(n.conv(x)).mean((2, 3)),
    "transposed": lambda n, x: n.bn(n.conv(x).transpose(2, 3)).flatten(2),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.sweep), 2])
@pytest.mark.parametrize("name", RIGHT)
def test_what_holds_at_all_sizes_is_folded(name, batch):
    net = in_float64(Net(RIGHT[name]))
    result = fold(net, rand(batch, 3, 16, 16))
    assert [norm.norm for norm in result.folded] == ["bn"], result.left
    assert worst(net, result.model, [(rand(*shape),) for shape in UNSEEN]) < 1e-9
    assert result.warnings == []
    assert any("(1, 3" in size or "(3, 3" in size for size in result.sizes)


TRACEABLE = [
    name for name in BY_SIZE if name.startswith(("divided", "times", "plus", "over", "pad to a m", "slice of"))
]


@pytest.mark.every(4)
@pytest.mark.parametrize("name", [*TRACEABLE, "running count", "sum over places", "plain", "views", "interpolated"])
@pytest.mark.parametrize("kind", [pytest.param("graph module", marks=pytest.mark.sweep), "exported"])
def test_programs(name, kind):
    net = in_float64(Net((BY_SIZE | RIGHT)[name]))
    x = rand(2, 3, 16, 16)
    if kind == "graph module":
        program = torch.fx.Tracer().trace(_Bare(net))
        program = torch.fx.GraphModule(_Bare(net), program)
        result = fold(program, x)
        before, after = program, result.model
    else:
        program = export(net, (x,), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},))
        result = fold(program)
        before, after = program.module(), result.model.module()
    seen = 0
    for shape in UNSEEN:
        y = rand(*shape)
        try:
            expected = before(y)
        except (RuntimeError, AssertionError):  # not a size that the program takes
            continue
        seen += 1
        assert float((expected - after(y)).abs().max()) < 1e-9
    assert seen >= 2
    assert bool(result.folded) == (name in RIGHT)


class _Bare(nn.Module):
    """The same without the function as an attribute, for a tracer that follows calls."""

    def __init__(self, net):
        super().__init__()
        self.conv, self.bn, self.out, self._way = net.conv, net.bn, net.out, [net.way]

    def forward(self, x):
        return self._way[0](self, x)


def test_a_program_of_one_size_folds_at_that_size():
    net = in_float64(Net(BY_SIZE["divided by the width"]))
    x = rand(2, 3, 16, 16)
    program = export(net, (x,))
    result = fold(program)
    assert [norm.norm for norm in result.folded] == ["bn"]
    assert result.warnings == []
    y = rand(2, 3, 16, 16, seed=5)
    assert float((program.module()(y) - result.model.module()(y)).abs().max()) < 1e-9


# -- values and numbers -----------------------------------------------------------------------------------------------


class Valued(Net):
    def forward(self, x, value=None):
        return self.way(self, x, value)


BY_VALUE = {
    "branch on the mean": (lambda n, x, v: n.bn(n.conv(x)) if x.mean() > 0 else n.conv(x), [None]),
    "branch on the size of values": (lambda n, x, v: n.bn(n.conv(x)) if x.abs().max() < 6 else n.conv(x), [None]),
    "number read": (lambda n, x, v: n.bn(n.conv(x) * float(x.sum())), [None]),
    "a number among the arguments": (lambda n, x, v: n.bn(n.conv(x) * v + v), [2.5, 1.0, 0.5]),
    "a whole number": (lambda n, x, v: n.bn(torch.roll(n.conv(x), v, 1)), [2, 0, 8, 3]),
    "a whole number in a tensor": (lambda n, x, v: n.bn(torch.roll(n.conv(x), int(v), 1)), map(torch.tensor, [2, 5])),
    "a number of times": (lambda n, x, v: n.bn(n.conv(x)) if v < 3 else n.conv(x), [2, 5]),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", BY_VALUE)
def test_what_depends_on_values_is_no_constant(name):
    way, values = BY_VALUE[name]
    net, values = in_float64(Valued(way)), list(values)
    example = rand(2, 3, 8, 8)
    result = fold(net, example if values == [None] else (example, values[0]))
    scales = [1.0, -1.0, 3.0, 0.1]
    assert worst(net, result.model, [(s * rand(2, 3, 8, 8, seed=7) + s, v) for s in scales for v in values]) < 1e-9


def test_a_norm_that_stays_for_another_size_says_at_which():
    net = in_float64(Net(BY_SIZE["norm of one sample only"]))
    (left,) = fold(net, rand(4, 3, 16, 16)).left
    assert re.match(
        r"With the example inputs it could go, but not with inputs of shape \(1, 3, \d+, \d+\)\. conv runs, and its "
        r"output does not go through this norm\.",
        left.reason,
    )


# -- what was not seen -------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 64, 2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).flatten(1))


def test_a_model_that_runs_at_one_size_is_folded_and_told_so():
    net = in_float64(Fixed())
    result = fold(net, rand(2, 3, 8, 8))
    assert [norm.norm for norm in result.folded] == ["bn"]
    (warning,) = result.warnings
    assert "runs at one size only of axes 2 and 3 of its input of shape (2, 3, 8, 8)" in warning
    assert result.to_dict()["warnings"] == [warning]
    assert warning in " ".join(str(result).split()) or "Not seen" in str(result)
    assert worst(net, result.model, [(rand(n, 3, 8, 8),) for n in (1, 2, 5)]) < 1e-9


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.scaled = False

    def forward(self, x, features=False, kind=None):
        h = self.conv(x)
        if features:
            return h
        if kind is not None and kind not in ("a", "b"):
            raise ValueError(kind)
        if self.scaled:
            h = 2 * h
        if self.training:
            h = h + 1
        h = h if kind != "b" else -h
        return self.fc(F.relu(self.bn(h)).mean((2, 3)))


def test_code_that_no_run_reached_is_named():
    (warning,) = fold(in_float64(Flagged()), rand(2, 3, 8, 8)).warnings
    assert re.search(r"test_fold_sizes\.py:\d+ \(`features`\)", warning)
    assert "`kind != 'b'`" in warning
    assert "scaled" not in warning
    assert "training" not in warning
    assert "kind is not None" not in warning


def test_further_examples_show_what_the_first_does_not():
    net, x = in_float64(Flagged()), rand(2, 3, 8, 8)
    result = fold(net, x, examples=[(x, False, "a"), {"x": x, "kind": "b"}])
    assert [norm.norm for norm in result.folded] == []
    assert "but not with examples[1]" in result.left[0].reason
    result = fold(net, x, examples=[(x, True)])
    assert "but not with examples[0]" in result.left[0].reason
    assert not any("`features`" in warning for warning in result.warnings)
    with torch.no_grad():
        assert torch.equal(result.model(x, features=True), net(x, features=True))


def test_examples_that_do_not_run_or_are_none_are_refused():
    net, x = in_float64(Flagged()), rand(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"fails on examples\[0\]"):
        fold(net, x, examples=[(x, False, "c")])
    with pytest.raises(ArgumentTypeError, match=r"examples: expected a list of inputs.*got a Tensor"):
        fold(net, x, examples=x)


class Domains(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x, domain: bool = False):
        return self.bns[int(domain)](self.convs[int(domain)](x))


def test_norms_that_only_a_further_example_reaches_are_folded_too():
    net, x = in_float64(Domains()), rand(2, 3, 8, 8)
    result = fold(net, x, examples=[(x, True)])
    assert sorted(norm.norm for norm in result.folded) == ["bns.0", "bns.1"]
    assert worst(net, result.model, [(x, False), (x, True), (rand(1, 3, 9, 5), True)]) < 1e-9


# -- several inputs, sequences -----------------------------------------------------------------------------------------


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.bn = nn.Embedding(11, 6), nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6)

    def forward(self, tokens, mask):
        h = self.bn(self.conv(self.embed(tokens).transpose(1, 2)))
        return h * mask.unsqueeze(1)


def test_inputs_that_share_a_size_change_together():
    net = in_float64(Sequence())
    tokens, mask = torch.arange(20).reshape(2, 10) % 11, torch.ones(2, 10, dtype=torch.bool)
    result = fold(net, (tokens, mask))
    assert [norm.norm for norm in result.folded] == ["bn"]
    assert result.warnings == []
    shapes = [re.findall(r"\((\d+), (\d+)\)", size) for size in result.sizes[1:]]
    assert all(one == other for one, other in shapes)
    assert {int(batch) for (batch, _), _ in shapes} >= {1, 3}
    assert any(int(length) % 2 for (_, length), _ in shapes)


def test_an_input_normalization_before_a_pad_to_a_multiple_is_refused():
    net = in_float64(Net(lambda n, x: n.out(n.conv(F.pad(x, (0, -x.shape[-1] % 32, 0, -x.shape[-2] % 32))))))
    with pytest.raises(StateError, match="the normalization of the input cannot be folded"):
        fold(net, rand(2, 3, 32, 32).abs(), input_mean=[0.4, 0.5, 0.6], input_std=0.25)


class Draws(nn.Module):
    """Adds what stands before the norm in a part of its calls, by the draw of torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.bn.running_mean.fill_(0.3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + (y if torch.rand(()) < 0.5 else 0)


def test_runs_draw_different_random_numbers() -> None:
    torch.manual_seed(0)
    result = fold(Draws().eval(), torch.randn(2, 3, 8, 8))
    assert not result.folded
