from __future__ import annotations

import torch

from batchnorm.kernels.accuracy import (
    ACCURACY,
    backward_bounds,
    moments_bounds,
    normalize_bound,
    train_forward_bound,
)
from batchnorm.kernels.contract import Transform
from batchnorm.kernels.reference import REFERENCE, statistics

SHAPE = (16, 4, 9)


def test_the_table_covers_every_dtype_that_the_contract_names():
    assert set(ACCURACY) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    for dtype, accuracy in ACCURACY.items():
        assert accuracy.dtype == dtype
        assert accuracy.working_eps <= accuracy.eps
        assert accuracy.storage == 0.5  # rounded once


def working_precision(x, t, dy):
    """Return y, dx and the sums by the formulas in float32: what a backend is allowed to do."""
    shape = (1, -1, 1)
    mean, rstd, weight, bias = (v.float().view(shape) for v in (t.mean, t.rstd, t.weight, t.bias))
    xhat = (x.float() - mean) * rstd
    y = xhat * weight + bias + t.residual.float()
    g, n = dy.float(), x.numel() / x.shape[1]
    sum_dy, sum_dy_xhat = g.sum((0, 2), keepdim=True), (g * xhat).sum((0, 2), keepdim=True)
    dx = weight * rstd * (g - sum_dy / n - xhat * sum_dy_xhat / n)
    return y.to(x.dtype), dx.to(x.dtype), sum_dy.flatten(), sum_dy_xhat.flatten()


def test_float32_arithmetic_fits_and_one_digit_less_does_not():
    """The bounds are neither too tight for an honest backend nor too loose to notice a careless one."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, dy, residual = ((torch.randn(SHAPE, generator=generator) + k).to(dtype) for k in (3, 0, 1))
        mean, rstd = statistics(x, None, 1e-5)
        weight, bias = torch.randn(4, generator=generator), torch.randn(4, generator=generator)
        t = Transform(mean, rstd, weight, bias, residual)
        double = x.double()
        exact = REFERENCE.normalize(double, t)
        exact_gradients, exact_sums = REFERENCE.train_backward(dy.double(), double, t)
        y, dx, sum_dy, sum_dy_xhat = working_precision(x, t, dy)
        of_y, back = normalize_bound(x, t, exact), backward_bounds(dy, x, t, exact_gradients.input)
        assert ((y.double() - exact).abs() <= of_y).all()
        assert ((dx.double() - exact_gradients.input).abs() <= back.input).all()
        assert ((sum_dy - exact_sums.sum_dy).abs() <= back.sum_dy).all()
        assert ((sum_dy_xhat - exact_sums.sum_dy_xhat).abs() <= back.sum_dy_xhat).all()
        careless = t.rstd * (1 + 32 * ACCURACY[dtype].eps)
        wrong = REFERENCE.normalize(double, Transform(mean, careless, weight, bias, residual))
        assert ((wrong - exact).abs() > of_y).any()


def test_bounds_of_statistics_follow_the_spread_and_not_the_offset():
    generator = torch.Generator().manual_seed(0)
    x = 1e4 + 0.1 * torch.randn(64, 2, 8, generator=generator)
    moments = REFERENCE.moments(x)
    of_mean, of_m2 = moments_bounds(x, moments)
    assert (of_mean <= 1e-6).all()
    assert (of_m2 <= 1e-4 * moments.m2).all()  # four digits
    in_float32 = (x.square().mean((0, 2)) - x.mean((0, 2)).square()).double() * moments.count
    assert ((in_float32 - moments.m2).abs() > of_m2).all()


def test_the_bound_of_the_fused_forward_contains_that_of_the_split_one():
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    mean, rstd = statistics(x, None, 1e-5)
    t = Transform(mean, rstd)
    exact = REFERENCE.normalize(x.double(), t)
    assert (train_forward_bound(x, t, exact, REFERENCE.moments(x)) >= normalize_bound(x, t, exact)).all()
