"""What is said when a model fails on its example inputs."""

from __future__ import annotations

from torch.nn import Module

from batchnorm.errors import InputError
from batchnorm.models.several import EXAMPLE
from batchnorm.nn.half_norms import half_norms

__all__ = ["example_error"]


def example_error(model: Module, error: Exception | None, label: str = EXAMPLE) -> InputError:
    """Return the error to raise from ``error``, which the model raised on the inputs of that label."""
    hint = half_norms(model).rstrip()
    said = f"{type(model).__name__} fails on {label}: {type(error).__name__}: {error}"
    return InputError(f"{said.rstrip('.')}. {hint}" if hint else said)
