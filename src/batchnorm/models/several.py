"""Inputs on which a model is run one after the other: one run is one witness, several tell what is not a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["EXAMPLE", "Several", "draw_for", "each", "first", "labelled"]

EXAMPLE = "the example inputs"


@dataclass(frozen=True, eq=False)
class Several:
    """Example inputs of several runs. Whatever takes example inputs in this package takes these too.

    Attributes:
        inputs: of each run a tensor, a tuple of positional or a dict of keyword arguments; the example's first.
        labels: what a sentence calls each of them: ``"inputs of shape (1, 3, 33, 45)"``.
    """

    inputs: tuple[Any, ...]
    labels: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]:
        """Yield the inputs of each run."""
        return iter(self.inputs)

    def map(self, change: Callable[[Any], Any]) -> Several:
        """Return the same with other inputs, made of those of each run."""
        return Several(tuple(change(inputs) for inputs in self.inputs), self.labels)


def draw_for(number: int) -> None:
    """Let a run draw other random numbers than the runs before it: what depends on them is no constant of the model.

    Run 0, on the example inputs, draws what it would have drawn anyway. Whoever calls this puts the generators back.
    """
    if not number:
        return
    torch.default_generator.manual_seed(number)
    # torch.manual_seed would note the seed for a CUDA that is loaded later on, where nobody puts it back
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            device.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def each(example_inputs: Any) -> tuple[Any, ...]:
    """Return the inputs of each run: those of several, or the only ones."""
    return example_inputs.inputs if isinstance(example_inputs, Several) else (example_inputs,)


def labelled(example_inputs: Any) -> tuple[tuple[Any, str], ...]:
    """Return the inputs of each run, each with what a sentence calls it."""
    labels = example_inputs.labels if isinstance(example_inputs, Several) else (EXAMPLE,)
    return tuple(zip(each(example_inputs), labels, strict=True))


def first(example_inputs: Any) -> Any:
    """Return the inputs of the first run, which are the example's."""
    return each(example_inputs)[0]
