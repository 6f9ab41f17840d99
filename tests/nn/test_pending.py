"""A tensor that waits behaves as the one it stands for, and what follows a norm is computed in one call."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import batchnorm
from batchnorm.errors import ShapeError, StateError
from batchnorm.kernels.activation import ACTIVATIONS
from batchnorm.nn import BatchNorm1d, BatchNorm2d, freeze, unfreeze
from batchnorm.nn import pending as pending_module
from batchnorm.nn.pending import Pending

pytestmark = pytest.mark.usefixtures("deferring")

FUNCTIONS = {
    "F.relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "Tensor.relu": (Tensor.relu, "relu"),
    "nn.ReLU": (nn.ReLU(), "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "Tensor.relu_": (Tensor.relu_, "relu"),
    "nn.ReLU(inplace)": (nn.ReLU(inplace=True), "relu"),
    "nn.LeakyReLU": (nn.LeakyReLU(), "leaky_relu"),
    "nn.LeakyReLU(inplace)": (nn.LeakyReLU(inplace=True), "leaky_relu"),
    "F.leaky_relu": (F.leaky_relu, "leaky_relu"),
    "F.leaky_relu_": (F.leaky_relu_, "leaky_relu"),
    "nn.LeakyReLU(0.2)": (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
    "F.leaky_relu(0.1) by position": (lambda x: F.leaky_relu(x, 0.1, True), "leaky_relu(0.1)"),
    "nn.ReLU6": (nn.ReLU6(), "relu6"),
    "nn.ReLU6(inplace)": (nn.ReLU6(inplace=True), "relu6"),
    "F.relu6": (F.relu6, "relu6"),
    "F.hardtanh(0, 6)": (lambda x: F.hardtanh(x, 0, 6), "relu6"),
    "nn.Hardswish": (nn.Hardswish(), "hardswish"),
    "nn.Hardswish(inplace)": (nn.Hardswish(inplace=True), "hardswish"),
    "nn.SiLU": (nn.SiLU(), "silu"),
    "nn.SiLU(inplace)": (nn.SiLU(inplace=True), "silu"),
    "nn.Sigmoid": (nn.Sigmoid(), "sigmoid"),
    "F.sigmoid": (F.sigmoid, "sigmoid"),
    "torch.sigmoid_": (torch.sigmoid_, "sigmoid"),
    "nn.Tanh": (nn.Tanh(), "tanh"),
    "F.tanh": (F.tanh, "tanh"),
    "Tensor.tanh_": (Tensor.tanh_, "tanh"),
    "nn.GELU": (nn.GELU(), "gelu"),
}
OTHERS = {
    "slope that is a tensor": lambda x: torch.where(x > 0, x, 0.2 * x),
    "cuts": nn.Hardtanh(-1, 1),
    "gelu by tanh": nn.GELU(approximate="tanh"),
    "elu": nn.ELU(inplace=True),
    "softmax": nn.Softmax(1),
    "list": lambda x: torch.cat([x, x + 1]),
}


@pytest.fixture
def computed(monkeypatch):
    """Return the list of (activation, with residual) that layers are asked to compute."""
    seen: list[tuple[str | None, bool]] = []
    original = pending_module._Source.compute

    def spy(source, activation, residual):
        seen.append((activation, residual is not None))
        return original(source, activation, residual)

    monkeypatch.setattr(pending_module._Source, "compute", spy)
    return seen


def pair(training=True, **options):
    """Return a layer and its marked twin."""
    torch.manual_seed(0)
    plain = BatchNorm2d(3, **options).train(training)
    if plain.weight is not None:
        nn.init.uniform_(plain.weight, 0.5, 2)
    plain.running_mean.uniform_()
    fused = copy.deepcopy(plain)
    fused.fused = True
    return plain, fused


def inputs(*, grad=True):
    generator = torch.Generator().manual_seed(1)
    x, r = (torch.randn(4, 3, 5, 2, generator=generator) for _ in range(2))
    return x.requires_grad_(grad), r.requires_grad_(grad)


def outcome(layer, function):
    """Return the output, the gradients of input, residual, weight and bias, and the buffers."""
    x, r = inputs()
    y = function(layer(x), r)
    assert type(y) is Tensor
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    gradients = torch.autograd.grad((y * weights).sum(), [x, r, layer.weight, layer.bias], allow_unused=True)
    return [y.detach(), *gradients, *(b.clone() for b in layer.buffers())]


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


ADDITIONS = {
    "none": lambda y, r: y,
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "torch.add": torch.add,
    "by name": lambda y, r: y.add(other=r),
    "y += r": lambda y, r: y.__iadd__(r),
    "add_": lambda y, r: y.add_(r),
}


@pytest.mark.every(6)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("add", ADDITIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_activation_is_computed_with_its_norm_in_one_call(name, add, training, computed):
    function, activation = FUNCTIONS[name]

    def whole(y, r):
        return function(ADDITIONS[add](y, r))

    plain, fused = pair(training)
    assert_same(outcome(plain, whole), outcome(fused, whole))
    assert computed == [(activation, add != "none")]


def test_every_activation_of_the_library_is_among_them():
    assert {activation for _, activation in FUNCTIONS.values()} >= set(ACTIVATIONS)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("add", ADDITIONS)
def test_other_functions_get_what_the_norm_returns(name, add):
    def whole(y, r):
        return OTHERS[name](ADDITIONS[add](y, r))

    plain, fused = pair()
    assert_same(outcome(plain, whole), outcome(fused, whole))


@pytest.mark.parametrize("function", [
    lambda y, r: torch.relu(torch.add(y, r, alpha=2)),
    lambda y, r: torch.relu(y + 1),
    lambda y, r: torch.relu(1 + y),
    lambda y, r: torch.relu(y + r[:1]),
    lambda y, r: torch.relu(y + r.double()),
    lambda y, r: torch.relu(y + r + r),
    lambda y, r: torch.relu(y + y),
    lambda y, r: torch.relu(y.add_(y)),
    lambda y, r: torch.relu(y - r),
    lambda y, r: torch.relu((r * 1).add_(y)),
    lambda y, r: torch.add(y, r, out=torch.empty(0)) if not torch.is_grad_enabled() else torch.relu(y.flatten(1)),
])  # fmt: skip
def test_other_additions_are_left_to_torch(function):
    plain, fused = pair()
    assert_same(outcome(plain, function), outcome(fused, function))


def test_questions_about_shape_and_type_compute_nothing(computed):
    _, fused = pair()
    x, r = inputs()
    y = fused(x)
    assert isinstance(y, Pending)
    assert y.shape == x.shape == (y + r).size()
    assert (y.dim(), y.ndim, len(y), y.numel(), y.size(1)) == (4, 4, 4, 120, 3)
    assert (y.dtype, y.device, y.layout) == (x.dtype, x.device, x.layout)
    assert y.is_floating_point()
    assert y.requires_grad
    assert not computed
    assert y.is_contiguous()  # nobody but the kernel knows
    assert computed == [(None, False)]
    with torch.no_grad():
        z = fused(x)
        assert not z.requires_grad
        assert not (z + r).requires_grad
    assert computed == [(None, False)]


def test_two_readers_get_one_tensor_and_the_statistics_one_step(computed):
    plain, fused = pair()
    x, _ = inputs()
    y, z = fused(x), plain(x)
    assert torch.equal(y.sum(), z.sum())
    assert y[0].data_ptr() == y.detach().data_ptr()
    assert torch.equal(y.relu(), z.relu())
    assert y.grad_fn is y.grad_fn
    assert computed == [(None, False)]
    assert fused.num_batches_tracked == 1
    assert_same(list(plain.buffers()), list(fused.buffers()))


def test_a_reader_after_the_activation_costs_a_second_call_but_no_second_step():
    plain, fused = pair(momentum=None)
    x, _ = inputs()
    y, z = fused(x), plain(x)
    for function in (torch.relu, torch.tanh, torch.relu, torch.neg):
        assert torch.equal(function(y), function(z))
    assert_same(list(plain.buffers()), list(fused.buffers()))


@settings(max_examples=5 * settings.default.max_examples)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["relu", "relu_", "tanh", "add", "radd", "add_", "into", "into_", "mul_", "neg", "read", "view_", "set"]
            ),
            st.integers(0, 3),
            st.integers(0, 3),
        ),
        max_size=7,
    ),
    st.booleans(),
)
def test_any_sequence_of_steps_gives_what_it_gives_without_waiting(steps, training):
    def final(layer):
        x, r = inputs()
        at = [layer(x), r * 1, layer(x * 2) if not training else r * 2, r * 3]
        kept = list(at)
        for step, i, j in steps:
            a, b = at[i], at[j]
            if step in ("relu", "relu_", "tanh", "neg"):
                at[i] = getattr(torch, step)(a)
            elif step == "add":
                at[i] = a + b
            elif step == "radd":
                at[i] = b + a
            elif step == "add_":
                a.add_(b)
            elif step == "into":
                at[i] += b
            elif step == "into_":
                at[j].add_(a)
            elif step == "mul_":
                a.mul_(2)
            elif step == "read":
                a.sum()
            elif step == "view_":
                a[0].mul_(3)
            else:
                a.copy_(b)
        values = [t.detach().clone() for t in (*at, *kept)]
        try:
            total = sum((t * t).sum() for t in at)
            gradients = torch.autograd.grad(total, [x, r, layer.weight, layer.bias], allow_unused=True)
        except RuntimeError as error:
            gradients = [torch.tensor("modified by an inplace operation" in str(error))]
        return [*values, *gradients], [b.clone() for b in layer.buffers()]

    plain, fused = pair(training)
    try:
        expected = final(plain)
    except RuntimeError:
        return
    try:
        values, buffers = final(fused)
    except StateError as error:  # a residual that was written into: said, not computed wrong
        if "written into in place" not in str(error):
            raise
        return
    assert len(values) == len(expected[0])
    for a, b in zip(values, expected[0], strict=True):
        # what is computed twice has its gradient in two parts
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert_same(buffers, expected[1])


# -- writes in between -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["input", "weight", "bias", "running_mean", "running_var"])
def test_what_was_written_into_before_the_read_is_named(what):
    _, fused = pair(training=what.startswith("running"))
    fused.layer_name = "stem.bn"
    x, _ = inputs(grad=False)
    y = fused(x)
    with torch.no_grad():
        (x if what == "input" else getattr(fused, what)).mul_(2)
    for read in (torch.relu, torch.neg):
        with pytest.raises(StateError, match=rf"^stem\.bn: its {what} was written into in place before"):
            read(y)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_has_lost_its_memory_is_named(what):
    _, fused = pair()
    x, _ = inputs(grad=False)
    y = fused(x)
    (x if what == "input" else fused.weight).untyped_storage().resize_(0)
    with pytest.raises(StateError, match=f"the memory of its {what} was given back"):
        torch.relu(y)


def test_a_residual_that_was_written_into_is_named():
    _, fused = pair()
    x, r = inputs(grad=False)
    for add in (torch.add, Tensor.add_):
        for read in (torch.relu, torch.neg):
            y = add(fused(x), r)
            r.mul_(2)
            with pytest.raises(StateError, match="the tensor that was added to its output was written into"):
                read(y)


@pytest.mark.parametrize("order", ["01", "10", "1", "0", ""])
def test_steps_are_taken_in_the_order_of_the_calls(order):
    """Whatever is read, and when: of two calls, of one whose name is given away, of a shape."""
    plain, fused = pair()
    results = []
    for layer in (plain, fused):
        x, r = inputs(grad=False)
        called = [layer(x), layer(r * 3 + 1)]
        results.append([torch.relu(called[int(which)]) for which in order])
        del called
        y = layer(x * 2)
        y = layer(r + 5)
        assert y.shape == x.shape
        del y
        results[-1] += [b.clone() for b in layer.buffers()]
    assert fused.num_batches_tracked == 4
    assert_same(*results)


def test_a_branch_that_drops_the_output_takes_the_step(recwarn):
    plain, fused = pair()
    for layer in (plain, fused):
        generator = torch.Generator().manual_seed(0)
        for k in range(20):
            y = layer(torch.randn(4, 3, 5, 2, generator=generator))
            if k % 2:
                torch.relu(y)
        del y
    assert fused.num_batches_tracked == 20
    assert_same(list(plain.buffers()), list(fused.buffers()))
    assert not recwarn.list


def test_no_step_without_need():
    """Dropped outputs change nothing in evaluation, when a checkpoint runs again, or where no statistics are kept."""
    plain, fused = pair(training=False)
    fused(inputs()[0])
    assert_same(list(plain.buffers()), list(fused.buffers()))
    untracked = BatchNorm2d(3, track_running_stats=False)
    untracked.fused = True
    assert isinstance(untracked(inputs()[0]), Pending)
    assert not list(untracked.buffers())
    _, fused = pair()
    x, _ = inputs()
    for reentrant in (True, False):
        y = checkpoint(lambda v: (fused(v), v * 2)[1], x, use_reentrant=reentrant)
        y.sum().backward()
    assert fused.num_batches_tracked == 2


def test_a_dropped_output_that_cannot_be_computed_any_more_is_told():
    _, fused = pair()
    before = [b.clone() for b in fused.buffers()]
    x, _ = inputs(grad=False)
    y = fused(x)
    x.mul_(2)
    with pytest.warns(RuntimeWarning, match=r"its input was written into in place .* took no step"):
        del y
    assert_same(before, list(fused.buffers()))


def test_an_error_of_the_model_leaves_a_restored_model_alone():
    """convert(fuse=True) compares in several modes; a pass that fails must not step after the buffers are put back."""

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.bn(x)
            if self.training:
                raise ValueError("no training here")
            return torch.relu(y)

    model = Failing().eval()
    before = [b.clone() for b in model.buffers()]
    result = batchnorm.convert(model, torch.randn(4, 3, 5, 5), fuse=True)
    assert len(result.fused) == 1
    assert_same(before, list(result.model.buffers()))


def test_threads_train_one_model():
    """Each thread's calls and reads interleave with the others' steps: all of them arrive, and nobody is refused."""
    _, fused = pair()
    x, _ = inputs(grad=False)
    errors: list[BaseException] = []
    turn = threading.Barrier(2, timeout=250)  # far more than a busy machine needs; less than a test may take

    def work():
        try:
            for k in range(20):
                y = fused(x)
                if k % 2:
                    turn.wait()  # both have called, neither has read
                torch.relu(y)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    _, alone = pair()
    for _ in range(40):
        torch.relu(alone(x))
    torch.testing.assert_close(fused.running_mean, alone.running_mean, rtol=1e-3, atol=1e-3)


def test_the_layer_may_change_its_mode_and_tensors_in_between():
    plain, fused = pair()
    x, _ = inputs()
    other = {"weight": torch.zeros(3), "bias": torch.ones(3)}
    y = torch.func.functional_call(fused, other, (x,))
    z = torch.func.functional_call(plain, other, (x,))
    fused.eval()
    fused.momentum = 0.9
    assert torch.equal(torch.relu(y), torch.relu(z))
    assert_same(list(plain.buffers()), list(fused.buffers()))


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_are_recorded_as_they_were_when_the_layer_was_called():
    plain, fused = pair(training=False)
    x, r = inputs()
    for function in (torch.relu, torch.neg, lambda y: torch.relu(y + r)):
        grads = []
        for layer in (plain, fused):
            with torch.no_grad():
                y = layer(x)
            out = function(y)
            grads.append((out.requires_grad, torch.autograd.grad(out.sum(), r)[0] if out.requires_grad else None))
        assert grads[0][0] == grads[1][0]
        assert_same([grads[0][1]], [grads[1][1]])
    y = fused(x)
    with torch.no_grad():
        assert not torch.relu(y).requires_grad
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    with torch.inference_mode():
        assert fused(x).relu().is_inference()
        y = layer(r)
    assert torch.equal(torch.relu(y.clone()), torch.relu(plain(r)))


class Twice(torch.autograd.Function):
    """An activation with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def test_an_autograd_function_would_lose_the_gradient_and_is_refused():
    plain, fused = pair()
    fused.layer_name = "bn"
    x, r = inputs()
    for y in (fused(x), fused(x) + r):
        with pytest.raises(StateError, match=r"^bn: .*torch\.autograd\.Function"):
            Twice.apply(y)
    y = fused(x)
    y.sum()  # computed already, and still no way for the gradient
    with pytest.raises(StateError, match=r"torch\.autograd\.Function"):
        Twice.apply(y)
    with torch.no_grad():
        assert torch.equal(Twice.apply(fused(x)), Twice.apply(plain(x)))


