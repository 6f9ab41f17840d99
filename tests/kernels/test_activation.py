from __future__ import annotations

import pytest
import torch

from batchnorm.kernels.activation import ACTIVATIONS, activation_called, leaky_relu, slope_below_zero

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


@pytest.mark.parametrize("slope", [0.2, 0.1, 1e-5, 1.5, 0.0, -0.3])
def test_leaky_relu_has_any_slope(slope):
    name = leaky_relu(slope)
    assert slope_below_zero(name) == slope
    z = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    activation = activation_called(name)
    assert activation.function(z).tolist() == [-2 * slope, 0, 3]
    assert activation.derivative(z).tolist() == [slope, slope, 1]


@pytest.mark.parametrize(
    "name", ["leaky_relu()", "leaky_relu(x)", "leaky_relu(nan)", "leaky_relu(inf)", "leaky_relu(0.2", "elu"]
)
def test_other_names_are_none(name):
    assert activation_called(name) is None
