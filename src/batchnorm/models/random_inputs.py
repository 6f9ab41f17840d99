"""Other inputs for a model, drawn like the example's: what holds for the example only shows up on these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["random_like"]


def random_like(
    example_inputs: Any,
    seed: int = 0,
    *,
    shapes: Mapping[int, tuple[int, ...]] | None = None,
    factor: float = 1.0,
    shift: float = 0.0,
) -> Any:
    """Return inputs of the same shapes, types and devices with other values.

    Floating-point tensors are normal, with the mean and the deviation of the example's (0 and 1 for a constant one),
    and absolute values where it has no negative ones. Of all others, indices and masks, the elements change places,
    so that they stay valid. What is no tensor stays.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        seed: of the generator.
        shapes: other shapes of tensors, by their number among the leaves. Elements of indices and masks are drawn from
            those that are there, then.
        factor: what floating-point tensors are multiplied by.
        shift: what is added to them then, in deviations.

    >>> sorted(random_like(torch.tensor([3, 1, 2])).tolist())
    [1, 2, 3]
    >>> random_like((torch.ones(2, 3), 7), shapes={0: (1, 5)})[0].shape
    torch.Size([1, 5])
    """
    generator = torch.Generator().manual_seed(seed)
    leaves, structure = tree_flatten(example_inputs)
    shapes = shapes or {}
    drawn = [
        _drawn(leaf, tuple(shapes.get(number, leaf.shape)), generator, factor, shift)
        if isinstance(leaf, Tensor)
        else leaf
        for number, leaf in enumerate(leaves)
    ]
    return tree_unflatten(drawn, structure)


def _drawn(example: Tensor, shape: tuple[int, ...], generator: torch.Generator, factor: float, shift: float) -> Tensor:
    if example.is_meta:  # it has no values
        return example.detach().new_empty(shape)
    if not example.is_floating_point():
        return _others_of(example, shape, generator)
    values = example.detach().double().cpu()
    finite = values[torch.isfinite(values)]
    mean, deviation = (float(finite.mean()), float(finite.std(correction=0))) if finite.numel() else (0.0, 0.0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    like = example.detach()
    empty = torch.empty_like(like) if shape == tuple(like.shape) else like.new_empty(shape)
    if deviation == 0:  # a placeholder, which says nothing of what the model takes
        return empty.copy_(factor * noise + shift)
    drawn = factor * (mean + deviation * noise) + shift * deviation
    if bool((finite >= 0).all()):
        drawn = drawn.abs()
    return empty.copy_(drawn)


def _others_of(example: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return elements of an example in another order; of another shape, so many of them, some several times."""
    elements = example.detach().reshape(-1)
    if shape == tuple(example.shape):
        order = torch.randperm(example.numel(), generator=generator, device="cpu")
    else:
        order = torch.randint(max(example.numel(), 1), (torch.Size(shape).numel(),), generator=generator, device="cpu")
    return elements[order.to(example.device)].reshape(shape)
