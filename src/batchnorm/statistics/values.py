"""What the buffers of a norm are to hold, from what it met."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from batchnorm.errors import NonFiniteError, ShapeError
from batchnorm.functional.validation import HALF
from batchnorm.statistics.estimators import Within
from batchnorm.statistics.sites import Site
from batchnorm.statistics.tally import Tally

__all__ = ["Statistics", "new_values", "rounded", "statistics_of", "too_few"]

Statistics: TypeAlias = "tuple[Tensor, Tensor]"
"""Mean and unbiased variance as a norm uses them in eval mode, (C,)."""


def new_values(site: Site, tally: Tally) -> dict[str, Tensor]:
    """Return what the buffers of a site are to hold, by their key, in their own dtype.

    Raises:
        ShapeError: some channel met too few values.
        NonFiniteError: a value does not fit into the buffer's dtype.
    """
    mean, variance = tally.estimator.statistics()
    name = site.name or "the norm"
    missing = variance.isnan().nonzero().flatten().tolist()
    if missing:
        met = int(tally.estimator.pooled.count[missing[0]])
        scope = "in some batch" if isinstance(tally.estimator, Within) else "in all"
        raise too_few("recalibrate", f"{name}: a variance", scope, missing[0], met, tally.calls)
    mean_key, variance_key, batches_key = site.keys
    new = {}
    for key, value, buffer in ((mean_key, mean, site.running_mean), (variance_key, variance, site.running_var)):
        new[key] = value.to(buffer.dtype).view_as(buffer)
        if not bool(torch.isfinite(new[key]).all()):
            raise NonFiniteError(
                f"recalibrate: {name}: {key} reaches {float(value.abs().max()):.4g}, more than {buffer.dtype} can "
                f"hold. {_hint(buffer.dtype)} The model is as it was."
            )
    if batches_key is not None:
        counter: Tensor = getattr(site.owner, batches_key)
        new[batches_key] = torch.full_like(counter, tally.batches)
    if tally.stored is not None:
        for key, value in zip((mean_key, variance_key), tally.stored, strict=True):
            new[key] = value.to(new[key].dtype).view_as(new[key])
    return new


def too_few(verb: str, what: str, scope: str, channel: int, met: int, calls: int) -> ShapeError:
    """Return the error of a channel that met too few values for a variance."""
    return ShapeError(
        f"{verb}: {what} needs at least 2 values per channel {scope}; channel {channel} met {met} in {calls} calls. "
        "Pass larger or more batches. The model is as it was."
    )


def statistics_of(site: Site, tally: Tally) -> Statistics:
    """Return what the norm will normalize by once its buffers hold what it met: rounded as they round.

    Raises:
        ShapeError: some channel met too few values.
        NonFiniteError: a value does not fit into the buffer's dtype.
    """
    new = new_values(site, tally)
    return rounded(site, new[site.keys[0]], new[site.keys[1]])


def rounded(site: Site, mean: Tensor, variance: Tensor) -> Statistics:
    """Return what the norm normalizes by once its buffers hold these values."""
    dtype = torch.promote_types(site.running_mean.dtype, torch.float32)
    buffers = (site.running_mean, site.running_var)
    mean, variance = (
        t.to(b.device, b.dtype).reshape(-1).to(dtype) for t, b in zip((mean, variance), buffers, strict=True)
    )
    return mean, variance


def _hint(dtype: torch.dtype) -> str:
    if dtype in HALF:
        return "Keep the norm in float32 (norm.float())."
    return "Look for inputs that are not scaled as in training, and for weights that have diverged."
