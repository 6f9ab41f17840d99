"""Metrics of classes, of values and of outputs alone, and which way each is better."""

from __future__ import annotations

from torch.nn import functional as F

__all__ = [
    "CLASSES",
    "HIGHER",
    "accuracy",
    "cross_entropy",
    "error_rate",
    "explained",
    "spread_out",
    "squared",
]


def accuracy(output, batch):
    return (output.argmax(1) == batch[1]).double().mean()


def error_rate(output, batch):
    return 1 - accuracy(output, batch)


def cross_entropy(output, batch):
    return F.cross_entropy(output, batch[1])


def squared(output, batch):
    return (output - batch[1]).square().mean()


def explained(output, batch):
    return 1 - (output - batch[1]).square().mean() / batch[1].var()


def spread_out(output, batch):
    return output.std()


CLASSES = (accuracy, error_rate, cross_entropy)
HIGHER = {accuracy: True, error_rate: False, cross_entropy: False, squared: False, explained: True}
