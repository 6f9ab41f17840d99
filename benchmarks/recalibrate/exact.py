"""How far the stored statistics are from what each norm meets in eval mode, norm by norm."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from benchmarks.recalibrate.methods import methods
from torch import Tensor, nn

from batchnorm.moments import Moments

NORMS = 20
SAMPLES = 512
BATCHES = (8, 32, 128)
SKIPPED = ("sequential, run again",)  # the bits of "sequential", at twenty times its time


def network(seed: int) -> nn.Module:
    """Return 20 convolutions of 3×3, each with norm and ReLU, with affine parameters as training leaves them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index in range(NORMS):
        norm = nn.BatchNorm2d(16)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        layers += [nn.Conv2d(16 if index else 3, 16, 3, padding=1, bias=False), norm, nn.ReLU()]
    return nn.Sequential(*layers)


def data(seed: int) -> Tensor:
    """Return pictures with a brightness and a contrast of their own, so that batches differ as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 3, 12, 12, generator=generator)
    contrast = 0.5 + torch.rand(SAMPLES, 1, 1, 1, generator=generator)
    return x * contrast + torch.randn(SAMPLES, 3, 1, 1, generator=generator)


def gaps(model: nn.Module, batches: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Return for each norm the largest error of the mean (in σ) and of the variance (relative), over the channels."""
    model.eval()
    met: dict[nn.Module, Moments] = {}

    def measure(norm: nn.Module, arguments: tuple[Tensor]) -> None:
        met[norm] = met[norm].merge(Moments.of(arguments[0])) if norm in met else Moments.of(arguments[0])

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    found = []
    for norm in norms:
        variance = met[norm].variance(correction=1)
        mean_error = (norm.running_mean.double() - met[norm].mean).abs() / variance.sqrt()
        variance_error = (norm.running_var.double() / variance - 1).abs()
        found.append((float(mean_error.max()), float(variance_error.max())))
    return found


def cuts(quick: bool) -> dict[str, list[int]]:
    """Return the sizes of the batches: even ones, and one whose last batches are small."""
    sizes = BATCHES[:1] if quick else BATCHES
    even = {f"{size}": [size] * (SAMPLES // size) for size in sizes}
    return even | {"32, and two of 2": [32] * 15 + [28, 2, 2]}


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return a row a method and cut: the errors of each norm, in the order of the layers."""
    rows = []
    x = data(1)
    for name, sizes in cuts(quick).items():
        batches = x.split(sizes)
        for method, run in methods().items():
            if method in SKIPPED:
                continue
            model = copy.deepcopy(network(0))
            run(model, batches)
            errors = gaps(model, batches)
            rows.append({"question": "exact", "cut": name, "method": method, "errors": errors})
            worst = [max(e[i] for e in errors) for i in (0, 1)]
            print(f"batches of {name}: {method}: mean off by {worst[0]:.1e} σ, variance by {worst[1]:.1e}", flush=True)
    return rows
