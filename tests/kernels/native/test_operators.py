"""The operators that compilers capture, and whoever else looks at operators: modes, tracers, transforms."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm.functional import active_backend, batch_norm, use_backend
from batchnorm.functional.operator import batch_norm_operator
from batchnorm.kernels.native import calls, missing, operators
from batchnorm.kernels.native.backend import _EVALUATION_FUSED, _PLANES, SMALLEST

pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

C = 16
# from here on planes are the kernels' in training, and with something fused in evaluation too
N = max(SMALLEST, _PLANES, _EVALUATION_FUSED) // (C * 16)
LARGE, SMALL = (N, C, 16), (2, C, 16)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "planes": lambda make, *shape: make(*shape),
    "rows": lambda make, *shape: channels_last(make(*shape)),
    "slice of the batch": lambda make, n, *rest: make(2 * n, *rest)[::2],
    "slice of the space": lambda make, *shape: make(*shape[:-1], 2 * shape[-1])[..., ::2],
    "space reversed": lambda make, n, c, h, w: make(n, c, w, h).transpose(2, 3),
    "batch and channels swapped": lambda make, n, c, *space: make(c, n, *space).transpose(0, 1),
    "sliding windows": lambda make, n, c, h, w: make(n, c + h * w - 1).unfold(1, h * w, 1).unflatten(2, (h, w)),
    "expanded": lambda make, n, *rest: make(1, *rest).expand(n, *rest),
}


@pytest.mark.every(6)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_operator_is_what_it_says(layout, dtype):
    """Schema, shapes and strides for tensors without data, and no write into an argument."""

    makers = [partial(randn, seed=k, dtype=dtype) for k in range(3)]
    x, residual, dy = (LAYOUTS[layout](make, 3, 5, 4, 6) for make in makers)
    weight, bias = (randn(5, seed=k, dtype=calls.compute_dtype(dtype)) for k in (3, 4))
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    check = lambda op, args: torch.library.opcheck(op, args, test_utils=utilities)  # noqa: E731
    check(operators.moments, (x, 1e-5))
    statistics = operators.moments(x, 1e-5)
    for r, activation in [(None, None), (residual, "gelu"), (residual, None), (None, "relu")]:
        affine = (weight, bias, r)
        check(operators.normalize, (x, *affine, statistics, activation))
        check(operators.train_forward, (x, *affine, 1e-5, activation))
        backward = (dy, x, *affine, statistics, activation)
        check(operators.backward_reduce, backward)
        check(operators.train_backward, backward)
        for sums in (None, operators.backward_reduce(*backward)):
            check(operators.backward_input, (*backward, sums, 72.0))


def test_operators_are_those_that_are_documented():
    names = {name for name in dir(operators) if isinstance(getattr(operators, name), torch._ops.OpOverload)}
    assert names == set(operators.__all__)
    for name in names:
        assert getattr(operators, name)._schema.name == f"batchnorm::native_{name}"
        assert torch.Tag.pt2_compliant_tag in getattr(operators, name).tags


# -- compiled ----------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A norm between cheap operators; in place where it may be."""

    def __init__(self, activation=None, residual=False, inplace=False):
        super().__init__()
        self.norm = batchnorm.nn.BatchNorm1d(C, activation=activation, inplace=inplace)
        self.residual = residual
        torch.nn.init.normal_(self.norm.weight, 1.0, 0.2, generator=torch.Generator().manual_seed(5))

    def forward(self, x):
        h = x * 2 + 1
        return self.norm(h, residual=x if self.residual else None) * 3


