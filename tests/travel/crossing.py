"""An operator traced by itself, and what its rules have to make true, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.dataflow.graph import Call
from batchnorm.dataflow.trace import trace
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.travel.maps import Map
from batchnorm.travel.route import carry_backward  # noqa: F401 - the rules register themselves
from batchnorm.travel.rules import go_backward, go_forward

__all__ = ["apply", "assert_crosses", "backward", "channels", "forward", "randn", "traced"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channels(scale: list[float], shift: list[float], dim: int = 4, axis: int = 1) -> Map:
    """Return the map of a tensor of ``dim`` axes with these numbers along one of them."""
    return Map.per_channel(*(torch.tensor(values, dtype=torch.float64) for values in (scale, shift)), dim, axis)


def apply(map_: Map, x: Tensor) -> Tensor:
    return x * map_.scale + map_.shift


class _Run(nn.Module):
    def __init__(self, run: Callable[..., Any], parameter: Tensor | None) -> None:
        super().__init__()
        self.run = run
        self.parameter = None if parameter is None else nn.Parameter(parameter)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs) if self.parameter is None else self.run(*inputs, self.parameter)


def traced(run: Callable[..., Any], *inputs: Tensor, parameter: Tensor | None = None) -> tuple[Call, Parameters]:
    """Return the only call of a function of the inputs, and of a parameter behind them if one is given."""
    model = _Run(run, parameter)
    graph = trace(model, inputs)
    (call,) = graph.calls
    return call, Parameters.of(model, graph)


def backward(run: Callable[..., Any], map_: Map, *inputs: Tensor, parameter: Tensor | None = None) -> Any:
    call, known = traced(run, *inputs, parameter=parameter)
    return go_backward(call, [map_] * len(call.outputs), known)


def forward(run: Callable[..., Any], map_: Map, *inputs: Tensor, parameter: Tensor | None = None) -> Any:
    """Let the map be that of the first input."""
    call, known = traced(run, *inputs, parameter=parameter)
    return go_forward(call, {next(call.tensor_args()): map_}, known)


def assert_crosses(run: Callable[[Tensor], Tensor], map_: Map, x: Tensor, *, back: Map | None = None) -> None:
    """Check both rules of an operator of one operand, on ``x``.

    Args:
        run: the operator.
        map_: what its input was made of what it is now.
        x: what its input is now.
        back: what is wanted of its output; the same if not given.
    """
    (after,) = forward(run, map_, x)
    torch.testing.assert_close(run(apply(map_, x)), apply(after, run(x)))
    wanted = map_ if back is None else back
    ((_, before),) = backward(run, wanted, x)
    torch.testing.assert_close(run(apply(before, x)), apply(wanted, run(x)))
