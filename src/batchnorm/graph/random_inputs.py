"""Other inputs for a model, drawn like the example's: what holds for the example only shows up on these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["random_like"]


def random_like(example_inputs: Any, seed: int = 0) -> Any:
    """Return inputs of the same shapes, types and devices with other values.

    Floating-point tensors are normal, with the mean and the deviation of the example's (0 and 1 for a constant one),
    and absolute values where it has no negative ones. Of all others, indices and masks, the elements change places,
    so that they stay valid. What is no tensor stays.

    >>> sorted(random_like(torch.tensor([3, 1, 2])).tolist())
    [1, 2, 3]
    """
    generator = torch.Generator().manual_seed(seed)
    return tree_map(lambda leaf: _drawn(leaf, generator) if isinstance(leaf, Tensor) else leaf, example_inputs)


def _drawn(example: Tensor, generator: torch.Generator) -> Tensor:
    if not example.is_floating_point():
        order = torch.randperm(example.numel(), generator=generator)
        return example.detach().reshape(-1)[order.to(example.device)].reshape(example.shape)
    values = example.detach().double().cpu()
    finite = values[torch.isfinite(values)]
    mean, deviation = (float(finite.mean()), float(finite.std(correction=0))) if finite.numel() else (0.0, 0.0)
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    if deviation == 0:  # a placeholder, which says nothing of what the model takes
        return torch.empty_like(example).copy_(noise)
    drawn = mean + deviation * noise
    if bool((finite >= 0).all()):
        drawn = drawn.abs()
    return torch.empty_like(example).copy_(drawn)
