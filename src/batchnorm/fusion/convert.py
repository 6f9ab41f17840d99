"""From torch's batch norm layers to this library's, fused with what follows them, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from batchnorm.dataflow.sizes import runs_of
from batchnorm.dataflow.trace import trace
from batchnorm.errors import ArgumentTypeError, StateError
from batchnorm.fusion.check import mark, mark_those_that_hold
from batchnorm.fusion.find import find_fusions
from batchnorm.fusion.result import ConvertResult, FusedNorm
from batchnorm.models.copying import copy_model
from batchnorm.models.preconditions import require_module, require_readable
from batchnorm.models.snapshot import Structure, restored_if_raised
from batchnorm.models.transaction import transaction
from batchnorm.nn.provenance import with_provenance
from batchnorm.nn.select import named_norms
from batchnorm.nn.swap import OURS, TORCHS, cannot_revert, swap

__all__ = ["convert", "revert"]


@transaction("convert")
@with_provenance("convert")
def convert(
    model: Module,
    example_inputs: Any = None,
    *,
    fuse: bool = False,
    inplace: bool = False,
    skip_nonfinite: bool = True,
) -> ConvertResult:
    r"""Turn every ``torch.nn.BatchNorm1d/2d/3d`` of a model into this library's layer of the same name.

    Only the class of the layers changes, so that parameters, buffers, hooks, train/eval modes, what an optimizer holds,
    and who shares a layer with whom stay as they are; the numbers do too. Each layer learns its name, and its errors
    say it. :func:`revert` is the way back.

    Layers of another class are left, each with its reason: subclasses (their own forward would be lost),
    ``SyncBatchNorm``, parametrized, frozen and lazy norms.

    With ``fuse``, the model is run once on the example inputs to see what follows each norm, and where that is an
    activation, or an addition and then an activation,

    .. math::

        y = \mathrm{act}\!\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \mathrm{residual}\right)

    is computed in one call of :func:`batchnorm.functional.batch_norm`, in training and in evaluation. Code, modules and
    state dict of the model stay as they are: a marked layer returns a tensor that waits (:mod:`batchnorm.nn.pending`),
    and the activation, wherever it is called, finds the whole. Anything else that reads such a tensor gets what the
    norm alone would have returned. Outputs and running statistics are compared with the unfused model's, in evaluation
    and in training; a norm with which they differ by more than rounding is not fused.

    Args:
        model: any model, or a norm itself.
        example_inputs: for ``fuse``: a tensor, a tuple of positional or a dict of keyword arguments.
        fuse: compute norms together with the activations and additions that follow them.
        inplace: change the model itself, not a deep copy of it.
        skip_nonfinite: of the new layers, see :class:`batchnorm.nn.BatchNorm1d`.

    Returns:
        A result whose ``model`` has the new layers; ``converted`` and ``left`` say which, ``fused`` and ``unfused``
        which of them are fused, with a reason for each that is not.

    Raises:
        ArgumentTypeError: ``model`` is no module, or ``example_inputs`` are given without ``fuse``.
        InputError: the model fails on the example inputs.
        StateError: the model cannot be copied (pass ``inplace=True``), ``fuse`` has no example inputs, or the model to
            fuse is scripted or lazy. As after every other exception, the model is as it was.

    Example:
        >>> import torch
        >>> from batchnorm.fusion.convert import convert, revert
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> result = convert(model)
        >>> result
        <ConvertResult: 1 of 1 norms converted.>
        >>> type(result.model[1]).__module__, type(revert(result.model).model[1]).__module__
        ('batchnorm.nn.batch_norm', 'torch.nn.modules.batchnorm')
        >>> for norm in convert(model, torch.randn(2, 3, 8, 8), fuse=True).fused:
        ...     print(norm)
        1 → relu in 2: fused.
    """
    require_module("convert", model)
    if fuse:
        require_readable("convert", model)
        if example_inputs is None:
            raise StateError(
                "convert: fuse=True runs the model to see what follows its norms, and there is nothing to run it on. "
                "Pass example inputs: convert(model, example_inputs, fuse=True)."
            )
    elif example_inputs is not None:
        raise ArgumentTypeError(
            f"convert: expected example_inputs with fuse=True only; got {type(example_inputs).__name__} without it. "
            "Pass fuse=True, or leave them out."
        )
    fused: tuple[FusedNorm, ...] = ()
    unfused: tuple[tuple[str, str], ...] = ()
    # tensors that are made in inference mode, those of the copy among them, could not be trained or written into later
    with torch.inference_mode(False):
        target = _target("convert", model, inplace)
    with torch.inference_mode(False), restored_if_raised(Structure(named_norms(target).values())):
        converted, left = swap(target, OURS)
        for name in converted if not skip_nonfinite else ():
            target.get_submodule(name).__dict__["skip_nonfinite"] = False
        if fuse:
            fused, unfused = _fuse(target, example_inputs)
    return ConvertResult(target, converted, left, "convert", fused, unfused)


@transaction("revert")
@with_provenance("revert")
def revert(model: Module, *, inplace: bool = False) -> ConvertResult:
    """Turn this library's layers into torch's own again: class and attributes are as if they had never been others.

    Args:
        model: a model with layers of this library, or such a layer itself.
        inplace: change the model itself, not a deep copy of it.

    Returns:
        A result whose ``model`` has torch's layers; ``converted`` and ``left`` say which.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        StateError: a layer does what torch's cannot, or is frozen, and the message lists them; or the model cannot be
            copied: pass ``inplace=True``. Nothing is changed then.

    Example:
        >>> from batchnorm.fusion.convert import revert
        >>> from batchnorm.nn import BatchNorm1d
        >>> type(revert(BatchNorm1d(2)).model)
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
        >>> revert(BatchNorm1d(2, activation="relu"))
        Traceback (most recent call last):
            ...
        batchnorm.errors.StateError: revert: torch's layers cannot take the place of these.
        BatchNorm1d: applies relu; torch's batch norm has no activation.
    """
    require_module("revert", model)
    stuck = [
        f"{name or type(norm).__name__}: {reason}"
        for name, norm in named_norms(model).items()
        if (reason := cannot_revert(norm)) is not None
    ]
    if stuck:
        raise StateError("revert: torch's layers cannot take the place of these.\n" + "\n".join(stuck))
    with torch.inference_mode(False):
        target = _target("revert", model, inplace)
        return ConvertResult(target, *swap(target, TORCHS), "revert")


def _target(verb: str, model: Module, inplace: bool) -> Module:
    return model if inplace else copy_model(verb, model, "Pass inplace=True to change the model itself.")


def _fuse(model: Module, example_inputs: Any) -> tuple[tuple[FusedNorm, ...], tuple[tuple[str, str], ...]]:
    """Mark the norms of ``model`` that can be fused; return them, and why not the others."""
    norms = named_norms(model)
    with torch.inference_mode(False):
        mark(norms, ())
        runs = runs_of("convert", model, example_inputs)
        graph = trace(model, runs)
        found, refused = find_fusions(model, graph)
        alone, _ = find_fusions(model, graph.of_run(0))
        for name in refused.keys() & alone.keys():
            refused[name] = f"With the example inputs it could be, but not with inputs of other sizes. {refused[name]}"
        refused |= mark_those_that_hold(model, runs, norms, list(found))
    fused = tuple(norm for name, norm in found.items() if name not in refused)
    return fused, tuple((name, refused[name]) for name in norms if name in refused)
