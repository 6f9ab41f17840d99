"""A model run on its example inputs, as they are or in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from batchnorm.dataflow.example_error import example_error
from batchnorm.models.calling import call_on_example, compiled_modules_eager, fresh_inputs
from batchnorm.models.outputs import NamedTensor, named_tensors
from batchnorm.models.several import Several, draw_for
from batchnorm.models.snapshot import untouched

__all__ = ["as_float64", "of_runs", "run"]


def run(model: Module, example_inputs: Any, number: int = 0) -> list[NamedTensor]:
    """Return the tensors that the model gives for the inputs; model, inputs and random generators stay as they are.

    For several inputs (:class:`batchnorm.models.several.Several`) they are those of all runs.

    Args:
        model: the model.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; or several of these.
        number: of the run, which decides what the model draws (see :func:`draw_for`).

    Raises:
        InputError: the model fails on the inputs.
    """
    if isinstance(example_inputs, Several):
        return of_runs([run(model, inputs, i) for i, inputs in enumerate(example_inputs)], example_inputs)
    with untouched(model), torch.no_grad(), compiled_modules_eager:
        draw_for(number)
        try:
            return named_tensors(call_on_example(model, fresh_inputs(example_inputs)))
        except Exception as error:
            raise example_error(model, error) from error


def of_runs(outputs: Sequence[list[NamedTensor]], inputs: Several) -> list[NamedTensor]:
    """Return the outputs of several runs as one list, each named after its run; of the first inputs as they are."""
    return [
        NamedTensor(f"{output.where} on {label}" if i else output.where, output.tensor)
        for i, (of_run, label) in enumerate(zip(outputs, inputs.labels, strict=False))
        for output in of_run
    ]


def as_float64(example_inputs: Any) -> Any:
    """Return the inputs with floating-point tensors in float64, complex ones in complex128."""
    if isinstance(example_inputs, Several):
        return example_inputs.map(as_float64)
    return tree_map(_to_float64, example_inputs)


def _to_float64(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_complex():
        return leaf.to(torch.complex128)
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
