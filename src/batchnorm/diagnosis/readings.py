"""The metric of each batch, of its own outputs and of those of other samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.diagnosis.kept_batches import batch_size
from batchnorm.errors import ArgumentTypeError, BatchError
from batchnorm.statistics.stream import in_one_line

__all__ = ["Measure", "Reader", "Reading"]

Measure: TypeAlias = Callable[[Any, Any], Any]
"""A loss or a metric: from the model's output and the batch to a number, the mean over the samples of the batch."""


@dataclass(frozen=True)
class Reading:
    """The metric of one batch.

    Attributes:
        samples: how many samples the batch has.
        value: of the outputs for it.
        turned: of the same outputs in reverse order; None where the metric does not take them.
        other: of outputs of other samples: those of the first batch, in reverse order, where they are enough.
        ideal: of the outputs for a batch in which they are what was wanted; None where nobody knows how to make one.
        zeros: of outputs that are all zero, which know nothing; None without ideal.
    """

    samples: int
    value: float
    turned: float | None
    other: float | None
    ideal: float | None = None
    zeros: float | None = None


class Reader:
    """Takes the metric of one batch after the other.

    A metric that compares outputs with what belongs to the samples is better if that is what the model gives, which
    tells whether more is better; and of outputs of other samples it is what it is by chance.
    """

    def __init__(self, metric: Measure) -> None:
        self._metric = metric
        self._first: tuple[Any, int] | None = None
        self.readings: list[Reading] = []

    def take(self, output: Any, batch: Any, index: int) -> None:
        """Take the metric of one batch.

        Raises:
            ArgumentTypeError: it is no number.
            BatchError: the metric failed.
        """
        size = batch_size(batch)
        value = self._value(output, batch, index)
        turned = self._tried(_reversed(output, size, size), batch)
        other = turned
        if self._first is None:
            self._first = output, size
        elif self._first[1] >= size:
            other = self._tried(_reversed(*self._first, size), batch)
        wished = _wished(output, batch, size)
        ideal = zeros = None
        if wished is not None:
            ideal, zeros = self._tried(output, wished), self._tried(_zeros(output), batch)
        self.readings.append(Reading(size, value, turned, other, ideal, zeros))

    @property
    def mean(self) -> float:
        """The mean over all samples."""
        return sum(r.samples * r.value for r in self.readings) / max(sum(r.samples for r in self.readings), 1)

    def _tried(self, output: Any, batch: Any) -> float | None:
        try:
            with torch.no_grad():
                return _number(self._metric(output, batch))
        except Exception:  # it may count on more than the shapes of what the model gives
            return None

    def _value(self, output: Any, batch: Any, index: int) -> float:
        try:
            with torch.no_grad():
                value = self._metric(output, batch)
        except Exception as error:
            raise BatchError(
                f"diagnose: loss_or_metric failed on batch {index} (counting from 0): {in_one_line(error)} It is "
                "called with the model's output and the batch, as the loader gave it. The model is as it was."
            ) from error
        number = _number(value)
        if number is not None:
            return number
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentTypeError(
            f"diagnose: loss_or_metric: expected one number, the mean over the batch; got {kind} on batch {index}."
        )


def _number(value: Any) -> float | None:
    one = isinstance(value, Tensor) and value.numel() == 1
    return float(value) if one or isinstance(value, int | float) else None


def _reversed(output: Any, size: int, wanted: int) -> Any:
    """Return the outputs of the last ``wanted`` of ``size`` samples, the last one first."""

    def turn(leaf: Any) -> Any:
        fits = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
        return leaf.flip(0)[:wanted] if fits else leaf

    return tree_map(turn, output)


def _zeros(output: Any) -> Any:
    return tree_map(lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf, output)


def _wished(output: Any, batch: Any, size: int) -> Any:
    """Return the batch with the model's own outputs for its classes or values; None if it holds nothing like that."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    given = next((leaf.detach() for leaf in tensors if leaf.dim() > 0 and len(leaf) == size), None)
    if given is None:
        return None
    changed: list[Tensor] = []

    def change(leaf: Any) -> Any:
        wanted = _as_target(leaf, given) if isinstance(leaf, Tensor) else None
        if wanted is not None:
            changed.append(wanted)
        return leaf if wanted is None else wanted

    wished = tree_map(change, batch)
    return wished if changed else None


def _as_target(leaf: Tensor, output: Tensor) -> Tensor | None:
    """Return what a leaf of the batch would be if the outputs were wanted; None if it holds no classes or values."""
    if leaf.shape == output.shape:
        return output.to(leaf.dtype) if leaf.is_floating_point() else (output > 0).to(leaf.dtype)
    if leaf.is_floating_point():
        return output.reshape(leaf.shape).to(leaf.dtype) if _same_without_ones(leaf, output) else None
    classes = output.dim() > 1 and output.shape[1] > 1 and leaf.shape == output.shape[:1] + output.shape[2:]
    return output.argmax(1).to(leaf.dtype) if classes else None


def _same_without_ones(a: Tensor, b: Tensor) -> bool:
    return [n for n in a.shape if n > 1] == [n for n in b.shape if n > 1]
