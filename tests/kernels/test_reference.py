from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.kernels import ACTIVATIONS, REFERENCE, Request, Transform
from batchnorm.kernels.accuracy import (
    ACCURACY,
    backward_bounds,
    moments_bounds,
    normalize_bound,
    train_forward_bound,
)
from batchnorm.kernels.contract import normalizers
from batchnorm.kernels.reference import statistics
from batchnorm.moments import Moments, expand_mask

EPS = 1e-5
SHAPES = [(7, 3), (4, 3, 5), (3, 2, 4, 5), (2, 2, 3, 2, 4)]
LAYOUTS = ["contiguous", "channels_last", "sliced"]


def make(shape, dtype=torch.float64, layout="contiguous", seed=0):
    """Return data of a given layout, as values that the dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "sliced":
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
        return wide.to(dtype)[..., ::2]
    x = torch.randn(shape, generator=generator).to(dtype)
    if layout == "channels_last" and len(shape) > 2:
        order = [0, *range(2, len(shape)), 1]
        return x.permute(order).contiguous().permute([0, len(shape) - 1, *range(1, len(shape) - 1)])
    return x


def composition(x, mean, var, weight, bias, residual, activation):
    """Return y by torch's own operators, in float64."""
    y = F.batch_norm(x.double(), mean, var, weight.double(), bias.double(), eps=EPS) + residual.double()
    return y if activation is None else ACTIVATIONS[activation].function(y)


def problem(shape, dtype, layout="contiguous", activation=None, mask=None):
    """Return x, dy and a transform whose statistics are those of x."""
    x = make(shape, dtype, layout)
    parameter = dtype if dtype == torch.float64 else torch.float32
    weight, bias = make((shape[1],), parameter, seed=1), make((shape[1],), parameter, seed=2)
    mean, rstd = statistics(x, mask, EPS)
    transform = Transform(mean, rstd, weight, bias, make(shape, dtype, seed=3), activation, mask)
    return x, make(shape, dtype, seed=4), transform


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", ACCURACY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalize_is_within_its_accuracy(dtype, layout, activation):
    for shape in SHAPES:
        x, _, t = problem(shape, dtype, layout, activation)
        exact = composition(x, t.mean, t.rstd**-2 - EPS, t.weight, t.bias, t.residual, activation)
        y = REFERENCE.normalize(x, t)
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= normalize_bound(x, t, exact)).all()


@pytest.mark.parametrize("dtype", ACCURACY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_and_train_forward_are_within_their_accuracy(dtype, layout):
    for shape in SHAPES:
        x, _, t = problem(shape, dtype, layout, "silu")
        rows = x.double().movedim(1, -1).reshape(-1, shape[1])
        exact = Moments(
            torch.full((shape[1],), float(len(rows)), dtype=torch.float64),
            rows.mean(0),
            rows.var(0, correction=0) * len(rows),
        )
        y, moments = REFERENCE.train_forward(x, t, EPS)
        of_mean, of_m2 = moments_bounds(x, exact)
        assert torch.equal(moments.count, exact.count)
        assert ((moments.mean - exact.mean).abs() <= of_mean).all()
        assert ((moments.m2 - exact.m2).abs() <= of_m2).all()
        of_y = composition(x, exact.mean, exact.variance(), t.weight, t.bias, t.residual, "silu")
        assert ((y.double() - of_y).abs() <= train_forward_bound(x, t, of_y, exact)).all()


@pytest.mark.parametrize("activation", [None, "silu", "sigmoid", "tanh", "gelu"])
@pytest.mark.parametrize("dtype", ACCURACY)
def test_backward_is_within_its_accuracy(dtype, activation):
    for shape in SHAPES:
        x, dy, t = problem(shape, dtype, activation=activation)
        leaves = [v.double().clone().requires_grad_() for v in (x, t.weight, t.bias, t.residual)]
        y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=EPS) + leaves[3]
        y = y if activation is None else ACTIVATIONS[activation].function(y)
        dx, dweight, dbias, dresidual = torch.autograd.grad(y, leaves, dy.double())
        gradients, reduced = REFERENCE.train_backward(dy, x, t)
        bounds = backward_bounds(dy, x, t, dx)
        assert gradients.input.dtype == gradients.residual.dtype == dtype
        assert ((gradients.input.double() - dx).abs() <= bounds.input).all()
        assert ((gradients.residual.double() - dresidual).abs() <= bounds.residual).all()
        assert ((reduced.sum_dy - dbias).abs() <= bounds.sum_dy).all()
        assert ((reduced.sum_dy_xhat - dweight).abs() <= bounds.sum_dy_xhat).all()


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_backward_with_given_statistics(activation):
    x, dy, t = problem((4, 3, 5), torch.float64, activation=activation)
    leaf = x.clone().requires_grad_()
    y = composition(leaf, t.mean, t.rstd**-2 - EPS, t.weight, t.bias, t.residual, activation)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    gradients = REFERENCE.backward_input(dy, x, t, None)
    assert ((gradients.input - dx).abs() <= backward_bounds(dy, x, t, dx).input).all()


