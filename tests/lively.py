"""Norms whose parameters and statistics show."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["lively"]


def lively(model: nn.Module, seed: int = 0, *, positive: bool = False, bare: bool = True) -> nn.Module:
    """Give every norm of a model statistics and parameters that show, in place, and return the model in eval mode.

    Args:
        model: any; what a norm lacks is left out.
        seed: of the random numbers.
        positive: γ between 0.5 and 1.5; otherwise of either sign, and near 0 here and there.
        bare: norms without γ and β too; otherwise they stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in model.modules():
            if not isinstance(norm, _BatchNorm) or not (bare or norm.affine):
                continue
            if norm.running_mean is not None:
                norm.running_mean.normal_(generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
            if norm.weight is not None:
                norm.weight.uniform_(0.5, 1.5, generator=generator) if positive else norm.weight.normal_(
                    generator=generator
                )
            if norm.bias is not None:
                norm.bias.normal_(generator=generator)
    return model.eval()
