"""What a model returns, as a flat list of tensors with names, and how two such lists differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from batchnorm.models.float64 import to_float64

__all__ = ["Difference", "NamedTensor", "difference", "magnitude", "named_tensors", "scale_of"]


@dataclass(frozen=True)
class NamedTensor:
    """A tensor somewhere in an output, and where: ``"['logits']"``."""

    where: str
    tensor: Tensor

    @property
    def is_float(self) -> bool:
        """Whether rounding may show in it."""
        return self.tensor.is_floating_point() or self.tensor.is_complex()


def named_tensors(output: Any) -> list[NamedTensor]:
    """Return copies of the tensors in nested tuples, lists, dicts, dataclasses and other objects, in a fixed order."""
    return list(_walk("", output, set()))


def _walk(where: str, output: Any, seen: set[int]) -> Iterator[NamedTensor]:
    for path, leaf in tree_flatten_with_path(output)[0]:
        place = where + keystr(path)
        if isinstance(leaf, Tensor):
            yield NamedTensor(place, (leaf.to_dense() if leaf.layout != torch.strided else leaf).detach().clone())
        elif id(leaf) not in seen and not isinstance(leaf, type | torch.nn.Module) and hasattr(leaf, "__dict__"):
            seen.add(id(leaf))
            is_record = dataclasses.is_dataclass(leaf)
            for name in [f.name for f in dataclasses.fields(leaf)] if is_record else sorted(vars(leaf)):
                yield from _walk(f"{place}.{name}", getattr(leaf, name), seen)


@dataclass(frozen=True)
class Difference:
    """How far two outputs are apart.

    Attributes:
        largest: the greatest absolute difference of two finite numbers; infinite if the shapes or types differ, or if
            one is finite where the other is not.
        compared: how many pairs of finite numbers were compared.
    """

    largest: float
    compared: int


def difference(a: Tensor, b: Tensor) -> Difference:
    """Compare two tensors. NaN agrees with NaN and an infinity with itself; such places count as not compared.

    Integers and truth values are compared like numbers.
    """
    if a.shape != b.shape or a.is_complex() != b.is_complex():
        return Difference(float("inf"), 0)
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = to_float64(a), to_float64(b)
    largest = magnitude(a - b) if a.numel() else 0.0
    if math.isfinite(largest):  # as nearly always: then all numbers are
        return Difference(largest, a.numel())
    finite = torch.isfinite(a)
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not torch.equal(
        torch.stack([a.isnan(), finite]), torch.stack([b.isnan(), torch.isfinite(b)])
    ):
        return Difference(float("inf"), 0)
    gaps = (a[finite] - b[finite]).abs()
    return Difference(float(gaps.max()) if gaps.numel() else 0.0, gaps.numel())


def scale_of(tensor: Tensor) -> float:
    """Return the greatest finite magnitude in a tensor, 0 if there is none."""
    if tensor.is_complex():
        tensor = tensor.abs()
    if not tensor.numel():
        return 0.0
    largest = magnitude(tensor)
    if math.isfinite(largest):
        return largest
    finite = tensor[torch.isfinite(tensor)]
    return magnitude(finite) if finite.numel() else 0.0


def magnitude(tensor: Tensor) -> float:
    """Return the greatest magnitude of real numbers, NaN if one is NaN: in one reading, without a copy."""
    low, high = (float(value) for value in torch.aminmax(tensor.detach()))
    return math.nan if math.isnan(low) or math.isnan(high) else max(abs(low), abs(high))
