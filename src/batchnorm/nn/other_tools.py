"""What other libraries' converters get from a norm that does more than the layer they take it for.

Converters know a norm by ``isinstance`` or by its attributes alone, read γ, β, the running statistics and eps, and
leave the rest behind: an activation, a β without γ, a freeze. None of them can be told so; but each reads ``eps``. So
``eps`` is a property (:mod:`batchnorm.nn.guarded`), here it is looked at who reads it, and what would be lost is an
error then.

Those of ``torch.ao.quantization`` and ``torch.fx.experimental.optimization`` take a layer by its exact class instead. A
layer that adds nothing becomes torch's own as soon as they ask for it; one that does keeps its class, and is not taken.
"""

from __future__ import annotations

import warnings
from types import FrameType
from typing import NamedTuple

import torch
from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.nn import guarded
from batchnorm.nn.frozen import THAWED, state_of
from batchnorm.nn.select import NormModule
from batchnorm.nn.swap import TORCHS, become_torchs, cannot_revert

__all__ = ["asked_for_class", "give_way"]


class _Tool(NamedTuple):
    """A converter.

    Attributes:
        name: as its users call it.
        deploys: whether what it makes is for inference only. A freeze has no meaning there.
        keeps_shift: whether it takes over a β that stands without γ.
    """

    name: str
    deploys: bool
    keeps_shift: bool


_SYNC = "convert_sync_batchnorm"
_TOOLS = {
    ("torch.nn.modules.batchnorm", _SYNC): _Tool(f"torch.nn.SyncBatchNorm.{_SYNC}", deploys=False, keeps_shift=False),
    ("timm.layers.norm_act", _SYNC): _Tool(f"timm.layers.{_SYNC}", deploys=False, keeps_shift=False),
    ("timm.layers.norm_act", "freeze_batch_norm_2d"): _Tool("timm's freeze_batch_norm_2d", True, False),
    ("torch.nn.utils.fusion", "fuse_conv_bn_eval"): _Tool("torch.nn.utils.fusion.fuse_conv_bn_eval", True, True),
    ("torch.nn.utils.fusion", "fuse_linear_bn_eval"): _Tool("torch.nn.utils.fusion.fuse_linear_bn_eval", True, True),
    ("torch.utils.mkldnn", "__init__"): _Tool("torch.utils.mkldnn.to_mkldnn", deploys=True, keeps_shift=True),
}
"""Converters that read eps, by the module and the name of the function in which they do."""

_QUANTIZATION = "torch.ao.quantization"
_OPTIMIZATION = "torch.fx.experimental.optimization"


def _require_nothing_lost(norm: Module, reader: FrameType) -> None:
    tool = _TOOLS.get((reader.f_globals.get("__name__", ""), reader.f_code.co_name))
    if tool is None or reader.f_locals.get("self") is norm:
        return
    for what, remedy in _beyond_torchs(norm, tool):
        raise StateError(f"{_where(norm)}: {tool.name} would drop what this layer does: it {what}. {remedy}")


def _beyond_torchs(norm: Module, tool: _Tool) -> list[tuple[str, str]]:
    """Return what a norm does that a layer of torch made of its γ, β, statistics and eps does not; and what to do."""
    found = []
    activation = getattr(norm, "activation", None)
    own = [type(m).__name__ for m in norm._modules.values() if m is not None and not isinstance(m, torch.nn.Identity)]
    if activation is not None:
        remedy = "Build it without activation, and put a module with the activation behind it."
        found.append((f"applies {activation}", remedy))
    elif own and not tool.name.startswith("timm"):  # timm's layers hold their activation, and timm hands it on
        found.append((f"runs {own[-1]}", "Use timm.layers.convert_sync_batchnorm, or batchnorm.fold."))
    if not tool.keeps_shift and norm.weight is None and norm.bias is not None:
        remedy = "Build it with scale=True; norm.weight.requires_grad_(False) keeps γ at 1."
        found.append(("has a shift β without a scale γ", remedy))
    if not tool.deploys and state_of(norm) != THAWED:
        remedy = "Unfreeze it first with batchnorm.unfreeze, and freeze the converted model."
        found.append(("is frozen", remedy))
    return found


def asked_for_class(reader: FrameType | None) -> str | None:
    """Return which tool that takes layers by their exact class is at work above a frame, as a module's name."""
    while reader is not None:
        module = str(reader.f_globals.get("__name__", ""))
        if module == _OPTIMIZATION or module.startswith(_QUANTIZATION):
            return module
        reader = reader.f_back
    return None


def give_way(norm: Module, tool: str) -> None:
    """Make a layer of this library torch's own if it adds nothing; else say that the tool will not take it.

    Raises:
        StateError: the tool would not do without it: it fuses modules that the user has listed.
    """
    frozen = state_of(norm) != THAWED
    if isinstance(norm, NormModule) and type(norm) in TORCHS and cannot_revert(norm) is None:
        become_torchs(norm)
        return
    activation = getattr(norm, "activation", None)
    if not frozen and activation is None:
        return
    why = "is frozen" if frozen else f"applies {activation}"
    remedy = (
        "Unfreeze it first, with batchnorm.unfreeze(model)."
        if frozen
        else "Build it without activation, and put a module with the activation behind it."
    )
    if tool == f"{_QUANTIZATION}.fuse_modules":
        raise StateError(f"{_where(norm)}: torch.ao.quantization cannot fuse this layer: it {why}. {remedy}")
    if tool != f"{_QUANTIZATION}.quantize":  # which walks over all modules, whatever it is to quantize
        message = f"{_where(norm)}: {tool} leaves this layer as it is, in floating point: it {why}. {remedy}"
        warnings.warn(message, UserWarning, stacklevel=2)


def _where(norm: Module) -> str:
    name = getattr(norm, "layer_name", None)
    return name or f"{type(norm).__name__}({getattr(norm, 'num_features', '')})"


def _answer_for_class(norm: Module, reader: FrameType) -> None:
    tool = asked_for_class(reader)
    if tool is not None:
        give_way(norm, tool)


guarded.answer(eps=_require_nothing_lost, cls=_answer_for_class)
