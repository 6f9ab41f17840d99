"""scikit-learn's handwritten digits, 8×8 as they are, normalized by the training part's mean and deviation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from batchnorm.demo.datasets import load_digits

__all__ = ["Batch", "Data", "in_batches", "load"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Pictures of shape (N, 1, 8, 8), normalized, and their classes; a random quarter is held out.

    ``mean`` and ``std`` (divisor n − 1) are those of the training part's pixels before normalization, in [0, 1].
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: float
    std: float

    def training(self, size: int = 64) -> list[Batch]:
        """Return the training part in batches, the last one smaller."""
        return in_batches(self.train_images, self.train_labels, size)

    def held_out(self, size: int = 64) -> list[Batch]:
        """Return the held-out part in batches, the last one smaller."""
        return in_batches(self.test_images, self.test_labels, size)


@lru_cache
def load(seed: int) -> Data:
    """Return the digits, cut into the two parts by the seed."""
    digits = load_digits(seed)
    mean, std = float(digits.train_images.mean()), float(digits.train_images.std())
    train, test = ((images - mean) / std for images in (digits.train_images, digits.test_images))
    return Data(train, digits.train_labels, test, digits.test_labels, mean, std)


def in_batches(images: Tensor, labels: Tensor, size: int) -> list[Batch]:
    """Return pictures and classes in batches of ``size``, as a loader that keeps the last, smaller one."""
    return list(zip(images.split(size), labels.split(size), strict=True))
