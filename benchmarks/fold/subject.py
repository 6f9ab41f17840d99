"""What is folded: a model that can be built again and again, and inputs for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

__all__ = ["Subject"]


class Subject(ABC):
    """A model and its inputs."""

    name: str

    @abstractmethod
    def build(self) -> nn.Module:
        """Return a new model, the same each time, in float64."""

    @abstractmethod
    def inputs(self, seed: int) -> tuple[Any, ...]:
        """Return one draw of the inputs, in float64."""
