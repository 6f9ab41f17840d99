"""Which norm runs when, which layer feeds it, and where the statistics of two models part."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from benchmarks.diagnose.data import Batch
from benchmarks.diagnose.training import norms
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import recalibrate

__all__ = [
    "WEIGHTED",
    "execution_order",
    "feeders",
    "first_moved",
    "pass_in_train_mode",
    "recalibrated",
    "statistics_gap",
]

WEIGHTED = (nn.Linear, nn.Conv2d)
# A mean that is off by a tenth of a deviation, or a variance by a tenth: well above what a moving average leaves.
_MEASURABLE = 0.1


def execution_order(model: nn.Module, batches: list[Batch]) -> list[str]:
    """Return the names of the norms in the order in which they run first."""
    return [name for name, module in _calls(model, batches) if isinstance(module, _BatchNorm)]


def feeders(model: nn.Module, batches: list[Batch]) -> dict[str, str]:
    """Return, for each norm in order of execution, the linear or convolutional layer that runs right before it."""
    found: dict[str, str] = {}
    latest = ""
    for name, module in _calls(model, batches):
        if isinstance(module, WEIGHTED):
            latest = name
        else:
            found[name] = latest
    return found


def _calls(model: nn.Module, batches: list[Batch]) -> list[tuple[str, nn.Module]]:
    """Return weighted layers and norms by name as they run; each once."""
    model = copy.deepcopy(model).eval()
    called: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (*WEIGHTED, _BatchNorm)):

            def note(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                called.setdefault(name, module)

            module.register_forward_hook(note)
    with torch.no_grad():
        model(batches[0][0])
    return list(called.items())


def first_moved(model: nn.Module, right: nn.Module, batches: list[Batch]) -> list[str]:
    """Return the first norm in execution, and the first whose stored statistics are measurably not the right ones.

    A fault of the whole model is at every norm; the first is the right answer. Where its statistics hardly suffer
    (averaging weights keeps the mean of a first layer), the first that suffers is as right.
    """
    order = execution_order(model, batches)
    stored, due = norms(model), norms(right)
    moved = (name for name in order if statistics_gap(stored[name], due[name]) > _MEASURABLE)
    return [order[0], *itertools.islice(moved, 1)]


def statistics_gap(stored: _BatchNorm, due: _BatchNorm) -> float:
    """Return how far stored statistics are from the right ones; inf where they are no statistics.

    The larger of two root mean squares over channels: of the mean's error in standard deviations, and of the
    logarithm of the variances' ratio.
    """
    if not (stored.running_mean.isfinite().all() and (stored.running_var > 0).all()):
        return float("inf")
    mean, variance = stored.running_mean.double(), stored.running_var.double()
    right_mean, right_variance = due.running_mean.double(), due.running_var.double().clamp_min(1e-12)
    shift = (mean - right_mean) / right_variance.sqrt()
    ratio = (variance / right_variance).log()
    return max(float(shift.square().mean().sqrt()), float(ratio.square().mean().sqrt()))


def recalibrated(model: nn.Module, batches: list[Batch]) -> nn.Module:
    """Return a copy in eval mode whose norms have the population statistics of the batches."""
    right = copy.deepcopy(model).eval()
    recalibrate(right, batches, progress=False)
    return right


@torch.no_grad()
def pass_in_train_mode(model: nn.Module, batches: list[Batch]) -> None:
    """Show a model batches in train mode, without learning, so that only the running averages move; then eval mode."""
    model.train()
    for images, _ in batches:
        model(images)
    model.eval()
