"""Faults of the data: the model is as trained, and evaluated on pictures of another distribution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.diagnose.faults.dataflow import execution_order
from benchmarks.diagnose.faults.registry import Bench, Planted, fault
from torch import Tensor


def _shifted(bench: Bench, change: Callable[[Tensor], Tensor]) -> Planted:
    model = bench.trained()
    clean = bench.data.held_out()
    batches = [(change(images), labels) for images, labels in clean]
    first = execution_order(model, clean)[:1]
    return bench.planted(model, first, bench.trained(), batches=batches, right_batches=clean)


@fault("domain_shift", "not_normalized")
def not_normalized(bench: Bench) -> Planted:
    """The service feeds pixels in [0, 1]; training subtracted the mean and divided by the deviation."""
    return _shifted(bench, lambda images: images * bench.data.std + bench.data.mean)


@fault("domain_shift", "inverted")
def inverted(bench: Bench) -> Planted:
    """Dark ink on light paper, where training saw light ink on dark."""
    return _shifted(bench, lambda images: (1 - 2 * bench.data.mean) / bench.data.std - images)


@fault("domain_shift", "low_contrast")
def low_contrast(bench: Bench) -> Planted:
    """Another camera: a third of the contrast, and a brighter ground."""
    return _shifted(bench, lambda images: 0.33 * images + 1.0)


@fault("domain_shift", "noise")
def noise(bench: Bench) -> Planted:
    """Pictures taken in the dark: white noise of the pictures' own deviation."""
    generator = torch.Generator().manual_seed(bench.seed)
    return _shifted(bench, lambda images: images + torch.randn(images.shape, generator=generator))
