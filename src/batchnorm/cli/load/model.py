"""``--model`` and ``--weights``: the user's own model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import Module

from batchnorm.cli.errors import CommandError
from batchnorm.cli.load.objects import call_factory, find_object
from batchnorm.cli.load.weights import fit_weights, read_weights
from batchnorm.report.provenance import source

__all__ = ["load_model"]


def load_model(spec: str, weights: Path | None = None, *, seed: int = 0) -> Module:
    """Return the model that ``spec`` names, with the weights of the file if one is given.

    Args:
        spec: ``package.module:name`` of a module, or of a callable that returns one when called without arguments.
        weights: file of a state dict; it must fit the model exactly.
        seed: of the random generators while the model is built.

    Raises:
        CommandError: any of it cannot be used.
    """
    source("model", spec)
    torch.manual_seed(seed)
    found = find_object("--model", spec)
    if not isinstance(found, Module):
        if not callable(found):
            raise CommandError(f"--model {spec}: expected a torch.nn.Module or a function; got {_kind(found)}.")
        torch.manual_seed(seed)  # once more: importing the module may have drawn numbers
        found = call_factory("--model", spec, found)
        if not isinstance(found, Module):
            raise CommandError(f"--model {spec}: the call returned {_kind(found)}; expected a torch.nn.Module.")
    if weights is not None:
        fit_weights(found, read_weights(weights), weights)
    return found


def _kind(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
