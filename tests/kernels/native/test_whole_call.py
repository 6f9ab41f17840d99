"""The short way through the native kernels: one autograd node, in place, and dx over the gradient that arrived."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.errors import InputError, StateError
from batchnorm.functional import batch_norm, use_backend
from batchnorm.kernels import ACTIVATIONS, Transform
from batchnorm.kernels.accuracy import ACCURACY, backward_bounds, train_forward_bound
from batchnorm.kernels.native import missing, whole_call
from batchnorm.kernels.native.backend import ALWAYS
from batchnorm.kernels.reference import REFERENCE, statistics
from batchnorm.moments import Moments

pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-5


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def native(*args, **kwargs):
    with use_backend("native"):
        return batch_norm(*args, **kwargs)


def reference(*args, **kwargs):
    with use_backend("reference"):
        return batch_norm(*args, **kwargs)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


# -- first and second derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS, "leaky_relu(0.2)"])
def test_gradients_are_those_of_the_reference(activation, training):
    """In float64, where no element of these lies within rounding of a kink; both sides have the bound's errors."""
    for layout, with_residual in product((lambda x: x, channels_last), (False, True)):
        x, dy, r = (layout(randn(7, 5, 9, seed=k, dtype=torch.float64)) for k in range(3))
        weight, bias = (randn(5, seed=k, dtype=torch.float64) for k in (3, 4))
        results = []
        for function in (native, reference):
            leaves = [v.clone().requires_grad_() for v in (x, weight, bias, *([r] if with_residual else []))]
            state = [torch.full((5,), v, dtype=torch.float64) for v in (0.25, 2.0)]
            residual = leaves[3] if with_residual else None
            y = function(*leaves[:1], *state, *leaves[1:3], training, activation=activation, residual=residual)
            gradients = torch.autograd.grad(y, leaves, dy)
            assert [g.dtype for g in gradients] == [v.dtype for v in leaves]
            results.append((gradients, state))
        mean, rstd = statistics(x, None, EPS) if training else (results[0][1][0], (results[0][1][1] + EPS).rsqrt())
        t = Transform(mean, rstd, weight, bias, r if with_residual else None, activation)
        bounds = backward_bounds(dy, x, t, results[1][0][0])
        room = (bounds.input, bounds.sum_dy_xhat, bounds.sum_dy, bounds.residual)
        for a, b, bound in zip(results[0][0], results[1][0], room, strict=False):
            assert ((a - b).abs() <= 2 * bound).all()
        for a, b in zip(results[0][1], results[1][1], strict=True):
            assert ((a - b).abs() <= 16 * torch.finfo(a.dtype).eps * b.abs()).all()


@pytest.mark.every(4)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "leaky_relu", "relu", "relu6", "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_second_derivatives(with_residual, activation, training):
    mean, variance = torch.zeros(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)
    for shape, layout in [
        ((3, 2, 4), lambda x: x),
        ((3, 2, 2, 2), channels_last),
        ((5, 2), lambda x: x.t().clone().t()),
    ]:
        inputs = [layout(randn(*shape, seed=k, dtype=torch.float64)) for k in range(2 if with_residual else 1)]
        inputs = [v.detach().requires_grad_() for v in (*inputs, randn(2, seed=5).double(), randn(2, seed=6).double())]

        def function(x, *rest):
            residual, weight, bias = rest if with_residual else (None, *rest)
            return native(
                x, mean.clone(), variance.clone(), weight, bias, training, activation=activation, residual=residual
            )

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)  # along one random direction


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "leaky_relu(0.2)", "relu6"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_gradients_unpack_the_bits_of_every_layout(dtype, activation):
    """The gradient with create_graph=True is the one without it; each way the bits are stored has its turn."""
    shapes = [(33, 5), (5, 33), (3, 4, 19), (2, 3, 5, 7), (6, 5, 1, 1), (2, 20, 3, 2)]
    layouts = [lambda x: x, channels_last, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)]
    for shape, layout in product(shapes, layouts):
        x, r, dy = (layout(randn(*shape, seed=k, dtype=dtype)).requires_grad_() for k in range(3))
        y = native(x, None, None, training=True, activation=activation, residual=r)
        plain = torch.autograd.grad(y, (x, r), dy, retain_graph=True)
        recorded = torch.autograd.grad(y, (x, r), dy, create_graph=True)
        t = Transform(*statistics(x.detach(), None, EPS), residual=r.detach(), activation=activation)
        bounds = backward_bounds(dy.detach(), x.detach(), t, recorded[0].detach())
        for a, b, bound in zip(plain, recorded, (bounds.input, bounds.residual), strict=True):
            assert ((a.double() - b.double()).abs() <= 2 * bound).all()  # either has its errors


