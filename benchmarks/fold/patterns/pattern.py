"""A pattern: a model, its inputs, and how many of its norms an exact fold has to leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.fold.subject import Subject
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["PATTERNS", "Inputs", "Pattern", "Wired", "noise", "numbers", "pattern", "positive", "unshifted"]

Inputs = Callable[[torch.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class Pattern(Subject):
    """One way that norms can stand.

    Attributes:
        family: what it has in common with others.
        name: what it is called in the table.
        make: builds the model.
        draw: draws inputs.
        least: how many of the norms an exact fold has to leave, if it may give each operator weights of its own, but
            add none.
    """

    family: str
    name: str
    make: Callable[[], nn.Module]
    draw: Inputs
    least: int = 0

    def build(self) -> nn.Module:
        """Return the model in float64, and in eval mode but for what it is to keep in train mode."""
        torch.manual_seed(0)
        return self.make().double()

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """Return one draw of the inputs."""
        return self.draw(torch.Generator().manual_seed(seed))


PATTERNS: list[Pattern] = []


def pattern(
    family: str, name: str, draw: Inputs, least: int = 0
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register what the decorated function builds; its norms get lively statistics, and the model eval mode."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        PATTERNS.append(Pattern(family, name, make, draw, least))
        return make

    return register


class Wired(nn.Module):
    """Modules by name, and how a value goes through them: a forward without a class."""

    def __init__(self, wiring: Callable[[Any, Any], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Any:
        """Return what the function does."""
        return self.wiring(self, x)


def lively(model: nn.Module) -> nn.Module:
    """Give every norm statistics and parameters of its own: γ of either sign and 0, means far from 0."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 3.1)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
                norm.weight.data[0] = 0.0
    return model.eval()


def positive(model: nn.Module) -> nn.Module:
    """Make every γ of a lively model positive."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.weight.data.abs_().add_(0.1)
    return model


def unshifted(model: nn.Module) -> nn.Module:
    """Make the norms of a lively model scale only, to the last bit."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            norm.running_mean.zero_()
            nn.init.zeros_(norm.bias)
    return model


def noise(*shape: int) -> Inputs:
    """Return a draw of one float64 tensor."""
    return lambda generator: (torch.randn(*shape, generator=generator, dtype=torch.float64),)


def numbers(high: int, *shape: int) -> Inputs:
    """Return a draw of one tensor of whole numbers, 0 among them."""
    return lambda generator: (torch.randint(0, high, shape, generator=generator).index_fill_(-1, torch.tensor(0), 0),)
