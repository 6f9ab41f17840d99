"""Whether a norm still has the statistics that it was constructed with."""

from __future__ import annotations

from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["is_initial"]


def is_initial(layer: LayerGap) -> bool:
    """Return whether the stored mean is 0 and the variance 1 in every channel."""
    mean, variance = layer.stored
    return bool((mean == 0).all()) and bool((variance == 1).all())