@pytest.mark.parametrize("needs", [n for n in product((False, True), repeat=4) if any(n)])
@pytest.mark.parametrize("training", [True, False])
def test_any_part_of_the_gradients(training, needs):
    tensors = [randn(7, 5, 9, seed=k) for k in range(2)] + [randn(5, seed=k) for k in (2, 3)]
    dy = randn(7, 5, 9, seed=4)
    for activation in (None, "relu", "silu"):
        results = []
        for wanted in (needs, (True,) * 4):
            x, r, w, b = leaves = [v.clone().requires_grad_(n) for v, n in zip(tensors, wanted, strict=True)]
            y = native(x, torch.zeros(5), torch.ones(5), w, b, training, residual=r, activation=activation)
            y.backward(dy)
            results.append([v.grad for v in leaves])
        for part, whole, n in zip(*results, needs, strict=True):
            assert (part is not None) is n
            assert part is None or torch.equal(part, whole)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_weight_or_bias_alone(part, inplace):
    x, dy = randn(7, 5, 9), randn(7, 5, 9, seed=1)
    given = {part: randn(5, seed=2).abs() + 0.5}
    results = []
    for function in (native, reference):
        leaf = given[part].clone().requires_grad_()
        y = function(x.clone(), None, None, **{part: leaf}, training=True, inplace=inplace)
        results += torch.autograd.grad(y, leaf, dy)
    # sums of 63 products of size 1
    assert ((results[0] - results[1]).abs() <= 64 * 24 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_half_precision_with_parameters_of_either_kind(dtype, parameters):
    x, w = randn(7, 5, 9, dtype=dtype).requires_grad_(), randn(5, seed=1).to(parameters or dtype).requires_grad_()
    state = torch.zeros(5, dtype=w.dtype), torch.ones(5, dtype=w.dtype)
    y = native(x, *state, w, training=True)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, w.dtype)
    exact = F.batch_norm(x.double(), None, None, w.double(), training=True)
    t = Transform(*statistics(x.detach(), None, EPS), w.detach())
    assert ((y.double() - exact).abs() <= train_forward_bound(x.detach(), t, exact, Moments.of(x))).all()
    stepped = 0.1 * Moments.of(x).mean
    # beside its own rounding, the batch mean's: 4 units of the working precision, standard deviation 1
    assert ((state[0].double() - stepped).abs() <= torch.finfo(w.dtype).eps * stepped.abs() + 1e-6).all()


# -- running statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_running_statistics_move_once_and_their_version_with_them(momentum):
    x = randn(7, 5, 9).requires_grad_()
    state, same = [torch.zeros(5), torch.ones(5)], [torch.zeros(5), torch.ones(5)]
    y = native(x, *state, training=True, momentum=momentum)
    assert [s._version for s in state] == [1, 1]
    after = [s.clone() for s in state]
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    F.batch_norm(x, *same, training=True, momentum=momentum)
    for a, b in zip(state, same, strict=True):
        torch.testing.assert_close(a, b)
    native(x, *state)
    assert [s._version for s in state] == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))


def test_a_graph_that_kept_a_running_statistic_notices_the_step():
    mean, scale = torch.zeros(5), torch.ones(5, requires_grad=True)
    product_ = mean * scale
    native(randn(7, 5, 9), mean, torch.ones(5), training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product_.sum().backward()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("inplace", [False, True])
def test_layers_count_and_average_as_torchs_do(momentum, inplace):
    ours = batchnorm.nn.BatchNorm1d(5, momentum=momentum, inplace=inplace)
    torchs = torch.nn.BatchNorm1d(5, momentum=momentum)
    for seed in range(3):
        x = randn(7, 5, 9, seed=seed)
        torchs(x)
        with use_backend("native"):
            ours(x)
    assert ours.num_batches_tracked == 3
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_another_dtype_or_with_gaps_are_served_too(dtype):
    x = randn(7, 5, 9, dtype=dtype)
    half = torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)
    gaps = torch.zeros(10)[::2], torch.ones(10)[::2]
    plain = torch.zeros(5), torch.ones(5)
    ys = [native(x, *state, training=True) for state in (half, gaps, plain)]
    assert torch.equal(ys[0], ys[1])
    assert torch.equal(ys[1], ys[2])
    for a, b, c in zip(half, gaps, plain, strict=True):
        torch.testing.assert_close(b, c)
        assert torch.equal(a, b.to(dtype)) or torch.allclose(a.double(), c.double(), rtol=torch.finfo(dtype).eps)


# -- errors ------------------------------------------------------------------------------------------------------------

