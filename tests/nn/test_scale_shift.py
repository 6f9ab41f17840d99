from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from batchnorm.kernels.activation import ACTIVATIONS
from batchnorm.kernels.native import missing
from batchnorm.nn.scale_shift import ScaleShift

SMALL, LARGE = (2, 3, 4, 5), (2, 3, 200, 300)  # torch's kernel, and this library's
RELU = (nn.ReLU(inplace=True), "relu")


class Called(nn.Module):
    """An activation that must not be called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called")


def layer(channels: int = 3, dtype: torch.dtype = torch.float32, *activation: object) -> ScaleShift:
    generator = torch.Generator().manual_seed(channels)
    scale, shift = torch.randn(2, channels, generator=generator, dtype=torch.float64)
    return ScaleShift(scale.to(dtype), shift.to(dtype), *activation)  # type: ignore[arg-type]


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def exact(of: ScaleShift, x: torch.Tensor) -> torch.Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    return of.weight.double().view(shape) * x.double() + of.bias.double().view(shape)


@pytest.mark.parametrize("shape", [SMALL, LARGE, (4, 3), (70_000, 3), (2, 3, 70_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_it_scales_shifts_and_activates(shape, dtype, turned):
    x = values(shape, dtype)
    if turned:  # channels last
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    before = x.clone()
    wide = dtype if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        of = layer(3, wide, *RELU)
        y = of(x)
        expected, shift = exact(of, x), float(of.bias.abs().max())
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert torch.equal(x, before)
    # one rounding of the sum, and one of the product where it is rounded by itself, in float32 and in the data's type
    unit = torch.finfo(dtype).eps + torch.finfo(wide).eps
    assert float((y.double() - expected.relu()).abs().max()) <= unit * (float(expected.abs().max()) + shift)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_every_function_of_the_kernels(name, shape):
    class Function(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ACTIVATIONS[name].function(x)

    x = values(shape)
    of = layer(3, torch.float32, Function(), name)
    torch.testing.assert_close(of(x).double(), ACTIVATIONS[name].function(exact(of, x)), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(missing is not None, reason="the native kernels were not built")
def test_large_inputs_take_the_kernel_and_small_ones_the_module():
    of = layer(3, torch.float32, Called(), "relu")
    assert float(of(values(LARGE)).detach().min()) == 0.0
    with pytest.raises(AssertionError, match="called"):
        of(values(SMALL))


@pytest.mark.parametrize("shape", [SMALL, (8, 3, 600, 600)], ids=str)
def test_a_function_that_kernels_do_not_know_is_applied_all_the_same(shape):
    of = layer(3, torch.float32, nn.Softplus(), None)
    with torch.no_grad():
        expected = nn.functional.softplus(exact(of, values(shape)))
        torch.testing.assert_close(of(values(shape)).double(), expected, rtol=1e-5, atol=1e-5)


def test_no_mode_changes_it_and_only_two_tensors_are_its_state():
    of = layer(3, torch.float32, *RELU)
    x = values(SMALL)
    y = of.eval()(x)
    assert torch.equal(of.train()(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(of))(x), y)
    assert list(of.state_dict()) == ["weight", "bias"]
    other = layer(4, torch.float32, *RELU)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(of.state_dict())
    assert repr(other) == "ScaleShift(\n  4\n  (activation): ReLU(inplace=True)\n)"


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_gradients(shape):
    of = layer(3, torch.float64, *RELU)
    x = values(shape, torch.float64).requires_grad_()
    of(x).sum().backward()
    passed = (exact(of, x.detach()) > 0).double()
    torch.testing.assert_close(x.grad, passed * of.weight.detach().view(1, 3, 1, 1))
    torch.testing.assert_close(of.weight.grad, (passed * x.detach()).sum((0, 2, 3)))
    torch.testing.assert_close(of.bias.grad, passed.sum((0, 2, 3)))


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_programs_hold_torchs_operators_only(shape):
    of, x = layer(3, torch.float32, *RELU).eval(), values(shape)
    y = of(x).detach()
    program = torch.export.export(of, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.batch_norm.default", "aten.relu_.default"}
    captured: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        captured.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        made = {
            "export": program.module(),
            "script": torch.jit.script(of),
            "trace": torch.jit.trace(of, x),
            "fx": torch.fx.symbolic_trace(of),
            "compile": torch.compile(of, backend=backend, fullgraph=True),
        }
        for run in made.values():
            torch.testing.assert_close(run(x), y)
    assert captured
    assert not any("batchnorm" in name for name in captured)
