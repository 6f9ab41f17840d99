"""What is left of a norm with fixed statistics: one multiply-add per channel, and the activation behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from batchnorm.functional.batch_norm import normalize
from batchnorm.functional.dispatch import TORCH, quick_choice

__all__ = ["ScaleShift"]


class ScaleShift(Module):
    r"""One multiply-add per channel, and an activation if there is one, in one pass over memory where that pays.

    .. math::

        y = \mathrm{act}(s x + t)

    It computes so in every mode: ``train()`` does not change it. Large inputs on the CPU take this library's kernel,
    which also applies the activation; small ones, and programs that are compiled, exported, traced or scripted, hold
    torch's own ``batch_norm`` with mean 0, variance 1 and ε = 0, which is s·x + t to the last digit, and then the
    activation's own module. So such a program needs nothing of this library.

    Attributes:
        weight: s, (C,). Beside float16 and bfloat16 data it is of float32.
        bias: t, likewise.
        activation: the module that is applied to s·x + t, or None.
        fused: the name in ``batchnorm.kernels.activation.ACTIVATIONS`` of what that module computes; None if kernels
            do not know it.

    Args:
        weight: s.
        bias: t.
        activation: see above.
        fused: see above.

    Example:
        >>> import torch
        >>> from batchnorm.nn.scale_shift import ScaleShift
        >>> layer = ScaleShift(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]), torch.nn.ReLU(), "relu")
        >>> layer(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).tolist()
        [[3.0, 0.0], [0.0, 1.0]]
        >>> list(layer.state_dict())
        ['weight', 'bias']
    """

    if TYPE_CHECKING:  # torch.jit reads a module's annotations, and does not understand postponed ones
        zeros: Tensor
        ones: Tensor

    __constants__ = ["fused"]  # noqa: RUF012  as torch has it

    def __init__(
        self, weight: Tensor, bias: Tensor, activation: Module | None = None, fused: str | None = None
    ) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, Parameter) else Parameter(weight)
        self.bias = bias if isinstance(bias, Parameter) else Parameter(bias)
        # the statistics of a norm that only scales and shifts; constants, so no part of the state
        self.register_buffer("zeros", torch.zeros_like(self.bias, requires_grad=False), persistent=False)
        self.register_buffer("ones", torch.ones_like(self.weight, requires_grad=False), persistent=False)
        self.activation = activation
        self.fused = fused

    def forward(self, input: Tensor) -> Tensor:
        """Return act(s·x + t) of an input (N, C) or (N, C, ...)."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            alone = self.activation is None or self.fused is not None
            # a compiler makes one loop of torch's operators and those around them; into ours it could not look
            elsewhere = alone and not torch.compiler.is_compiling()
            if elsewhere and quick_choice(input, False, self.fused is not None) is not TORCH:
                name, affine = type(self).__name__, (self.weight, self.bias)
                return normalize(name, input, self.zeros, self.ones, *affine, False, 0.0, 0.0, self.fused)
        y = F.batch_norm(input, self.zeros, self.ones, self.weight, self.bias, False, 0.0, 0.0)
        if self.activation is None:
            return y
        result: Tensor = self.activation(y)
        return result

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return str(len(self.weight))
