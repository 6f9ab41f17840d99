import math

import pytest
import torch
import torch.nn.functional as F

from batchnorm.monitor.saturation import SLOPE, ActivationCall, ActivationStream, ActivationUse, activation_of


def use(z: torch.Tensor, activation: ActivationCall, unit_dim: int = 1) -> ActivationUse:
    stream = ActivationStream("act", activation, z.shape[unit_dim], z.device)
    for part in z.split(2):
        stream.add(part, unit_dim)
    return stream.result()


SIGMOID, TANH, RELU = (activation_of(name, {}) for name in ("sigmoid", "tanh", "relu"))


@pytest.mark.parametrize(("activation", "function"), [(SIGMOID, torch.sigmoid), (TANH, torch.tanh)])
def test_saturated_is_where_the_derivative_is_small(activation, function) -> None:
    z = torch.linspace(-8, 8, 3201, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(z).sum(), z)
    saturated = slope < SLOPE * slope.max()
    assert torch.equal((z < activation.low) | (z > activation.high), saturated)


def test_share_is_exact() -> None:
    limit = SIGMOID.high
    z = torch.tensor([[0.0, 10.0], [limit * 0.999, -10.0], [-limit * 1.001, 10.0], [1.0, 10.0], [2.0, -7.0]])
    assert use(z, SIGMOID) == ActivationUse("act", "sigmoid", 2, 10, 6 / 10, (1,), None)
    assert use(z, TANH).saturated == 7 / 10  # in addition 0.999 · 4.357, not 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_counts_are_exact_in_every_type(dtype: torch.dtype) -> None:
    z = torch.zeros(4, 2, 60, 70, dtype=dtype)
    z[:3, 0] = 100
    z[0, 1, 0, 0] = -100
    assert use(z, TANH).saturated == (3 * 4200 + 1) / (4 * 2 * 4200)


def test_hard_versions_saturate_where_their_gradient_is_zero() -> None:
    z = torch.linspace(-4, 4, 81, requires_grad=True)
    for name, given, function in (
        ("hardsigmoid", {}, F.hardsigmoid),
        ("hardtanh", {"min_val": -1, "max_val": 1}, F.hardtanh),
        ("hardtanh", {"min_val": -2.0, "max_val": 3.0}, lambda x: F.hardtanh(x, -2, 3)),
    ):
        (slope,) = torch.autograd.grad(function(z).sum(), z)
        seen = use(z.detach()[:, None], activation_of(name, given))
        assert seen.saturated == (slope == 0).sum().item() / 81


def test_dead_is_a_unit_that_never_fires() -> None:
    z = torch.tensor([[-1.0, 0.0, -1.0, -5.0], [-2.0, 0.0, 1e-30, -5.0], [-1.0, 0.0, -1.0, -5.0]])
    z[2, 3] = math.nan
    # exactly 0 does not fire; a NaN is no evidence of death
    assert use(z, RELU) == ActivationUse("act", "relu", 4, 12, None, None, (0, 1))


@pytest.mark.parametrize(("shape", "dim"), [((3, 4, 5, 6), 1), ((3, 5, 4), -1), ((3, 5, 6, 4), -1), ((4,), -1)])
def test_units_are_channels_or_features(shape: tuple[int, ...], dim: int) -> None:
    z = -torch.ones(shape)
    z.select(dim, 2).fill_(1.0)
    stream = ActivationStream("act", RELU, 4, z.device)
    stream.add(z, dim)
    assert stream.result().dead == (0, 1, 3)


@pytest.mark.parametrize(
    ("operator", "arguments", "kind"),
    [
        ("relu", {}, "relu"),
        ("relu6", {}, "relu6"),
        ("clamp", {"min": 0}, "relu"),
        ("clamp", {"min": 0.0, "max": 6}, "relu6"),
        ("clamp", {"min": -1, "max": 1}, None),
        ("clamp", {"max": 0}, None),
        ("clamp_min", {"min": 0}, "relu"),
        ("clamp_min", {"min": 1e-6}, None),
        ("hardtanh", {"min_val": 0, "max_val": 6.0}, "relu6"),
        ("hardtanh", {"min_val": -1, "max_val": 1}, "hardtanh"),
        ("threshold", {"threshold": 0, "value": 0}, "relu"),
        ("threshold", {"threshold": 0.5, "value": 0}, None),
        ("gelu", {}, None),
    ],
)
def test_spellings(operator: str, arguments: dict[str, float], kind: str | None) -> None:
    found = activation_of(operator, arguments)
    assert (found and found.kind) == kind


def test_an_empty_batch_counts_nothing() -> None:
    stream = ActivationStream("act", SIGMOID, 3, torch.device("cpu"))
    stream.add(torch.empty(0, 3), 1)
    assert stream.result() == ActivationUse("act", "sigmoid", 3, 0, None, (), None)