def test_second_derivatives():
    plain, fused = (layer.double() for layer in pair())
    x, r = (t.detach().double().requires_grad_() for t in inputs())
    hessians = []
    for layer in (plain, fused):
        (g,) = torch.autograd.grad(torch.tanh(layer(x) + r).sum(), x, create_graph=True)
        hessians.append(torch.autograd.grad(g.square().sum(), [x, r]))
    assert_same(*hessians)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpoints_around_norm_and_activation(reentrant, early_stop):
    def run(layer):
        x, r = inputs()
        with set_checkpoint_early_stop(early_stop):
            y = checkpoint(lambda a, b: torch.relu(layer(a) + b), x, r, use_reentrant=reentrant)
            y.square().sum().backward()
        return [y.detach(), x.grad, r.grad, layer.weight.grad]

    plain, fused = pair()
    assert_same(run(plain), run(fused))
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(plain, name), getattr(fused, name))


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_checkpoint_that_begins_with_the_activation(early_stop):
    def run(layer):
        x, r = inputs()
        with set_checkpoint_early_stop(early_stop):
            y = checkpoint(lambda y: torch.sin(torch.relu(y + r)), layer(x), use_reentrant=False)
            y.square().sum().backward()
        return [y.detach(), x.grad, r.grad, layer.weight.grad]

    plain, fused = pair()
    for a, b in zip(run(plain), run(fused), strict=True):
        torch.testing.assert_close(a, b)
    assert fused.num_batches_tracked == 1
    assert_same(list(plain.buffers()), list(fused.buffers()))
    with pytest.raises(StateError, match="use_reentrant=False"):
        checkpoint(torch.relu, fused(inputs()[0]), use_reentrant=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_ends_with_the_norm(reentrant):
    def run(layer):
        x, r = inputs()
        torch.relu(checkpoint(lambda x: layer(x.sin()), x, use_reentrant=reentrant) + r).square().sum().backward()
        return [x.grad, r.grad, layer.weight.grad]

    assert_same(*map(run, pair()))


# -- who else looks ----------------------------------------------------------------------------------------------------


def test_whoever_looks_at_the_layer_or_the_operators_meets_a_plain_layer():
    _, fused = pair(training=False)
    x, _ = inputs(grad=False)

    def is_plain(value=x):
        return not isinstance(fused(value), Pending)

    assert not is_plain()
    for register in (
        lambda: fused.register_forward_hook(lambda *_: None),
        lambda: fused.register_full_backward_hook(lambda *_: None),
        lambda: nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
    ):
        hook = register()
        try:
            assert is_plain()
        finally:
            hook.remove()
        assert not is_plain()
    with torch.device("cpu"):  # a function mode
        assert is_plain()
    with FlopCounterMode(display=False):  # a dispatch mode
        assert is_plain()
    with torch.autograd.forward_ad.dual_level():
        assert is_plain(torch.autograd.forward_ad.make_dual(x, x))
    assert torch.func.vmap(lambda a: fused(a).relu())(x[None]).shape == (1, *x.shape)
    assert is_plain(x.as_subclass(type("Mine", (Tensor,), {})))
    assert type(fused(x, residual=x)) is Tensor
    assert type(fused(x, mask=torch.ones(4, 5, 2, dtype=torch.bool))) is Tensor
    with torch.inference_mode():
        assert is_plain(x + 1)
    freeze(fused)
    assert is_plain()
    unfreeze(fused)
    assert not is_plain()
    nn.utils.parametrize.register_parametrization(fused, "weight", nn.Identity())
    assert is_plain()


def test_hooks_of_a_module_around_it():
    plain, fused = (nn.Sequential(layer) for layer in pair())
    x, _ = inputs()
    for module in (plain, fused):
        module.register_forward_hook(lambda module, args, y: (y, y.mean()))
    (y, m), (z, n) = plain(x), fused(x)
    assert torch.equal(m, n)
    assert torch.equal(y.relu(), z.relu())
    fused = nn.Sequential(pair()[1])
    fused.register_full_backward_hook(lambda *_: None)
    with pytest.raises(StateError, match="of a module's backward hook"):
        fused(x).relu()


def test_code_past_the_protocol_meets_an_error():
    _, fused = pair(training=False)
    y = fused(inputs()[0])
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(StateError, match=r"aten\.neg\.default reads the out"):
        torch.neg(y)


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.sweep), "aot_eager"])
def test_compiled_whole_and_in_pieces(backend):
    plain, fused = pair()
    x, r = inputs()
    torch.compiler.reset()
    whole = torch.compile(lambda x, r: torch.relu(fused(x) + r), backend=backend, fullgraph=True)
    assert torch.equal(whole(x, r), torch.relu(plain(x) + r))
    assert_same(list(plain.buffers()), list(fused.buffers()))
    piece = torch.compile(lambda y, r: torch.sin(torch.relu(y + r)), backend=backend)
    y, z = piece(fused(x), r), torch.sin(torch.relu(plain(x) + r))
    assert torch.equal(y, z)
    assert_same(torch.autograd.grad(y.sum(), [x, r]), torch.autograd.grad(z.sum(), [x, r]))
    assert_same(list(plain.buffers()), list(fused.buffers()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_exported_traced_and_scripted():
    plain, fused = pair(training=False)
    model = nn.Sequential(fused, nn.ReLU()).eval()
    x, _ = inputs(grad=False)
    expected = plain(x).relu()
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)
    assert torch.equal(torch.jit.script(model)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    assert torch.equal(torch.jit.script(nn.ReLU())(fused(x)), expected)


# -- as an object ------------------------------------------------------------------------------------------------------


def test_the_mark_is_copied_and_pickled_and_is_no_state():
    plain, fused = pair()
    assert plain.state_dict().keys() == fused.state_dict().keys()
    assert "fused=True" in repr(fused)
    x, _ = inputs()
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.copy(fused)):
        assert isinstance(copied(x), Pending)


def test_a_waiting_tensor_is_copied_and_saved_as_the_one_it_stands_for():
    plain, fused = pair(training=False)
    x, _ = inputs(grad=False)
    expected = plain.requires_grad_(False)(x)
    fused.requires_grad_(False)
    file = io.BytesIO()
    torch.save({"y": fused(x)}, file)
    file.seek(0)
    for y in (
        pickle.loads(pickle.dumps(fused(x))),
        copy.copy(fused(x)),
        copy.deepcopy(fused(x)),
        torch.load(file)["y"],
        torch.from_numpy(fused(x).numpy()),
        torch.tensor(fused(x).tolist()),
        torch.from_dlpack(fused(x)),
    ):
        assert type(y) is Tensor
        assert torch.equal(y, expected)
    assert repr(fused(x)) == repr(expected)
    y = fused(x)
    assert {y: 1}[y] == 1
    y.requires_grad_()
    assert y.requires_grad
    y.note = 1
    y.square().sum().backward()
    assert torch.equal(y.grad, 2 * expected)


def test_wrong_inputs_are_refused_at_the_call():
    layer = BatchNorm1d(3)
    layer.fused = True
    with pytest.raises(ShapeError, match=r"BatchNorm1d\(3\): expected 2D or 3D"):
        layer(torch.randn(2, 3, 4, 4))
    with pytest.raises(ShapeError, match="training needs at least 2 values"):
        torch.relu(layer(torch.randn(1, 3)))
    assert layer.num_batches_tracked == 0


def test_threads_share_a_layer():
    plain, fused = pair(training=False)
    x, r = inputs(grad=False)
    expected = torch.relu(plain(x) + r)
    results: list[Tensor] = []

    def work():
        results.extend(torch.relu(fused(x) + r) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 100
    assert all(torch.equal(y, expected) for y in results)


def test_autocast_and_half_precision():
    plain, fused = pair()
    x, r = (t.detach().bfloat16() for t in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.relu(fused(x) + r), torch.relu(plain(x) + r))
        assert torch.equal(torch.relu(fused(x.float()) + r), torch.relu(plain(x.float()) + r))


# -- threads and processes ---------------------------------------------------------------------------------------------


def test_an_output_that_several_threads_read_takes_one_step():
    """They are let go together, many times: each of the threads finds the output waiting."""
    _, fused = pair()
    x = torch.randn(16, 3, 64, 64)
    for _ in range(20):
        y = fused(x)
        turn = threading.Barrier(4, timeout=200)

        def read(y=y, turn=turn):
            turn.wait()
            y * 2

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert fused.num_batches_tracked == 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_does_not_have():
    _, fused = pair()
    x, _ = inputs(grad=False)
    torch.relu(fused(x))
    steps = pending_module._steps_of(fused)
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with steps._turn, pending_module._steps_lock:
            held.set()
            go_on.wait(200)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(200)
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # a child that waits for ever is ended by it, and that is not status 0
        torch.relu(fused(x))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert status == 0
