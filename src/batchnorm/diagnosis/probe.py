"""Whether samples of a batch see each other, and where: the same samples with other batch-mates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from batchnorm.diagnosis.kept_batches import batch_size, rows
from batchnorm.diagnosis.passes import Passes
from batchnorm.models.calling import below_autograd
from batchnorm.models.module_hooks import module_hooks
from batchnorm.models.several import draw_for

__all__ = ["Leak", "find_leak", "order_of"]

_MOST_SAMPLES = 16


@dataclass(frozen=True)
class Leak:
    """A module at which samples see each other.

    Attributes:
        layer: its name.
        difference: the largest difference of its outputs for the same samples.
        size: the largest of these outputs.
    """

    layer: str
    difference: float
    size: float


@dataclass(frozen=True)
class _Call:
    """What one module was given, and returned, for the samples that stay."""

    name: str
    given: tuple[Tensor, ...]
    returned: tuple[Tensor, ...]


def find_leak(passes: Passes) -> Leak | None:
    """Return where samples see each other in eval mode, or None if they do not, or it cannot be told.

    Both runs have batches of the same size, so that the same kernels serve them, and the same random numbers.
    """
    whole = max(passes.batches, key=batch_size)
    size = min(batch_size(whole), 2 * _MOST_SAMPLES) // 2 * 2
    if size < 4:
        return None
    stay = size // 2
    first = rows(whole, slice(0, size))
    swapped = rows(whole, torch.cat([order := torch.arange(stay, device="cpu"), order.flip(0)]))
    try:
        calls, other, again = (_record(passes, batch, size, stay) for batch in (first, swapped, first))
    except Exception:  # a model may refuse repeated samples for reasons of its own
        return None
    leak = _first_difference(calls, other)
    # a model that does not give the same twice cannot be told from one whose samples see each other
    return leak if leak is not None and _first_difference(calls, again) is None else None


def _first_difference(calls: list[_Call], other: list[_Call]) -> Leak | None:
    for one, two in zip(calls, other, strict=False):
        if one.name != two.name:
            return None
        if _apart(one.given, two.given)[0] == 0 and (found := _apart(one.returned, two.returned))[0] > 0:
            return Leak(one.name, *found)
    return None


def _apart(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> tuple[float, float]:
    """Return the largest difference beyond rounding, or 0, and the largest value."""
    for a, b in zip(one, two, strict=False):
        if a.shape != b.shape or not a.numel():
            continue
        difference = float((a.double() - b.double()).abs().nan_to_num(0.0).max())
        size = float(a.double().abs().nan_to_num(0.0).max())
        if difference > torch.finfo(a.dtype).eps ** 0.5 * max(size, 1e-30):
            return difference, size
    return 0.0, 0.0


def _record(passes: Passes, batch: Any, size: int, stay: int) -> list[_Call]:
    """Run the model on a batch and return every call of a module, in the order in which they end."""
    names = {id(module): name for name, module in passes.model.named_modules()}
    calls: list[_Call] = []
    open_calls: list[tuple[Module, tuple[Tensor, ...]]] = []

    def staying(values: Any) -> tuple[Tensor, ...]:
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return tuple(leaf.detach()[:stay].clone() for leaf in leaves if leaf.dim() > 0 and len(leaf) == size)

    def enter(module: Module, args: Any) -> None:
        if id(module) in names:
            open_calls.append((module, staying(args)))

    def leave(module: Module, args: Any, output: Any) -> None:
        if id(module) in names and open_calls and open_calls[-1][0] is module:
            calls.append(_Call(names[id(module)], open_calls.pop()[1], staying(output)))

    draw_for(1)
    with module_hooks(enter, leave), below_autograd():
        passes.outputs(batch)
    return calls


def order_of(passes: Passes) -> dict[str, int]:
    """Return the place of every module in the order in which they are first called; empty if the model fails."""
    names = {id(module): name for name, module in passes.model.named_modules()}
    order: dict[str, int] = {}

    def enter(module: Module, args: Any) -> None:
        if id(module) in names:
            order.setdefault(names[id(module)], len(order))

    with module_hooks(enter, lambda module, args, output: None), below_autograd():
        passes.outputs(passes.batches[0])
    return order
