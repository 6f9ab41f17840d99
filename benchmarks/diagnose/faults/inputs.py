"""Faults of the data: the model is as trained, and is given pictures of another distribution, or prepared otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.diagnose.faults.dataflow import execution_order
from benchmarks.diagnose.faults.registry import EVERY, Bench, Planted, fault
from torch import Tensor


def _shifted(bench: Bench, change: Callable[[Tensor], Tensor]) -> Planted:
    model = bench.trained()
    clean = bench.data.held_out()
    batches = [(change(images), labels) for images, labels in clean]
    first = execution_order(model, clean)[:1]
    return bench.planted(model, first, bench.trained(), batches=batches, right_batches=clean)


@fault("input_preparation", "not_normalized", architectures=EVERY)
def not_normalized(bench: Bench) -> Planted:
    """The service feeds pixels in [0, 1]; training subtracted the mean and divided by the deviation."""
    return _shifted(bench, lambda images: images * bench.data.std + bench.data.mean)


@fault("input_preparation", "not_scaled", architectures=EVERY)
def not_scaled(bench: Bench) -> Planted:
    """``ToTensor`` was lost: pixels from 0 to 255 went through the normalization that is meant for 0 to 1."""
    mean, std = bench.data.mean, bench.data.std
    return _shifted(bench, lambda images: (255 * (images * std + mean) - mean) / std)


@fault("input_preparation", "swapped_mean_std", architectures=EVERY)
def swapped_mean_std(bench: Bench) -> Planted:
    """``Normalize(std, mean)``: the arguments are in the wrong order."""
    mean, std = bench.data.mean, bench.data.std
    return _shifted(bench, lambda images: (images * std + mean - std) / mean)


@fault("input_preparation", "normalized_twice", architectures=EVERY)
def normalized_twice(bench: Bench) -> Planted:
    """The loader normalizes, and so does the model's own wrapper."""
    return _shifted(bench, lambda images: (images - bench.data.mean) / bench.data.std)


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
