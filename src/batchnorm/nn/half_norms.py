"""Norms whose precision torch does not run inside their model, told where the model fails."""

from __future__ import annotations

import torch
from torch.nn import Module

from batchnorm.nn.select import named_norms

__all__ = ["half_norms"]


def half_norms(model: Module) -> str:
    """Name the norms in half precision inside a model that is not, which torch does not run; ``""`` without any."""
    norms = named_norms(model)
    others = {id(p) for norm in norms.values() for p in norm.parameters()}
    if not any(p.dtype == torch.float32 and id(p) not in others for p in model.parameters()):
        return ""
    half = [
        name
        for name, norm in norms.items()
        if any(t.dtype in (torch.float16, torch.bfloat16) for t in (*norm.parameters(), *norm.buffers()))
    ]
    if not half:
        return ""
    first = f"model.get_submodule({half[0]!r})" if half[0] else "model"
    return (
        f"{half[0]} holds half precision in a model of float32 ({len(half)} of {len(norms)} norms do): {first}.float() "
        "makes it fit. "
    )
