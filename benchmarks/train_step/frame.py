"""One training step of one layer, between a stand-in for the convolution before it and one for the layer after it.

    given ──x──▶ the layer ──y──▶ taken

``given`` hands out a tensor as a convolution does: freshly allocated, filled a moment ago, with a history, and needed
by nobody else, so that a layer may write over it. ``taken`` keeps y for its own backward, as a convolution does, and
there hands back a gradient that is freshly allocated, filled a moment ago, and held by nobody else, so that a layer may
write over it too. Every competitor stands in this same frame.

Forward is timed around the call of the layer. Backward is timed from the moment that ``taken`` lets go of dy to the
moment that ``given`` is called with dx (and the residual's gradient): autograd's own way from node to node is in it,
the filling of x, residual and dy is not. Whatever the layer allocates in between is counted, page faults included, and
so is the release of what is no longer needed: x, y and the gradients go away in the backward pass, as in a network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Clock:
    """When the gradient left ``taken``, and when it came to ``given``."""

    left = 0.0
    came = 0.0


class _Given(torch.autograd.Function):
    """Copies of the sources, as outputs of an operation that is differentiable in ``anchor``."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, clock: Clock, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.clock = clock
        return tuple(source.clone() for source in sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.clock.came = time.perf_counter()
        if any(gradient is None for gradient in gradients):
            raise RuntimeError("the layer returned no gradient for one of its inputs")
        return (None, None, *(None for _ in gradients))


class _Taken(torch.autograd.Function):
    """A scalar whose gradient with respect to y is a copy of ``dy``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, clock: Clock, dy: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        ctx.clock, ctx.dy = clock, dy
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        dy = ctx.dy.clone()
        ctx.clock.left = time.perf_counter()
        return dy, None, None


class Frame:
    """A layer in its frame.

    Args:
        layer: called with x, or with x and a residual.
        sources: what x (and the residual) hold.
        dy: what the gradient of y holds.
    """

    def __init__(self, layer: Callable[..., Tensor], sources: Sequence[Tensor], dy: Tensor) -> None:
        self.layer, self.sources, self.dy = layer, tuple(sources), dy
        self._anchor = torch.zeros((), requires_grad=True)
        self._clock = Clock()
        self._parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []

    def once(self) -> dict[str, float]:
        """Run forward and backward; return the seconds of each."""
        for parameter in self._parameters:
            parameter.grad = None
        inputs = _Given.apply(self._anchor, self._clock, *self.sources)  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        y = self.layer(*inputs)
        forward = time.perf_counter() - start
        end = _Taken.apply(y, self._clock, self.dy)  # type: ignore[no-untyped-call]
        del inputs, y
        end.backward()
        backward = self._clock.came - self._clock.left
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}
