"""A folded model with its norms back, to go on training it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from batchnorm.errors import StateError
from batchnorm.folding.writing.record import FoldRecord, digest
from batchnorm.folding.writing.record_data import fitting
from batchnorm.models.copying import copy_model
from batchnorm.models.modules import put_module
from batchnorm.models.parameters import find_tensor, put_parameter, qualified
from batchnorm.models.preconditions import require_module
from batchnorm.models.snapshot import Structure
from batchnorm.models.transaction import on_failure, transaction
from batchnorm.nn.bordered import plain

__all__ = ["unfold"]


@transaction("unfold")
def unfold(
    model: Module, pairs: FoldRecord | str | Path, *, like: Module | None = None, inplace: bool = False
) -> Module:
    """Give a folded model the norms, statistics and weights back that it had, to go on training it.

    The norms, and the parameters that took one in, are those from before the folding, bit for bit; everything else is
    the model's. Types and devices are those that the folded parameters have now.

    Args:
        model: a model that :func:`batchnorm.fold` returned, or one into which its weights were loaded (see
            :func:`batchnorm.refold`).
        pairs: of that fold: ``result.pairs``, or the file that ``result.save_pairs(path)`` wrote.
        like: a model of the original architecture, for norms of classes that are not torch's, from a file.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The model with its norms.

    Raises:
        InputError: the file holds no pairs.
        StateError: the model is not the folded one: it lacks a place, or was trained since. It is as it was.

    Example:
        >>> import torch, batchnorm
        >>> from batchnorm.folding.unfold import unfold
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> result = batchnorm.fold(net, torch.randn(1, 3, 8, 8))
        >>> back = unfold(result.model, result.pairs)
        >>> type(back[1]).__name__, torch.equal(back[0].weight, net[0].weight)
        ('BatchNorm2d', True)
    """
    require_module("unfold", model)
    known = FoldRecord.given("unfold", pairs, like)
    _require_folded(model, known)
    target = model if inplace else copy_model("unfold", model, "Unfold it in place: inplace=True.")
    on_failure(Structure(target.modules()).restore)
    with fitting("unfold"):
        _put_modules_back(target, known)
        for name, tensor in known.parameters.items():
            now = find_tensor(target, name)
            assert now is not None
            new = None if tensor is None else Parameter(tensor.detach().to(now).clone(), now.requires_grad)
            put_parameter(target, name, new)
        _tie(target, known.ties)
    return target


def _put_modules_back(target: Module, known: FoldRecord) -> None:
    activations = {name: target.get_submodule(qualified(holder, "activation")) for name, holder in known.moved.items()}
    norms = list({id(norm): norm for norm in known.norms.values()}.values())
    # all in one: what they have in common stays one
    together = copy_model("unfold", ModuleList(norms), "Keep the original model instead.")
    device = _device_of(target, known)
    if any(tensor.device != device for tensor in (*together.parameters(), *together.buffers())):
        together.to(device)  # only then: layers of this library take statistics of half precision to float32 on the way
    copies = dict(zip(map(id, norms), together.children(), strict=True))
    for name, norm in known.norms.items():
        copies[id(norm)].train(target.get_submodule(name).training)
        put_module(target, name, copies[id(norm)])
    for name, activation in activations.items():
        put_module(target, name, activation)
    convs = {name: target.get_submodule(name) for name in known.bordered if name not in known.norms}
    twins = {id(conv): plain(conv) for conv in convs.values()}
    for name, conv in convs.items():
        put_module(target, name, twins[id(conv)])


def _tie(model: Module, tied: Mapping[str, str]) -> None:
    """Make parameters one again that were one, unless they have become different since."""
    for name, other in tied.items():
        one, two = find_tensor(model, name), find_tensor(model, other)
        if isinstance(one, Parameter) and isinstance(two, Parameter) and torch.equal(one, two):
            put_parameter(model, name, two)


def _require_folded(model: Module, pairs: FoldRecord) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    places = {**dict.fromkeys(pairs.bordered, "convolution"), **dict.fromkeys(pairs.norms, "module")}
    places |= {qualified(holder, "activation"): "activation" for holder in pairs.moved.values()}
    for name, kind in places.items():
        if name not in modules:
            raise StateError(f"unfold: the model has no {kind} {name}. Pass the one that was folded, or its like.")
    for name, before in pairs.parameters.items():
        now = _find(model, name)
        if now is not None and before is not None and before.shape != now.shape:
            raise StateError(
                f"unfold: expected {name} of shape {tuple(now.shape)}, which the model has; the pairs have it of "
                f"{tuple(before.shape)}. Pass the pairs of this model's fold."
            )
    for name, known in pairs.digests.items():
        tensor = _find(model, name)
        if tensor is None:
            raise StateError(f"unfold: the model has no parameter {name}. Pass the one that was folded, or its like.")
        if digest(tensor) != known:
            raise StateError(
                f"unfold: {name} is not what folding made of it: it was trained, quantized or cast since, so that the "
                "norms do not go with it. Unfold first, and train or cast then."
            )


def _find(model: Module, name: str) -> Tensor | None:
    try:
        return find_tensor(model, name)
    except (AttributeError, KeyError):
        return None


def _device_of(model: Module, pairs: FoldRecord) -> torch.device:
    tensors = (find_tensor(model, name) for name in pairs.digests)
    return next((t.device for t in tensors if t is not None), torch.device("cpu"))
