"""From torch's batch norm layers to this library's, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.errors import StateError
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.copying import copy_model
from batchnorm.nn.frozen import THAWED, state_of
from batchnorm.nn.require import lazy_names, require_module
from batchnorm.nn.select import named_norms
from batchnorm.report import Document, Paragraph, Result, Section, Table

__all__ = ["ConvertResult", "convert", "revert"]

_OURS: dict[type[Module], type[Module]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}
# What our layers have beyond torch's: nothing of it stays behind.
_EXTRA_ATTRIBUTES = ("activation", "inplace", "layer_name")


@dataclass(frozen=True)
class ConvertResult(Result):
    """What :func:`convert` or :func:`revert` did.

    Attributes:
        model: the model with the new layers.
        converted: the names of the layers that changed class; a shared one is named once.
        left: (name, reason) of every norm that did not.
        verb: ``"convert"`` or ``"revert"``.
    """

    model: Module
    converted: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    verb: str

    def document(self) -> Document:
        """Return one row a norm: changed, or left with the reason."""
        total = len(self.converted) + len(self.left)
        summary = f"{len(self.converted)} of {total} norms {'converted' if self.verb == 'convert' else 'reverted'}."
        norms = dict(self.model.named_modules())
        rows: list[tuple[str, str, str]] = [
            (name, f"now {_class_name(type(norms[name]))}", "") for name in self.converted if name in norms
        ]
        rows += [(name, "left as it is", reason) for name, reason in self.left]
        blocks = [Table(("layer", "", "why"), rows)] if rows else [Paragraph("The model holds no batch norm.")]
        return Document(self.verb.capitalize(), summary, [Section("", blocks)])

    def to_dict(self) -> dict[str, Any]:
        """Return the verb, the names converted, and names and reasons of those left."""
        left = [{"name": name, "reason": reason} for name, reason in self.left]
        return {"verb": self.verb, "converted": list(self.converted), "left": left}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.document().summary}>"


def convert(model: Module, *, inplace: bool = False) -> ConvertResult:
    """Turn every ``torch.nn.BatchNorm1d/2d/3d`` of a model into this library's layer of the same name.

    Only the class of the layers changes, so that parameters, buffers, hooks, train/eval modes, what an optimizer holds,
    and who shares a layer with whom stay as they are; the numbers do too. Each layer learns its name, and its errors
    say it. :func:`revert` is the way back.

    Layers of another class are left, each with its reason: subclasses (their own forward would be lost),
    ``SyncBatchNorm``, parametrized, frozen and lazy norms.

    Args:
        model: any model, or a norm itself.
        inplace: change the model itself, not a deep copy of it.

    Returns:
        A result whose ``model`` has the new layers; ``converted`` and ``left`` say which.

    Raises:
        StateError: the model cannot be copied. Pass ``inplace=True``.

    Example:
        >>> import torch
        >>> from batchnorm.nn.convert import convert, revert
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> result = convert(model)
        >>> result
        <ConvertResult: 1 of 1 norms converted.>
        >>> type(result.model[1]).__module__, type(revert(result.model).model[1]).__module__
        ('batchnorm.nn.batch_norm', 'torch.nn.modules.batchnorm')
    """
    require_module("convert", model)
    return _swap("convert", model, _OURS, inplace)


def revert(model: Module, *, inplace: bool = False) -> ConvertResult:
    """Turn this library's layers into torch's own again: class and attributes are as if they had never been others.

    Args:
        model: a model with layers of this library, or such a layer itself.
        inplace: change the model itself, not a deep copy of it.

    Returns:
        A result whose ``model`` has torch's layers; ``converted`` and ``left`` say which.

    Raises:
        StateError: a layer does what torch's cannot, or is frozen, and the message lists them; or the model cannot be
            copied: pass ``inplace=True``. Nothing is changed then.

    Example:
        >>> from batchnorm.nn import BatchNorm1d, revert
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
        if (reason := _cannot_revert(norm)) is not None
    ]
    if stuck:
        raise StateError("revert: torch's layers cannot take the place of these.\n" + "\n".join(stuck))
    return _swap("revert", model, _TORCHS, inplace)


def _swap(verb: str, model: Module, classes: Mapping[type[Module], type[Module]], inplace: bool) -> ConvertResult:
    target = model if inplace else copy_model(verb, model, "Pass inplace=True to change the model itself.")
    norms = named_norms(target)
    left = {name: why for name, norm in norms.items() if (why := _why_left(norm, classes)) is not None}
    todo = {name: norm for name, norm in norms.items() if name not in left}
    before = [(norm, type(norm), dict(norm.__dict__)) for norm in todo.values()]
    try:
        for name, norm in todo.items():
            norm.__class__ = classes[type(norm)]  # type: ignore[assignment]
            if verb == "revert":
                for attribute in _EXTRA_ATTRIBUTES:
                    norm.__dict__.pop(attribute, None)
            elif name:
                norm.__dict__["layer_name"] = name
    except BaseException:
        _put_back(before)
        raise
    return ConvertResult(target, tuple(todo), tuple(left.items()), verb)


def _put_back(before: Sequence[tuple[Module, type[Module], dict[str, Any]]]) -> None:
    for norm, cls, attributes in before:
        norm.__class__ = cls
        norm.__dict__.clear()
        norm.__dict__.update(attributes)


def _why_left(norm: Module, classes: Mapping[type[Module], type[Module]]) -> str | None:
    """Return why a norm keeps its class, or None if it does not."""
    cls = type(norm)
    if cls in classes:
        if "forward" in norm.__dict__:
            return "its forward was replaced on the instance"
        taken = [name for name in (*_EXTRA_ATTRIBUTES, "center", "scale") if classes is _OURS and hasattr(norm, name)]
        if taken:
            return f"has an attribute {taken[0]!r} of its own, which means something else in batchnorm's layers"
        return None
    if cls in classes.values():
        return f"is {_class_name(cls)} already"
    if is_parametrized(norm):
        return "is parametrized: remove the parametrization first"
    if state_of(norm) != THAWED:
        return "is frozen: unfreeze it first"
    if lazy_names(norm):
        return "is lazy: run the model once first"
    if isinstance(norm, torch.nn.SyncBatchNorm):
        return "is SyncBatchNorm, which synchronizes processes"
    return f"is {_class_name(cls)}, a subclass whose own behaviour would be lost"


def _cannot_revert(norm: Module) -> str | None:
    if not isinstance(norm, tuple(_TORCHS)):
        return None
    if type(norm) in _TORCHS:
        activation = norm.activation
        return None if activation is None else f"applies {activation}; torch's batch norm has no activation."
    return f"{_why_left(norm, _TORCHS)}."


def _class_name(cls: type[Module]) -> str:
    """Return a class's name with its package: two classes here are called BatchNorm2d."""
    package = cls.__module__.split(".")[0]
    return f"{package}.nn.{cls.__name__}" if package in ("torch", "batchnorm") else f"{cls.__module__}.{cls.__name__}"