@given(st.integers(2, 6), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 2**20))
def test_input_gradients_of_training_sum_to_zero_per_channel(n, c, length, masked, seed):
    shape = (n, c, length)
    mask = torch.rand(n, length, generator=torch.Generator().manual_seed(seed)) > 0.3 if masked else None
    full = None if mask is None else expand_mask(mask, torch.empty(shape), 1)
    x, dy = make(shape, seed=seed), make(shape, seed=seed + 1)
    mean, rstd = statistics(x, full, EPS)
    t = Transform(mean, rstd, make((c,), seed=seed + 2), None, mask=full)
    gradients, _ = REFERENCE.train_backward(dy, x, t)
    bound = backward_bounds(dy, x, t, gradients.input).input.sum((0, 2))
    assert (gradients.input.sum((0, 2)).abs() <= bound).all()


@pytest.mark.parametrize("activation", [None, "relu", "silu", "sigmoid"])
def test_nothing_behind_the_mask_has_influence_or_gradient(activation):
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(9)) > 0.4
    shape = (4, 3, 5)
    full = expand_mask(mask, torch.empty(shape), 1)
    x, dy, t = problem(shape, torch.float32, activation=activation, mask=full)
    dirt = torch.where(full, 0.0, torch.tensor([torch.nan, torch.inf, -1e38])[:, None])
    dirty = Transform(t.mean, t.rstd, t.weight, t.bias, t.residual + dirt, activation, full)
    clean_y, dirty_y = REFERENCE.normalize(x, t), REFERENCE.normalize(x + dirt, dirty)
    assert torch.equal(clean_y, dirty_y)
    assert clean_y[~full].eq(0).all()
    clean, dirtied = REFERENCE.train_backward(dy, x, t), REFERENCE.train_backward(dy + dirt, x + dirt, dirty)
    for a, b in ((clean[0].input, dirtied[0].input), (clean[0].residual, dirtied[0].residual)):
        assert torch.equal(a, b)
        assert a[~full].eq(0).all()
    assert torch.equal(clean[1].sum_dy, dirtied[1].sum_dy)
    assert torch.equal(clean[1].sum_dy_xhat, dirtied[1].sum_dy_xhat)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_memory_layout_is_kept(layout, masked):
    x = make((3, 2, 4, 5), layout=layout)
    mask = torch.ones(3, 4, 5, dtype=torch.bool) if masked else None
    full = None if mask is None else expand_mask(mask, x, 1)
    mean, rstd = statistics(x, full, EPS)
    t = Transform(mean, rstd, None, None, make(x.shape, layout=layout, seed=1), "relu", full)
    gradients, _ = REFERENCE.train_backward(make(x.shape, layout=layout, seed=2), x, t)
    for result in (REFERENCE.normalize(x, t), gradients.input, gradients.residual):
        assert result.stride() == x.stride()


def test_statistics_agree_with_moments_and_can_be_differentiated():
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(9)) > 0.4
    x = make((4, 3, 5)).requires_grad_()
    full = expand_mask(mask, x, 1)
    moments = REFERENCE.moments(x, full)
    mean, rstd = statistics(x, full, EPS)
    expected_mean, expected_rstd = normalizers(moments, EPS)
    units = moments.count * torch.finfo(torch.float64).eps
    assert ((mean - expected_mean).abs() <= units * x.detach().abs().max()).all()
    assert ((rstd - expected_rstd).abs() <= units * expected_rstd).all()
    assert torch.autograd.gradcheck(lambda v: statistics(v, full, EPS), x)


def test_no_values_give_no_nan():
    x = torch.zeros(0, 3, 4)
    y, moments = REFERENCE.train_forward(x, Transform(torch.empty(0), torch.empty(0)), EPS)
    assert y.shape == x.shape
    mean, rstd = normalizers(moments, EPS)
    gradients, reduced = REFERENCE.train_backward(y, x, Transform(mean, rstd))
    assert gradients.input.shape == x.shape
    assert reduced.sum_dy_xhat.tolist() == [0.0] * 3


def test_it_serves_everything_that_has_float64():
    assert REFERENCE.refusal(Request(torch.zeros(2, 2), training=True)) is None
