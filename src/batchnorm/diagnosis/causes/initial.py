"""Whether a norm still has the values that it was constructed with."""

from __future__ import annotations

from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["is_constructed", "is_initial", "is_zero"]


def is_initial(layer: LayerGap) -> bool:
    """Return whether the stored mean is 0 and the variance 1 in every channel."""
    mean, variance = layer.stored
    return bool((mean == 0).all()) and bool((variance == 1).all())


def is_constructed(layer: LayerGap) -> bool:
    """Return whether γ is 1 in every channel, or 0 in every one, and β is 0."""
    gamma = layer.record.weight
    if gamma is None:
        return False
    return is_zero(layer) or (bool((gamma == 1).all()) and _beta_is_zero(layer))


def is_zero(layer: LayerGap) -> bool:
    """Return whether γ and β are 0 in every channel."""
    gamma = layer.record.weight
    return gamma is not None and bool((gamma == 0).all()) and _beta_is_zero(layer)


def _beta_is_zero(layer: LayerGap) -> bool:
    beta = layer.record.bias
    return beta is None or bool((beta == 0).all())
