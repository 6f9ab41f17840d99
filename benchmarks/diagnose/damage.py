"""What a planted fault costs: accuracy in eval mode, outputs, decisions."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from benchmarks.diagnose.data import Batch
from benchmarks.diagnose.faults.dataflow import statistics_gap
from benchmarks.diagnose.faults.registry import Planted
from benchmarks.diagnose.training import logits, norms
from torch import Tensor, nn

__all__ = ["Damage", "measure"]


@dataclass(frozen=True)
class Damage:
    """The eval outputs of a planted model beside those of the right one.

    Attributes:
        accuracy_before: share of pictures that the right model classifies rightly.
        accuracy_after: the same of the model with the fault.
        output_gap: ‖y − y_right‖ / ‖y_right‖ over all logits, each picture's logits less their mean; inf where an
            output is not finite.
        decisions: share of pictures whose class changes.
        layer_gap: the largest gap of the statistics at a guilty norm, as ``statistics_gap`` measures it; None where
            the fault is not in a norm that keeps statistics.
    """

    accuracy_before: float
    accuracy_after: float
    output_gap: float
    decisions: float
    layer_gap: float | None


def measure(planted: Planted) -> Damage:
    """Return the damage, on the data that diagnose is given."""
    after, labels = _evaluated(planted.model, planted.batches)
    before, _ = _evaluated(planted.right, planted.right_batches)
    gap = float((after - before).norm() / before.norm())
    return Damage(
        float((before.argmax(1) == labels).double().mean()),
        float((after.argmax(1) == labels).double().mean()),
        gap if after.isfinite().all() else float("inf"),
        float((before.argmax(1) != after.argmax(1)).double().mean()),
        _layer_gap(planted),
    )


def _layer_gap(planted: Planted) -> float | None:
    stored, due = norms(planted.model), norms(planted.right)
    gaps = [
        statistics_gap(stored[name], due[name])
        for name in planted.layers & stored.keys() & due.keys()
        if stored[name].running_mean is not None and due[name].running_mean is not None
    ]
    return max(gaps, default=None)


def _evaluated(model: nn.Module, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Return centred logits in float64, and labels. A model in train mode is put into eval mode, all of it."""
    if model.training:
        model = copy.deepcopy(model).eval()
    outputs = logits(model, batches).double()
    return outputs - outputs.mean(1, keepdim=True), torch.cat([labels for _, labels in batches])
