from __future__ import annotations

import pytest
import torch

from batchnorm.kernels.activation import ACTIVATIONS

KINKS = torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_the_one_torch_takes_at_kinks_too(name):
    activation = ACTIVATIONS[name]
    z = torch.cat([torch.linspace(-8, 8, 321, dtype=torch.float64), KINKS]).requires_grad_()
    (expected,) = torch.autograd.grad(activation.function(z).sum(), z)
    got = activation.derivative(z.detach())
    # each side is a handful of operations on values up to 8
    assert ((got - expected).abs() <= 8 * torch.finfo(torch.float64).eps * (1 + z.detach().abs())).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_can_be_differentiated(name):
    z = torch.tensor([-4.5, -2.2, -0.7, 0.4, 1.9, 4.3, 7.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: ACTIVATIONS[name].derivative(v) + 0 * v, z)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivative_keeps_the_dtype(name, dtype):
    assert ACTIVATIONS[name].derivative(torch.zeros(3, dtype=dtype)).dtype == dtype


def test_leaky_relu_has_its_slope_in_full_precision():
    z = torch.tensor([-1.0], dtype=torch.float64)
    assert ACTIVATIONS["leaky_relu"].derivative(z).item() == 0.01
