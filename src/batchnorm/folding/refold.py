"""A newly built model in the shape of a folded one: without running it, and without its old weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Identity, Module, Parameter
from torch.nn.modules.conv import _ConvNd

from batchnorm.errors import StateError
from batchnorm.folding.planning.own_weights import untie
from batchnorm.folding.writing.record import FoldRecord
from batchnorm.folding.writing.record_data import fitting
from batchnorm.folding.writing.rewrite import replace_by_id
from batchnorm.models.copying import copy_model
from batchnorm.models.parameters import find_tensor, put_parameter
from batchnorm.models.preconditions import require_module
from batchnorm.models.snapshot import Structure
from batchnorm.models.transaction import on_failure, transaction
from batchnorm.nn.bordered import bordered
from batchnorm.nn.scale_shift import ScaleShift

__all__ = ["refold"]

_ITSELF = "the top of the model"


@transaction("refold")
def refold(model: Module, pairs: FoldRecord | str | Path, *, inplace: bool = False) -> Module:
    """Give a model as its code builds it the shape of the folded one, to load the folded weights into it.

    What folding changed of the module tree is changed again: identities, or activations, in the places of the norms,
    biases where there were none, convolutions that pad with a border. The values are not: new biases and borders are
    zeros until the folded state dict is loaded.

    Args:
        model: of the original architecture, with its norms.
        pairs: of the fold: ``result.pairs``, or the file that ``result.save_pairs(path)`` wrote.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The model, into which ``load_state_dict`` takes the state dict of the folded one.

    Raises:
        InputError: the file holds no pairs.
        StateError: the model is of another architecture, or folded already. It is as it was.

    Example:
        >>> import torch, batchnorm
        >>> from batchnorm.folding.refold import refold
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8)).eval()
        >>> x = torch.randn(1, 3, 8, 8)
        >>> result = batchnorm.fold(build(), x)
        >>> deployed = refold(build(), result.pairs)
        >>> deployed.load_state_dict(result.model.state_dict())
        <All keys matched successfully>
        >>> torch.equal(deployed(x), result.model(x))
        True
    """
    require_module("refold", model)
    known = FoldRecord.given("refold", pairs, like=model)
    _require_original(model, known)
    target = model if inplace else copy_model("refold", model, "Change it in place: inplace=True.")
    on_failure(Structure(target.modules()).restore)
    with fitting("refold"):
        for name, shape in known.added.items():
            module = target.get_submodule(name.rpartition(".")[0])
            like = [p for p in module._parameters.values() if p is not None][0]  # noqa: RUF015 - an error of its own
            put_parameter(target, name, Parameter(torch.zeros(shape, device="cpu").to(like), like.requires_grad))
        untie(target, known.ties)
        replacements: dict[int, Module] = {}
        for name, stays in known.stays.items():
            old = target.get_submodule(name)
            replacements.setdefault(id(old), _like(stays.build(old), old))
        for name, holder in known.moved.items():
            activation = target.get_submodule(name)
            layer = replacements[id(target.get_submodule(holder))]
            layer.activation = activation
            replacements.setdefault(id(activation), Identity().train(activation.training))
        for name in known.bordered:
            old = target.get_submodule(name)
            conv = replacements.get(id(old), old)
            assert isinstance(conv, _ConvNd)
            replacements[id(old)] = bordered(conv, torch.zeros(conv.in_channels, device="cpu"))
        replace_by_id(target, replacements)
    return target


def _like(replacement: Module, old: Module) -> Module:
    """Return a copy, in the type and on the device of a module whose place it takes, of what has parameters."""
    like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), None)
    if like is None or not any(True for _ in replacement.parameters()):
        return replacement
    for layer in replacement.modules():
        own, weight = getattr(old, "weight", None), layer._parameters.get("weight")
        if weight is not None and weight.is_meta and isinstance(own, Tensor):
            _require(own.shape == weight.shape, f"expected {_described(weight.shape)} in {type(old).__name__}; got "
                     f"{_described(own.shape)}")  # fmt: skip
    copied = copy_model("refold", replacement, "")
    if any(parameter.is_meta for parameter in copied.parameters()):
        copied.to_empty(device=like.device)
        for parameter in copied.parameters():
            torch.nn.init.zeros_(parameter)
    if isinstance(copied, ScaleShift):  # beside half-precision data its parameters are of float32
        for slot, own in list(copied.named_parameters(recurse=False)):  # its activation has the type that it had
            wide = own.detach().to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
            setattr(copied, slot, Parameter(wide, own.requires_grad))
        return copied.to(like.device)
    return copied.to(like)


def _require_original(model: Module, pairs: FoldRecord) -> None:
    """Refuse, before anything is changed, a model that is not built as the folded one was.

    Raises:
        StateError: it lacks a place, or has something else there.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, norm in pairs.norms.items():
        _require(name in modules, f"the model has no module {name}")
        there, expected = type(modules[name]), type(norm)
        # by name: a parametrized module has a class of its own
        same = (there.__module__, there.__qualname__) == (expected.__module__, expected.__qualname__)
        alike = there.__name__ == expected.__name__  # a torch layer, and the one that convert makes of it
        wanted, got = (f"{t.__module__}.{t.__name__}" if alike else t.__name__ for t in (expected, there))
        _require(same, f"expected a {wanted} at {name or _ITSELF}; got a {got}")
    for name in pairs.bordered:
        conv = modules.get(name)
        _require(
            name in pairs.norms or isinstance(conv, _ConvNd),
            f"expected a convolution at {name or _ITSELF}; got a {type(conv).__name__}",
        )
    for name, shape in pairs.added.items():
        place, _, slot = name.rpartition(".")
        size = _size_of(modules.get(place))
        _require(size is None or shape == (size,), f"expected a {slot} of {size} numbers at {place or _ITSELF}; "
                 f"got {_described(shape)}")  # fmt: skip
    for name, tensor in pairs.parameters.items():
        place, _, slot = name.rpartition(".")
        present = place in modules and slot in modules[place]._parameters
        _require(present, f"the model has no parameter {name}")
        now = find_tensor(model, name)
        shapes = tuple(None if t is None else tuple(t.shape) for t in (tensor, now))
        _require(shapes[0] == shapes[1], f"expected {_described(shapes[0])} at {name}; got {_described(shapes[1])}")


def _size_of(module: Module | None) -> int | None:
    """Return how many numbers a bias of a module has; None if it does not tell."""
    names = ("out_channels", "out_features", "num_features")
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)), None)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StateError(f"refold: {otherwise}. Pass a model of the original architecture, as its code builds it.")


def _described(shape: tuple[int, ...] | None) -> str:
    return "no parameter" if shape is None else f"a parameter of shape {'×'.join(map(str, shape))}"