GOOD = {"weight": torch.ones(16), "bias": torch.ones(16)}
BAD = {
    "channels": {"running_mean": torch.zeros(15)},
    "variances": {"running_var": torch.ones(1)},
    "weight's size": {"weight": torch.ones(17)},
    "weight's dtype": {"weight": torch.ones(16).double()},
    "bias's device": {"bias": torch.ones(16, device="meta")},
    "eps": {"eps": 0.0},
    "negative eps": {"eps": -1e-5},
    "momentum": {"momentum": None},
    "mean only": {"running_var": None},
    "one value": {"input": torch.zeros(1, ALWAYS), **dict.fromkeys(("running_mean", "running_var", *GOOD))},
    "statistics that need gradients": {"running_var": torch.ones(16, requires_grad=True)},
    "a list": {"weight": [1.0] * 16},
    "residual's shape": {"residual": torch.zeros(1, 16)},
    "residual's dtype": {"residual": torch.zeros(ALWAYS // 16, 16).double()},
    "activation": {"activation": "rellu"},
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_errors_are_the_same_as_on_the_other_backends_and_nothing_is_written(name, inplace):
    errors = []
    for large in (True, False):
        x = randn(ALWAYS // 16, 16) if large else randn(4, 16)
        given = {"input": x, "running_mean": torch.zeros(16), "running_var": torch.ones(16), "training": True, **GOOD}
        given |= {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in BAD[name].items()}
        if not large and name == "one value":
            given["input"] = torch.zeros(1, 16)
        if not large and name == "residual's dtype":
            given["residual"] = torch.zeros(4, 16).double()
        if given["running_var"] is not None and given["running_var"].requires_grad:
            given["running_var"] = torch.ones(16, requires_grad=True)
        before = {k: v.detach().clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
        # small ones on torch's path; there torch notices another device only after it has written
        other = "reference" if name == "bias's device" else "torch"
        with use_backend("native" if large else other), pytest.raises(batchnorm.errors.BatchNormError) as caught:
            batch_norm(**given, inplace=inplace)
        errors.append(caught.value)
        for key, value in before.items():
            assert value.device.type == "meta" or torch.equal(given[key], value)
    assert type(errors[0]) is type(errors[1])
    sizes = [str(e).replace(f"({ALWAYS // 16}, 16)", "(N, 16)").replace("(4, 16)", "(N, 16)") for e in errors]
    assert sizes[0] == sizes[1]


# -- in place ----------------------------------------------------------------------------------------------------------


def in_place(x, weight=None, bias=None, activation=None, dy=None, layout=lambda v: v):
    """Run a norm over ``x · 1``; return whether y took its place, y, and the gradients."""
    leaf = layout(x).clone().requires_grad_()
    parameters = [None if p is None else p.clone().requires_grad_() for p in (weight, bias)]
    h = leaf * 1
    y = native(h, None, None, *parameters, training=True, activation=activation, inplace=True)
    over = y is h
    assert (y.data_ptr() == h.data_ptr()) is over
    leaves = [leaf, *(p for p in parameters if p is not None)]
    return over, y, torch.autograd.grad(y, leaves, layout(dy))


def recovery_bounds(x, dy, t):
    """Return the bounds of the gradients where x̂ is found again from y.

    y = γ·x̂ + β is rounded to the data's precision: half a unit of |y| ≤ |γ·x̂| + |β|, and the forward pass's own errors.
    Recovered, that is an error of x̂ of e = (eps/2 + 12 working units)·(|x̂| + |β/γ|), through leaky_relu as well because
    rounding is relative, plus 6 working units of X = rstd·(|x| + |mean|). It enters Σg·x̂ as Σ|g|·e, and
    dx = γ·rstd·(g − Σg/n − x̂·Σ(g·x̂)/n) as γ·rstd·(e·|Σg·x̂|/n + |x̂|·Σ|g|·e/n) to first order; 1% for the second.
    """
    a = ACCURACY[x.dtype]
    gradients, sums = REFERENCE.train_backward(dy.double(), x.double(), t)
    bounds = backward_bounds(dy, x, t, gradients.input)
    column = lambda v: v.double().reshape(1, -1, *(1,) * (x.dim() - 2))  # noqa: E731
    gamma, beta = (column(v).abs() for v in (t.weight, t.bias))
    size = column(t.rstd) * (x.double().abs() + column(t.mean).abs())
    xhat = (x.double() - column(t.mean)).abs() * column(t.rstd)
    # below the smallest normal number y is rounded to multiples of tiny·eps; leaky_relu has made it a hundredth
    steepness = 100 if t.activation else 1
    absolute = torch.finfo(x.dtype).tiny * a.eps * steepness / gamma
    e = (a.storage * a.eps + 12 * a.working_eps) * (xhat + beta / gamma) + 6 * a.working_eps * size + absolute
    g = dy.double().abs()
    dims = [0, *range(2, x.dim())]
    n = x.numel() / x.shape[1]
    of_sum = (g * e).sum(dims)
    more = column(t.rstd) * gamma * (e * column(sums.sum_dy_xhat).abs() + xhat * column(of_sum)) / n
    # the gradient itself is rounded once more
    return gradients.input, bounds.input + 1.01 * more, sums, bounds.sum_dy_xhat + 1.01 * of_sum, bounds.sum_dy


@pytest.mark.parametrize("activation", [None, "leaky_relu", "leaky_relu(0.2)"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["planes", "rows"])
def test_gradients_of_an_overwritten_input_are_recovered(layout, dtype, activation):
    """Negative γ too, and β up to 8·|γ|."""
    gammas = {"ordinary": [1.0, -1.0, 0.3, -2.0, 0.5], "at the limit": [0.5, -0.25, 1.0, 2.0, -4.0]}
    betas = {"ordinary": [0.0, 0.5, -1.0, 1.0, 0.1], "at the limit": [4.0, 2.0, -8.0, 16.0, 32.0]}
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    for kind, shape in product(gammas, [(40, 5), (3, 5, 16, 17), (2, 5, 3, 4, 5)]):
        weight, bias = (torch.tensor(v[kind], dtype=parameter) for v in (gammas, betas))
        x, dy = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
        x = x * 3 + 1
        mean, rstd = statistics(x, None, EPS)
        t = Transform(mean, rstd, weight, bias, None, activation)
        # a value whose sign rounding may change has another slope
        z = REFERENCE.normalize(x.double(), Transform(mean, rstd, weight.double(), bias.double()))
        of_z = train_forward_bound(x, Transform(mean, rstd, weight, bias), z, Moments.of(x))
        dy = dy.masked_fill(z.abs() <= of_z, 0.0)
        over, y, (dx, dweight, dbias) = in_place(x, weight, bias, activation, dy, layout)
        assert over
        exact = REFERENCE.normalize(x.double(), Transform(mean, rstd, weight.double(), bias.double(), None, activation))
        factor = 2 if dtype == torch.float64 else 1
        assert ((y.double() - exact).abs() <= factor * train_forward_bound(x, t, exact, Moments.of(x))).all()
        of_x, of_x_bound, sums, of_weight_bound, of_bias_bound = recovery_bounds(x, dy, t)
        stored = ACCURACY[parameter].eps
        assert ((dx.double() - of_x).abs() <= factor * of_x_bound).all()
        assert ((dweight - sums.sum_dy_xhat).abs() <= factor * of_weight_bound + stored * dweight.abs()).all()
        assert ((dbias - sums.sum_dy).abs() <= factor * of_bias_bound + stored * dbias.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_that_cannot_be_recovered_keep_their_input(dtype):
    """Planes, up to half of the channels: their gradients are those without inplace, bit for bit."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.tensor([1.0, 0.0, -1.0, 1e-30, 0.5, 2.0], dtype=parameter)
    weight = weight if dtype != torch.float64 else weight.where(weight != 1e-30, 1e-250)
    bias = torch.tensor([0.0, 1.0, 0.5, 0.0, 5.0, 1.0], dtype=parameter)  # the fifth is beyond 8·|γ|
    x, dy = randn(7, 6, 9, dtype=dtype), randn(7, 6, 9, seed=1, dtype=dtype)
    over, y, gradients = in_place(x, weight, bias, None, dy)
    leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
    expected = native(leaves[0], None, None, *leaves[1:], training=True)
    assert over
    assert torch.equal(y, expected)
    kept = [1, 3, 4]
    for got, plain in zip(gradients, torch.autograd.grad(expected, leaves, dy), strict=True):
        channel = 1 if got.dim() > 1 else 0
        index = torch.tensor(kept)
        assert torch.equal(got.index_select(channel, index), plain.index_select(channel, index))
        assert got.isfinite().all()


@pytest.mark.parametrize(
    ("case", "weight", "bias", "options", "layout"),
    [
        ("more than half of the channels are unsafe", [0.0, 0.0, 0.0, 1.0], [0.0] * 4, {}, None),
        ("all are tiny", [1e-30] * 4, [0.0] * 4, {}, None),
        ("rows, one of them unsafe", [1.0, 1.0, 1.0, 0.0], [0.0] * 4, {}, channels_last),
        ("rows, one NaN", [1.0, 1.0, float("nan"), 1.0], [0.0] * 4, {}, channels_last),
        ("relu cannot be inverted", [1.0] * 4, [0.0] * 4, {"activation": "relu"}, None),
        ("nor sigmoid, where it saturates", [1.0] * 4, [0.0] * 4, {"activation": "sigmoid"}, None),
    ],
)
def test_what_cannot_be_recovered_stays(case, weight, bias, options, layout):
    x, dy = randn(7, 4, 3, 3), randn(7, 4, 3, 3, seed=1)
    weight, bias = torch.tensor(weight), torch.tensor(bias)
    over, y, gradients = in_place(x, weight, bias, options.get("activation"), dy, layout or (lambda v: v))
    assert not over
    leaves = [v.clone().requires_grad_() for v in ((layout or (lambda v: v))(x), weight, bias)]
    expected = native(leaves[0], None, None, *leaves[1:], training=True, **options)
    assert torch.equal(y, expected) or case == "rows, one NaN"
    for got, plain in zip(gradients, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(got, plain, rtol=0, atol=0, equal_nan=True)


def test_a_residual_is_no_obstacle_without_gradients_only():
    x, r = randn(7, 4, 9), randn(7, 4, 9, seed=1)
    h = x.clone().requires_grad_() * 1
    y = native(h, None, None, training=True, residual=r, inplace=True)
    assert y is not h
    assert torch.equal(h, x)
    with torch.no_grad():
        for activation in (None, *ACTIVATIONS):
            for training in (True, False):
                state = torch.zeros(4), torch.ones(4)
                expected = native(x, *state, training=training, residual=r, activation=activation)
                h = x.clone()
                state = torch.zeros(4), torch.ones(4)
                y = native(h, *state, training=training, residual=r, activation=activation, inplace=True)
                assert y is h
                assert torch.equal(y, expected)


def test_what_autograd_forbids_to_write_over_stays():
    x, weight = randn(7, 4, 9), torch.ones(4, requires_grad=True)
    leaf = x.clone().requires_grad_()
    view = (x.clone().requires_grad_() * 1)[1:]
    base = x[:, :1].clone().requires_grad_() * 1
    expanded = base.expand(7, 4, 9)
    strided = (x.clone().requires_grad_() * 1)[..., ::2]
    for h in (leaf, view, expanded, strided):
        before = h.detach().clone()
        y = native(h, None, None, weight, training=True, inplace=True)
        assert y is not h
        assert torch.equal(h, before)
        assert h._version == 0
        y.sum().backward()
    with torch.no_grad():  # there only memory decides: overlapping values have no place of their own
        for h in (expanded, strided, x.new_zeros(20).unfold(0, 9, 1).unsqueeze(0)):
            before = h.clone()
            assert native(h, None, None, training=True, inplace=True) is not h
            assert torch.equal(h, before)


def test_data_without_gradients_may_be_overwritten():
    x, weight = randn(7, 4, 9), torch.ones(4, requires_grad=True)
    y = native(x, None, None, weight, training=True, inplace=True)
    assert y is x
    assert y.requires_grad
    (gradient,) = torch.autograd.grad(y.square().sum(), weight)
    other = torch.ones(4, requires_grad=True)
    plain = native(randn(7, 4, 9), None, None, other, training=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.square().sum(), other)[0])


@pytest.mark.parametrize("tracked", [True, False])
def test_whoever_needed_the_overwritten_input_is_told(tracked):
    leaf = randn(7, 4, 9).requires_grad_()
    h = leaf * 1
    square = h.square()  # keeps h
    with torch.set_grad_enabled(tracked):
        y = native(h, None, None, training=True, inplace=True)
    assert y is h
    assert h._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_writing_into_the_output_is_told_too():
    for inplace in (False, True):
        h = randn(7, 4, 9).requires_grad_() * 1
        y = native(h, None, None, training=True, inplace=inplace)
        (y if inplace else h).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_gradients_of_gradients_in_place_are_an_error_that_says_so():
    leaf = randn(7, 4, 9).requires_grad_()
    y = native(leaf * 1, None, None, training=True, inplace=True)
    with pytest.raises(StateError, match=r"the input was overwritten \(inplace=True\).*Pass inplace=False"):
        torch.autograd.grad(y.square().sum(), leaf, create_graph=True)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_a_residual_in_the_same_memory_is_read_before_it_is_written(activation):
    memory = randn(7 * 4 * 9 + 4)
    expected = native(memory[:252].view(7, 4, 9).clone(), None, None, training=True, activation=activation,
                      residual=memory[4:].view(7, 4, 9).clone())  # fmt: skip
    x = memory[:252].view(7, 4, 9)
    y = native(x, None, None, training=True, activation=activation, residual=memory[4:].view(7, 4, 9), inplace=True)
    assert torch.equal(y, expected)
    x = randn(7, 4, 9)
    expected = native(x.clone(), None, None, training=True, activation=activation, residual=x.clone())
    assert torch.equal(native(x, None, None, training=True, activation=activation, residual=x, inplace=True), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_with_inplace_are_copied_and_pickled(inplace):
    layer = batchnorm.nn.BatchNorm1d(4, inplace=inplace, activation="leaky_relu")
    torch.nn.init.normal_(layer.weight)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)
    x = randn(7, 4, 9)
    with use_backend("native"):
        y = layer(x.clone() * 1)
        for other in copies:
            assert other.inplace is inplace
            assert repr(other) == repr(layer)
            assert torch.equal(other(x.clone() * 1), y)
            torch.testing.assert_close(other.running_var, layer.running_var, rtol=0, atol=0)


# -- dx over dy --------------------------------------------------------------------------------------------------------

SHAPE = (7, 4, 9)


def consumer(backward):
    """Return a function of y whose gradient ``backward`` makes, of nothing."""

    class Consumer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, _):
            return backward(ctx)

    return Consumer.apply


def norm(x, **options):
    return native(x, None, None, training=True, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"activation": "relu", "residual": randn(*SHAPE)}])
def test_a_gradient_that_nobody_holds_gives_its_memory(options, training):
    place = []

    def backward(ctx):
        g = randn(*SHAPE, seed=1)
        place.append(g.data_ptr())
        return g

    x = randn(*SHAPE).requires_grad_()
    y = native(x, torch.zeros(4), torch.ones(4), training=training, **options)
    consumer(backward)(y).backward()
    assert x.grad.data_ptr() == place[0]
    (expected,) = torch.autograd.grad(
        native(x, torch.zeros(4), torch.ones(4), training=training, **options), x, randn(*SHAPE, seed=1)
    )
    assert torch.equal(x.grad, expected)


def keep_array(g):
    return np.asarray(g.numpy())


def keep_memoryview(g):
    return memoryview(g.numpy())


HOLDERS = {
    "tensor": lambda g: g,
    "detached": lambda g: g.detach(),
    "data": lambda g: g.data,
    "view": lambda g: g.view(-1),
    "slice": lambda g: g[1:],
    "storage": lambda g: g.untyped_storage(),
    "typed storage": lambda g: g.storage(),
    "numpy": keep_array,
    "numpy of a slice": lambda g: g[2:].numpy(),
    "memoryview": keep_memoryview,
    "dlpack": torch.utils.dlpack.to_dlpack,
    "numpy from dlpack": np.from_dlpack,
    "closure": lambda g: lambda: g,
    "parameter": lambda g: torch.nn.Parameter(g),
    "alias": torch.ops.aten.alias.default,
}


def values(kept):
    """Return what a holder sees now."""
    if callable(kept) and not isinstance(kept, torch.Tensor):
        kept = kept()
    if "dltensor" in repr(kept):
        kept = torch.utils.dlpack.from_dlpack(kept)
    if isinstance(kept, torch.UntypedStorage | torch.TypedStorage):
        kept = kept.untyped() if isinstance(kept, torch.TypedStorage) else kept
        kept = torch.empty(0).set_(kept)
    return torch.as_tensor(np.asarray(kept.detach() if isinstance(kept, torch.Tensor) else kept)).clone().flatten()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("where", ["consumer", "ctx", "tensor hook", "node prehook", "node hook"])
def test_a_gradient_that_somebody_holds_keeps_its_values(where, name):
    kept, expected = [], []
    whole = randn(*SHAPE, seed=1)

    def keep(g):
        kept.append(HOLDERS[name](g))
        tail = {"slice": 1, "numpy of a slice": 2}.get(name, 0)
        expected.append(whole[tail:].flatten())

    def backward(ctx):
        g = whole.clone()
        if where == "consumer":
            keep(g)
        if where == "ctx":
            ctx.kept = g
            contexts.append(ctx)
        return g

    contexts = []
    x = randn(*SHAPE).requires_grad_()
    y = norm(x)
    loss = consumer(backward)(y)
    handle = None
    if where == "tensor hook":
        y.register_hook(keep)
    if where == "node prehook":
        handle = y.grad_fn.register_prehook(lambda gs: keep(gs[0]))
    if where == "node hook":  # of the consumer: what it returns
        handle = loss.grad_fn.register_hook(lambda inputs, outputs: keep(inputs[0]))
    loss.backward()
    if where == "ctx":
        keep(contexts[0].kept)
        del contexts[0].kept
    if handle is not None:
        handle.remove()
    assert torch.equal(values(kept[0]), expected[0])
    (dx,) = torch.autograd.grad(norm(x), x, whole)
    assert torch.equal(x.grad, dx)


def test_a_saved_tensor_that_comes_back_as_the_gradient_keeps_its_values():
    whole = randn(*SHAPE, seed=1)

    class Consumer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, g):
            ctx.save_for_backward(g)
            return y.sum()

        @staticmethod
        def backward(ctx, _):
            return ctx.saved_tensors[0], None

    x, g = randn(*SHAPE).requires_grad_(), whole.clone()
    loss = Consumer.apply(norm(x), g)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    del g
    loss.backward()
    assert torch.equal(x.grad, 2 * first)


FOREIGN = {
    "numpy": lambda a: torch.from_numpy(a),
    "frombuffer": lambda a: torch.frombuffer(a, dtype=torch.float32).view(SHAPE),
    "dlpack of numpy": torch.from_dlpack,
    "dlpack of torch": lambda a: torch.from_dlpack(torch.from_numpy(a)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_memory_of_others_keeps_its_values(name):
    array = randn(*SHAPE, seed=1).numpy().copy()
    before = array.copy()
    x = randn(*SHAPE).requires_grad_()
    consumer(lambda ctx: FOREIGN[name](array))(norm(x)).backward()
    assert np.array_equal(array, before)


def test_memory_shared_with_another_process_keeps_its_values():
    place = []

    def backward(ctx):
        g = randn(*SHAPE, seed=1).share_memory_()
        place.append(torch.UntypedStorage._new_shared_fd_cpu(*g.untyped_storage()._share_fd_cpu_()))
        return g

    x = randn(*SHAPE).requires_grad_()
    consumer(backward)(norm(x)).backward()
    assert torch.equal(torch.empty(0).set_(place[0]).view(SHAPE), randn(*SHAPE, seed=1))


def test_gradients_given_by_the_user_keep_their_values():
    x, dy = randn(*SHAPE).requires_grad_(), randn(*SHAPE, seed=1)
    before = dy.clone()
    y = norm(x)
    y.backward(dy, retain_graph=True)
    first = x.grad.clone()
    torch.autograd.grad(y, x, dy, retain_graph=True)
    torch.autograd.backward([y], [dy], retain_graph=True)
    y.backward(gradient=dy)
    assert torch.equal(dy, before)
    assert torch.allclose(x.grad, 3 * first)
    given = iter([dy])
    norm(x).backward(next(given))
    assert torch.equal(dy, before)


def test_a_retained_gradient_keeps_its_values():
    x = randn(*SHAPE).requires_grad_()
    y = norm(x)
    y.retain_grad()
    (y * randn(*SHAPE, seed=1)).sum().backward()
    assert torch.equal(y.grad, randn(*SHAPE, seed=1))


def test_a_module_hook_that_keeps_gradients_keeps_their_values():
    for kind in ("backward", "backward_pre"):
        layer, kept = batchnorm.nn.BatchNorm1d(4), []
        keep = partial(lambda kept, *gradients: kept.append(gradients[-1][0]), kept)  # those of the output come last
        getattr(layer, f"register_full_{kind}_hook")(keep)
        x = randn(*SHAPE).requires_grad_()
        with use_backend("native"):
            (layer(x) * randn(*SHAPE, seed=1)).sum().backward()
        assert torch.equal(kept[0], randn(*SHAPE, seed=1))


def rand_like(y):
    return randn(*y.shape, seed=9)


# what follows two norms, whose gradients may share memory
FOLLOWERS = {
    "add": lambda a, b: ((a + b) * rand_like(a)).sum(),
    "sub": lambda a, b: ((a - b) * rand_like(a)).sum(),
    "twice the same": lambda a, b: ((a + a) * rand_like(a)).sum() + (b * rand_like(b)).sum(),
    "add, then both again": lambda a, b: ((a + b) * rand_like(a) + a * 3 + b * b).sum(),
    "cat": lambda a, b: (torch.cat([a, b]) * torch.cat([rand_like(a), rand_like(b) * 2])).sum(),
    "cat of channels": lambda a, b: (torch.cat([a, b], 1) * torch.cat([rand_like(a), rand_like(b)], 1)).sum(),
    "stack": lambda a, b: (torch.stack([a, b]) * torch.stack([rand_like(a), rand_like(b) * 2])).sum(),
    "chunk": lambda a, b: sum((k + 1) * (c * c).sum() for k, c in enumerate((*a.chunk(2), *b.chunk(3, 1)))),
    "unbind": lambda a, b: sum((k + 1) * (c * c).sum() for k, c in enumerate((*a.unbind(), *b.unbind(1)))),
    "expand": lambda a, b: (a.unsqueeze(0).expand(3, *SHAPE) * randn(3, *SHAPE)).sum() + (b * b).sum(),
    "sum": lambda a, b: a.sum() + 2 * b.sum(),
    "mean": lambda a, b: a.mean() + (a * b).mean(),
    "view": lambda a, b: (a.view(-1) * rand_like(a).view(-1)).sum() + (b.transpose(0, 1) ** 2).sum(),
    "norm of norms": lambda a, b: (
        (norm(a + b, activation="relu") * rand_like(a)).sum() + (norm(b) * rand_like(b)).sum()
    ),
    "residual": lambda a, b: (norm(a, residual=b) * rand_like(a)).sum() + (b * 2).sum(),
    "residual, activation": lambda a, b: (norm(a, residual=b, activation="relu") * rand_like(a)).sum() + b.sum(),
    "itself as residual": lambda a, b: (norm(a, residual=a) * rand_like(a)).sum() + (b * b).sum(),
    "clone": lambda a, b: (a.clone() * rand_like(a)).sum() + (b.clone() + a).square().sum(),
    "relu in place": lambda a, b: (torch.relu_(a) * rand_like(a)).sum() + (b + 0).relu_().sum(),
    "index": lambda a, b: (a[:, [0, 0, 1]] ** 2).sum() + (b[2] ** 3).sum(),
}


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("name", FOLLOWERS)
def test_whatever_follows_gets_and_gives_the_reference_gradients(name, activation):
    results = []
    for backend in ("native", "reference"):
        x, w = randn(*SHAPE, dtype=torch.float64).requires_grad_(), randn(4, seed=2).double().requires_grad_()
        h = x * 1.5
        with use_backend(backend):
            a = batch_norm(h, None, None, w, training=True, activation=activation)
            b = batch_norm(h + x, None, None, training=True)
        if backend == "native":
            loss = FOLLOWERS[name](a, b)
        else:
            before, globals()["norm"] = norm, lambda x, **o: reference(x, None, None, training=True, **o)
            try:
                loss = FOLLOWERS[name](a, b)
            finally:
                globals()["norm"] = before
        results.append([])
        for _ in range(2):  # twice through the same graph, into .grad
            loss.backward(retain_graph=True)
            results[-1] += [x.grad.clone(), w.grad.clone()]
    for got, expected in zip(*results, strict=True):
        # a few norms deep in float64, magnitudes up to 1e3
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
def test_checkpointed_gradients(reentrant, inplace):
    results = []
    for wrapped in (False, True):
        x, w = randn(*SHAPE).requires_grad_(), randn(4, seed=2).requires_grad_()
        mean, variance = torch.zeros(4), torch.ones(4)

        def block(h, w=w, mean=mean, variance=variance):
            y = native(h * 2, mean, variance, w, training=True, activation="leaky_relu", inplace=inplace)
            return norm(y * 1, activation="relu", residual=h)

        y = checkpoint(block, x, use_reentrant=reentrant) if wrapped else block(x)
        (y * rand_like(y)).sum().backward()
        results.append((y, x.grad, w.grad))
        if not wrapped:
            block(x)  # a checkpoint runs forward twice, and so do the statistics, as torch's do
        results[-1] += (mean, variance)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_measuring_under_a_debugger_is_put_off(monkeypatch):
    monkeypatch.setattr(whole_call, "_alone", None)
    x = randn(*SHAPE).requires_grad_()
    before = sys.gettrace()

    def look(frame, event, arg):
        assert frame.f_locals is not None
        return look

    sys.settrace(look)
    try:
        norm(x).square().sum().backward()
    finally:
        sys.settrace(before)
    if before is None:
        assert whole_call._alone is None
    norm(x).square().sum().backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode():
    x = randn(*SHAPE).requires_grad_()
    with torch.autograd.detect_anomaly():
        norm(x, activation="relu").square().sum().backward()
    (expected,) = torch.autograd.grad(norm(x, activation="relu").square().sum(), x)
    assert torch.equal(x.grad, expected)
    x = torch.full(SHAPE, float("inf")).requires_grad_()
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="_FusedBackward' returned nan values"):
        norm(x).sum().backward()


# -- modes, threads, processes -----------------------------------------------------------------------------------------


def test_threads_do_not_disturb_each_other():
    def work(seed):
        x = randn(20, 16, 30, seed=seed).requires_grad_()
        mean, variance = torch.zeros(16), torch.ones(16)
        for _ in range(20):
            x.grad = None
            y = native(x, mean, variance, training=True, activation="relu", residual=x * 2)
            y.square().sum().backward()
        return y.detach(), x.grad, mean, variance

    expected = [work(seed) for seed in range(3)]
    got, whole_call._alone = {}, None
    threads = [threading.Thread(target=lambda k=k: got.update({k: work(k)})) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    for k in range(3):
        assert all(torch.equal(a, b) for a, b in zip(got[k], expected[k], strict=True))


@pytest.mark.parametrize("created_inside", [True, False])
def test_inference_mode(created_inside):
    x = randn(*SHAPE)
    expected = norm(x, activation="relu")
    with torch.inference_mode(created_inside):
        h, mean, variance = x.clone(), torch.zeros(4), torch.ones(4)
    with torch.inference_mode():
        y = native(h, mean, variance, training=True, activation="relu")
        assert y.is_inference()
        assert torch.equal(y, expected)
        assert mean.abs().sum() > 0
        z = native(h, mean, variance, training=True, activation="relu", inplace=True)
        assert z is h
        assert torch.equal(z, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtype_of_the_input(dtype):
    layer = batchnorm.nn.BatchNorm1d(4)
    for given in (torch.float32, dtype):
        x = randn(*SHAPE, dtype=given).requires_grad_()
        with torch.autocast("cpu", dtype), use_backend("native"):
            y = layer(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == given
        assert layer.weight.grad.dtype == torch.float32


def test_deterministic_mode_and_runs_are_bit_identical():
    x, r = randn(40, 16, 100), randn(40, 16, 100, seed=1)

    def run():
        h = x.clone().requires_grad_()
        y = norm(h, activation="gelu", residual=r)
        return y, *torch.autograd.grad(y, h, r)

    first = run()
    torch.use_deterministic_algorithms(True)
    try:
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


class Normalized(torch.utils.data.Dataset):
    """Items that a worker process normalizes itself."""

    def __len__(self):
        return 4

    def __getitem__(self, k):
        return native(randn(20, 16, 30, seed=k), None, None, training=True)


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_workers_forked_after_use_do_not_hang():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = randn(40, 16, 100).requires_grad_()
        norm(x).sum().backward()
        loader = torch.utils.data.DataLoader(
            Normalized(), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        items = list(loader)
    finally:
        torch.set_num_threads(before)
    for k, item in enumerate(items):
        assert torch.equal(item, Normalized()[k])


def test_a_forced_native_backend_refuses_a_mask():
    with pytest.raises(InputError, match="it takes no mask"):
        native(randn(*SHAPE), None, None, training=True, mask=torch.ones(7, 9, dtype=torch.bool))
