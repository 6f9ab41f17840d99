"""The exchange of norms' classes: torch's for this library's, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.models.preconditions import lazy_names
from batchnorm.models.snapshot import Structure, restored_if_raised
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.frozen import THAWED, state_of
from batchnorm.nn.norm_act import timms_classes
from batchnorm.nn.select import NormModule, named_norms

__all__ = ["OURS", "TORCHS", "become_torchs", "cannot_revert", "class_name", "swap", "why_left"]

OURS: dict[type[Module], type[Module]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
"""Torch's layers, and those of this library that take their place; timm's are added when a model may have them."""

TORCHS = {ours: torchs for torchs, ours in OURS.items()}
# What our layers have beyond torch's: nothing of it stays behind.
_EXTRA_ATTRIBUTES = ("activation", "inplace", "fused", "skip_nonfinite", "layer_name", "_refused")


def _meet_timms() -> None:
    for timms, ours in timms_classes().items():
        OURS[timms] = ours
        TORCHS[ours] = timms


def swap(
    model: Module, classes: Mapping[type[Module], type[Module]]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Exchange the class of each norm of ``model`` that can take another: all of them, or none if something raises.

    Args:
        model: is changed itself.
        classes: which class takes the place of which, ``OURS`` or ``TORCHS``.

    Returns:
        The names of the norms that changed, and (name, reason) of those that did not.
    """
    _meet_timms()
    norms = named_norms(model)
    left = {name: why for name, norm in norms.items() if (why := why_left(norm, classes)) is not None}
    todo = {name: norm for name, norm in norms.items() if name not in left}
    with restored_if_raised(Structure(todo.values())):
        for name, norm in todo.items():
            if classes is TORCHS:
                become_torchs(norm)
                continue
            norm.__class__ = classes[type(norm)]  # type: ignore[assignment]
            if name:
                norm.__dict__["layer_name"] = name
            if norm.num_batches_tracked is not None:  # now, for compiled code cannot make it
                norm._refusals(norm.num_batches_tracked)  # type: ignore[operator]
    return tuple(todo), tuple(left.items())


def become_torchs(norm: NormModule) -> None:
    """Make a layer of this library torch's own of the same name; nothing of what it has beyond that stays behind."""
    norm.__class__ = TORCHS[type(norm)]  # type: ignore[assignment]
    for attribute in _EXTRA_ATTRIBUTES:
        norm.__dict__.pop(attribute, None)
    _narrow_statistics(norm)


def _narrow_statistics(norm: NormModule) -> None:
    """Cast the running statistics to the dtype of γ and β, as ``half()`` does: torch's kernels want one for all."""
    dtypes = {p.dtype for p in norm._parameters.values() if p is not None}
    if len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}:
        (dtype,) = dtypes
        floating = {k: b for k, b in norm._buffers.items() if b is not None and b.is_floating_point()}
        # a new dictionary: whoever takes the exchange back has the old one
        norm.__dict__["_buffers"] = {**norm._buffers, **{k: b.to(dtype) for k, b in floating.items()}}


def why_left(norm: Module, classes: Mapping[type[Module], type[Module]]) -> str | None:
    """Return why a norm keeps its class, or None if it does not."""
    cls = type(norm)
    if cls in classes:
        if "forward" in norm.__dict__:
            return "its forward was replaced on the instance"
        taken = [name for name in (*_EXTRA_ATTRIBUTES, "center", "scale") if classes is OURS and hasattr(norm, name)]
        if taken:
            return f"has an attribute {taken[0]!r} of its own, which means something else in batchnorm's layers"
        return None
    if cls in classes.values():
        return f"is {class_name(cls)} already"
    if is_parametrized(norm):
        return "is parametrized: remove the parametrization first"
    if state_of(norm) != THAWED:
        return "is frozen: unfreeze it first"
    if lazy_names(norm):
        return "is lazy: run the model once first"
    if isinstance(norm, torch.nn.SyncBatchNorm):
        return "is SyncBatchNorm, which synchronizes processes"
    return f"is {class_name(cls)}, a subclass whose own behaviour would be lost"


def cannot_revert(norm: Module) -> str | None:
    """Return why torch's layer cannot take the place of one of this library's, as a clause; None if it can."""
    _meet_timms()
    if not isinstance(norm, tuple(TORCHS)):
        return None
    if type(norm) in TORCHS:
        activation = norm.activation
        return None if activation is None else f"applies {activation}; torch's batch norm has no activation."
    return f"{why_left(norm, TORCHS)}."


def class_name(cls: type[Module]) -> str:
    """Return a class's name with its package: two classes here are called BatchNorm2d."""
    package = cls.__module__.split(".")[0]
    return f"{package}.nn.{cls.__name__}" if package in ("torch", "batchnorm") else f"{cls.__module__}.{cls.__name__}"
