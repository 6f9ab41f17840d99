"""The same values in other layouts of memory: whoever reads or hashes memory is run on all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.lively import lively
from torch import Tensor, nn

__all__ = ["DENSE", "LAYOUTS", "OVERLAPPING", "input_of", "lay_out", "model_of", "small_model"]


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))


def _transposed(t: Tensor) -> Tensor:
    """Return it with the axes the other way round in memory."""
    axes = list(reversed(range(t.dim())))
    return t.permute(axes).clone(memory_format=torch.contiguous_format).permute(axes)


def _every_second(t: Tensor) -> Tensor:
    whole = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1]) if t.dim() else t.new_zeros(2)
    part = whole[..., ::2] if t.dim() else whole[1]
    return part.copy_(t)


def _with_offset(t: Tensor) -> Tensor:
    whole = t.new_zeros(t.numel() + 3)
    return whole[3:].view(t.shape).copy_(t)


def _odd_strides(t: Tensor) -> Tensor:
    """Return it contiguous, with strides that nobody expects along axes of size 1."""
    strides = [7 if size == 1 else stride for size, stride in zip(t.shape, t.contiguous().stride(), strict=True)]
    return t.contiguous().clone().as_strided(t.shape, strides)


def _expanded(t: Tensor) -> Tensor:
    """Return one value seen many times."""
    return t.flatten()[:1].clone().reshape([1] * t.dim()).expand(t.shape) if t.numel() else t.clone()


def _overlapping(t: Tensor) -> Tensor:
    """Return a tensor whose neighbours along the first axis share memory."""
    if t.dim() == 0 or t.numel() < 2:
        return t.clone()
    inner = t[0].numel()
    step = max(1, inner - 1)
    return t.flatten()[: step * (len(t) - 1) + inner].clone().as_strided(t.shape, (step, *t[0].contiguous().stride()))


DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "transposed": _transposed,
    "every second": _every_second,
    "offset": _with_offset,
    "odd strides": _odd_strides,
}
"""Layouts in which every element has a place of its own."""

OVERLAPPING: dict[str, Callable[[Tensor], Tensor]] = {"expanded": _expanded, "overlapping": _overlapping}
"""Layouts in which several elements share one: their values are other ones, and nobody can write them one by one."""

LAYOUTS = DENSE | OVERLAPPING


def lay_out(model: nn.Module, layout: Callable[[Tensor], Tensor], which: str = "both") -> nn.Module:
    """Give a model's ``"parameters"``, ``"buffers"`` or ``"both"`` another layout, in place."""
    for module in model.modules():
        if which != "buffers":
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = nn.Parameter(layout(p.detach()), requires_grad=p.requires_grad)
        if which != "parameters":
            for name, b in list(module._buffers.items()):
                if b is not None:
                    module._buffers[name] = layout(b)
    return model


def small_model(channels: int = 4, dim: int = 2, norm: str = "torch") -> nn.Module:
    """Return a network with kernels of 3 and of 1, a depthwise and a transposed convolution, and a linear layer."""
    import batchnorm

    conv, up = getattr(nn, f"Conv{dim}d"), getattr(nn, f"ConvTranspose{dim}d")
    bn = getattr(nn if norm == "torch" else batchnorm.nn, f"BatchNorm{dim}d")
    bn1 = (nn if norm == "torch" else batchnorm.nn).BatchNorm1d
    c = channels
    torch.manual_seed(0)
    return lively(
        nn.Sequential(
            *(conv(c, c, 3, padding=1, bias=False), bn(c), nn.ReLU()),
            *(conv(c, c, 1, bias=False), bn(c), nn.ReLU()),
            *(conv(c, c, 3, groups=c), bn(c), nn.ReLU()),
            *(up(c, c, 2), bn(c), nn.Sigmoid(), bn(c)),  # the last norm stays where it is
            *(getattr(nn, f"AdaptiveAvgPool{dim}d")(1), nn.Flatten(), nn.Linear(c, 3), bn1(3)),
        )
    )


def model_of(layout: str, *, which: str = "both", channels: int = 4, dim: int = 2, norm: str = "torch") -> nn.Module:
    """Return the small network in a layout of that name."""
    return lay_out(small_model(channels, dim, norm), LAYOUTS[layout], which)


def input_of(layout: str, *, channels: int = 4, dim: int = 2, batch: int = 4, seed: int = 0) -> Tensor:
    """Return inputs for the small network in a layout of that name."""
    x = torch.randn(batch, channels, *[6] * dim, generator=torch.Generator().manual_seed(seed))
    return LAYOUTS[layout](x)
