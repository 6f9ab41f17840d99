"""Gradients of any backend, by its own phases; those of gradients by the reference."""

from __future__ import annotations

import pytest
import torch

from batchnorm.functional.autograd import normalize_with_batch_statistics, normalize_with_given_statistics
from batchnorm.kernels import Reference
from batchnorm.moments import Moments

MASK = torch.tensor([True, True, False, True, True])
ACTIVATIONS = (None, "silu")


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def arguments(with_residual=True):
    return drawn(5, 3, seed=0), drawn(3, seed=1), drawn(3, seed=2), drawn(5, 3, seed=3) if with_residual else None


def by_batch(mask, activation):
    return lambda x, w, b, r=None: normalize_with_batch_statistics(x, w, b, r, mask, 1e-3, activation, "reference")[0]


def by_given(mask, activation):
    mean, rstd = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    return lambda x, w, b, r=None: normalize_with_given_statistics(
        x, mean, rstd, w, b, r, mask, activation, "reference"
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [by_batch, by_given])
def test_first_and_second_derivatives_are_those_of_finite_differences(kind, masked, activation):
    mask = MASK[:, None].expand(5, 3) if masked else None
    function = kind(mask, activation)
    for with_residual in (True, False):
        given = tuple(t for t in arguments(with_residual) if t is not None)
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


def test_moments_are_returned_and_have_no_gradient():
    x, w, b, _ = arguments()
    y, moments = normalize_with_batch_statistics(x, w, b, None, None, 1e-3, None, "reference")
    exact = Moments.of(x.detach())
    torch.testing.assert_close((moments.count, moments.mean, moments.m2), (exact.count, exact.mean, exact.m2))
    assert y.requires_grad
    assert not any(t.requires_grad for t in (moments.count, moments.mean, moments.m2))


def test_sums_for_parameters_are_taken_only_where_they_learn(monkeypatch):
    taken = []
    reduce = Reference.backward_reduce
    monkeypatch.setattr(Reference, "backward_reduce", lambda self, *a: taken.append(1) or reduce(self, *a))
    x, w, b, _ = arguments()
    by_given(None, None)(x, w.detach(), b.detach()).sum().backward()
    assert taken == []
    by_given(None, None)(x, w, b).sum().backward()
    assert taken == [1]


def test_first_derivatives_are_the_backends_and_second_ones_the_references(monkeypatch):
    from batchnorm.functional import dispatch

    class Counting(Reference):
        name, backward = "counting", 0

        def train_backward(self, dy, x, transform):
            type(self).backward += 1
            return super().train_backward(dy, x, transform)

    dispatch.register(Counting())
    try:
        x, w, b, _ = arguments()
        y, _ = normalize_with_batch_statistics(x, w, b, None, None, 1e-3, None, "counting")
        torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
        assert Counting.backward == 1
        torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        assert Counting.backward == 1
    finally:
        dispatch.unregister("counting")