def step(model, x, function=None):
    """Return output, gradients and buffers of one training step, or one evaluation, of a copy of the model."""
    model = copy.deepcopy(model)
    function = (function or (lambda m: m))(model)
    x = x.clone().requires_grad_()
    y = function(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(got, expected, x, what=""):
    """Two float32 evaluations of the same formulas, whose sums are over x.numel()/C values of size up to 20."""
    for a, b in zip(got, expected, strict=True):
        eps, size = torch.finfo(torch.float32).eps, max(1.0, b.abs().max().item())
        assert a.dtype == b.dtype, what
        assert (a.double() - b.double()).abs().max() <= 64 * eps * size * (x.numel() / C) ** 0.5, what


class Variants(torch.nn.Module):
    """A block of every kind side by side, each with an input of its own: compiled and exported once for all of them."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleDict()
        for activation, residual, inplace in product((None, "relu", "gelu"), (False, True), (False, True)):
            self.blocks[f"{activation}, residual: {residual}, inplace: {inplace}"] = Block(
                activation, residual, inplace
            )

    def inputs(self, shape):
        return [randn(*shape, seed=seed) for seed in range(len(self.blocks))]

    def forward(self, xs):
        return {name: block(x) for (name, block), x in zip(self.blocks.items(), xs, strict=True)}


def steps(model, xs, function=None):
    """Return what ``step`` does, for each block by its name, of one call of them all."""
    model = copy.deepcopy(model)
    function = (function or (lambda m: m))(model)
    xs = [x.clone().requires_grad_() for x in xs]
    ys = function(xs)
    sum((y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() for y in ys.values()).backward()
    return {
        name: [y, x.grad, *(p.grad for p in model.blocks[name].parameters()), *model.blocks[name].buffers()]
        for (name, y), x in zip(ys.items(), xs, strict=True)
    }


def assert_each_same(got, expected, xs):
    assert got.keys() == expected.keys()
    for (name, values), x in zip(expected.items(), xs, strict=True):
        assert_same(got[name], values, x, name)


@pytest.mark.every(2)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["above the threshold", "below"])
def test_compiled_layers_equal_eager_ones(shape, training):
    torch._dynamo.reset()
    model = Variants().train(training)
    xs = model.inputs(shape)
    got = steps(model, xs, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"))
    assert_each_same(got, steps(model, xs), xs)


@pytest.mark.timeout(240)
def test_generated_code_equals_eager():
    torch._dynamo.reset()
    model, x = Block("gelu", True), randn(*LARGE)
    assert_same(step(model, x, lambda m: torch.compile(m, fullgraph=True)), step(model, x), x)


def test_shapes_may_change_across_the_threshold():
    torch._dynamo.reset()
    seen = []

    def look(graph, inputs):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    model = Block("silu").eval()
    function = torch.compile(model, fullgraph=True, backend=look, dynamic=True)
    for n in (N, N + 3, 2 * N, 2, 3):
        x = randn(n, C, 16)
        with torch.no_grad():
            assert_same([function(x)], [model(x)], x)
    assert len(seen) == 2  # one program above the threshold, one below
    assert batch_norm_operator in seen[0] or any("native" in str(t) for t in seen[0])
    assert F.batch_norm in seen[1]


def test_a_compiled_step_calls_the_native_operators():
    torch._dynamo.reset()
    seen = []

    def look(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    model, x = Block("gelu"), randn(*LARGE).requires_grad_()
    function = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    function(x).sum().backward()
    assert operators.train_forward in seen
    assert operators.train_backward in seen


# -- exported and scripted ---------------------------------------------------------------------------------------------


@pytest.mark.every(2)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["above the threshold", "below"])
def test_exported_programs_hold_torchs_operators_only(shape, training):
    model = Variants().train(training)
    xs = model.inputs(shape)
    program = torch.export.export(model, (xs,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert len(names) > len(xs)
    assert not [name for name in names if not name.startswith("aten.")]
    run, fresh = program.module(), copy.deepcopy(model)
    got, expected = run(xs), fresh(xs)
    assert_each_same({k: [y] for k, y in got.items()}, {k: [y] for k, y in expected.items()}, xs)
    for (name, a), b in zip(run.named_buffers(), fresh.buffers(), strict=True):
        assert_same([a], [b], xs[0], name)


def test_a_program_with_a_dynamic_batch_is_exported():
    model, x = Block("relu").eval(), randn(*LARGE)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=4 * N)},))
    for n in (3, 2 * N):
        v = randn(n, C, 16)
        assert_same([program.module()(v)], [model(v)], v)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("training", [True, False])
def test_traced_and_scripted_layers(training):
    x = randn(*LARGE)
    plain, full = Block().train(training), Block("gelu", True, True).train(training)
    for model in (plain, full):
        expected = copy.deepcopy(model)(x)
        traced = torch.jit.trace(copy.deepcopy(model), x, check_trace=False)
        assert "batchnorm::" not in str(traced.inlined_graph)
        assert_same([traced(x)], [expected if not training else copy.deepcopy(model)(x)], x)
    scripted = torch.jit.script(copy.deepcopy(plain.norm))
    assert_same([scripted(x)], [copy.deepcopy(plain.norm)(x)], x)


# -- transforms and modes ----------------------------------------------------------------------------------------------


def test_transforms_fall_back_to_torch():
    x, seen = randn(*LARGE), []

    def function(v):
        seen.append(active_backend(v, training=True))
        return batch_norm(v, None, None, training=True, activation="silu").square().sum()

    got = torch.func.grad(function)(x)
    h = x.clone().requires_grad_()
    with use_backend("torch"):
        (expected,) = torch.autograd.grad(batch_norm(h, None, None, training=True, activation="silu").square().sum(), h)
    assert_same([got], [expected], x)
    stacked = torch.stack([x, 2 * x])
    ys = torch.vmap(lambda v: batch_norm(v, None, None, training=True))(stacked)
    assert_same([ys], [torch.stack([F.batch_norm(v, None, None, training=True) for v in stacked])], x)
    _, tangent = torch.func.jvp(lambda v: batch_norm(v, None, None, training=True), (x,), (stacked[1],))
    _, expected = torch.func.jvp(lambda v: F.batch_norm(v, None, None, training=True), (x,), (stacked[1],))
    assert torch.equal(tangent, expected)
    assert seen == ["torch"]


def test_fake_tensors_have_shapes():
    with FakeTensorMode():
        model, x = Block("relu", True), torch.empty(*LARGE)
        y = model(x)
        y.sum().backward()
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert model.norm.weight.grad.shape == (C,)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_a_mode_sees_whole_operators_and_every_write(below, forced, inplace):
    """Torch's own operator, or ours where it is forced, whole below autograd; nothing is written behind its back."""
    seen, written = [], set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            for value, argument in zip(args, func._schema.arguments, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                    written.add(value.untyped_storage().data_ptr())
            if func is torch.ops.aten.native_batch_norm.default:  # its schema does not say so
                written.update(v.untyped_storage().data_ptr() for v in args[3:5])
            return func(*args, **(kwargs or {}))

    x, mean, variance = randn(*LARGE), torch.zeros(C), torch.ones(C)
    h, before = x.clone(), [mean.clone(), variance.clone()]
    guard = torch._C._AutoDispatchBelowAutograd if below else torch.no_grad
    with guard(), use_backend("native") if forced else nullcontext(), Seen():
        y = batch_norm(h, mean, variance, training=True, activation="relu", inplace=inplace)
    if below and forced:
        assert seen == [batch_norm_operator]
    elif below:
        # beside them only what looks at the running statistics
        assert [f for f in seen if "norm" in str(f) or "relu" in str(f)] == [
            torch.ops.aten.batch_norm.default,
            torch.ops.aten.relu.default,
        ]
        return  # the schema of aten::batch_norm does not say what it writes
    else:
        assert (operators.train_forward if forced else torch.ops.aten.native_batch_norm.default) in seen
    for tensor, old in zip((h, mean, variance), (x, *before), strict=True):
        assert torch.equal(tensor, old) or tensor.untyped_storage().data_ptr() in written
    assert not torch.equal(mean, before[0])
    assert_same([y], [torch.relu(F.batch_norm(x, None, None, training=True))], x)


# -- the verbs, on models whose norms are large enough -----------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(4, C, 3, padding=1)
        self.bn = torch.nn.BatchNorm1d(C)
        self.conv2 = torch.nn.Conv1d(C, C, 3, padding=1)
        self.bn2 = torch.nn.BatchNorm1d(C)

    def forward(self, x):
        h = torch.relu(self.bn(self.conv(x)))
        return torch.relu(self.bn2(self.conv2(h)) + h)


def trained(**options):
    torch.manual_seed(0)
    net, x = Net(), randn(N, 4, 16)
    for _ in range(3):
        net(x)
    return batchnorm.convert(net, **options).model, x


def test_folding_finds_and_removes_the_norms():
    net, x = trained()
    net.eval()
    result = batchnorm.fold(net, x)
    assert not [m for m in result.model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert_same([result.model(x)], [net(x)], x)


@pytest.mark.parametrize("fuse", [False, True])
def test_recalibration_is_exact(fuse):
    torch.manual_seed(0)
    net, x = Net().eval(), randn(3 * N, 4, 16)
    net = (batchnorm.convert(net, x, fuse=True) if fuse else batchnorm.convert(net)).model
    batches = [x[:N], x[N : 2 * N], x[2 * N :]]
    batchnorm.recalibrate(net, batches)
    h = net.conv(x).double()
    rows = h.movedim(1, -1).reshape(-1, C)
    # the convolution of a batch alone may round differently, and float32 buffers round once
    eps = 16 * torch.finfo(torch.float32).eps
    assert ((net.bn.running_mean - rows.mean(0)).abs() <= eps * rows.std(0)).all()
    assert ((net.bn.running_var - rows.var(0)).abs() <= eps * rows.var(0)).all()


@pytest.mark.parametrize("fuse", [False, True])
def test_watch_and_check_say_the_same_as_on_torch(fuse):
    net, x = trained()
    net.eval()
    if fuse:
        net = batchnorm.convert(net, x, fuse=True).model
    said = []
    for backend in (None, "torch"):
        with nullcontext() if backend is None else use_backend(backend):
            with batchnorm.watch(net) as watching:
                net(x)
            said.append((str(watching.result()), str(batchnorm.check(net, x))))
    assert said[0] == said[1]
    assert "bn2" in said[0][0]


def test_a_residual_that_still_waits_is_computed_first():
    x = randn(*LARGE)
    first, second = batchnorm.nn.BatchNorm1d(C), batchnorm.nn.BatchNorm1d(C, activation="relu")
    expected = second(x, residual=first(x * 2))
    first.fused = True
    pending = first(x * 2)
    assert type(pending) is not torch.Tensor
    assert_same([second(x, residual=pending)], [expected], x)


def test_fused_models_equal_plain_ones_in_training():
    net, x = trained()
    fused = batchnorm.convert(copy.deepcopy(net), x, fuse=True).model
    assert_same(step(fused, x), step(net, x), x)
